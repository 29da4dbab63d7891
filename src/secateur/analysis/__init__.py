"""What a network costs, measured without changing it."""

from __future__ import annotations

from secateur.analysis.cost import (
    AskedAchieved,
    Cost,
    asked_vs_achieved,
    compare_costs,
    measure_cost,
    safetensors_bytes,
)
from secateur.analysis.latency import (
    Latency,
    LatencyRatio,
    device_name,
    latency_ratio,
    measure_latency,
    median_interval,
)
from secateur.analysis.memory import MemoryUse, peak_memory

__all__ = [
    "AskedAchieved",
    "Cost",
    "Latency",
    "LatencyRatio",
    "MemoryUse",
    "asked_vs_achieved",
    "compare_costs",
    "device_name",
    "latency_ratio",
    "measure_cost",
    "measure_latency",
    "median_interval",
    "peak_memory",
    "safetensors_bytes",
]
