"""A run's result as the lab writes it, drawn from a seeded generator: what the report is tested on."""

from __future__ import annotations

from typing import Any

import numpy as np

METHODS = [
    {"label": "dense", "regularizer": "none", "control": True},
    {"label": "dropout", "regularizer": "dropout", "control": True},
    {"label": "Targeted Dropout", "regularizer": "targeted_dropout", "control": False},
    {"label": "DDROP", "regularizer": "ddrop", "control": False},
]
SPARSITIES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95)
LAYERS = (("conv1", 16 * 9), ("conv2", 16 * 32 * 9), ("fc1", 32 * 128), ("fc2", 128 * 10))
# Accuracy lost at each sparsity, by method; a sigmoid in sparsity with this midpoint.
_MIDPOINT = {"dense": 0.84, "dropout": 0.87, "Targeted Dropout": 0.95, "DDROP": 0.80}


def make_result(
    seeds: int = 3, *, name: str = "digits", noise: float = 0.006, count: int = 360, rng_seed: int = 0
) -> dict[str, Any]:
    """A realistic result: four methods, two granularities, latency and a final network for the unit cut."""
    rng = np.random.default_rng(rng_seed)
    base = {seed: 0.955 + rng.normal(0, noise / 2) for seed in range(seeds)}
    rows = [
        _row(rng, str(method["label"]), seed, granularity, sparsity, base[seed], noise, count)
        for granularity in ("weight", "unit")
        for method in METHODS
        for sparsity in SPARSITIES
        for seed in range(seeds)
    ]
    return {
        "schema": 1,
        "name": name,
        "recipe_hash": "3f9a1c0d7e52b684",
        "recipe": {
            "name": name,
            "data": {"name": "digits", "classes": 10},
            "model": {"name": "dropnet_a"},
            "prune": {"granularities": ["weight", "unit"], "sparsities": list(SPARSITIES)},
            "seeds": list(range(seeds)),
        },
        "provenance": {
            "versions": {"secateur": "0.1.0", "torch": "2.15.0", "numpy": "2.3.1", "python": "3.12.4"},
            "device": "cpu",
            "threads": 2,
            "command": ["secateur", "run", "recipes/digits demo.yaml", "--seeds", str(seeds)],
            "git": {"commit": "8d08736", "dirty": True},
            "platform": "Linux x86_64",
        },
        "created": "2026-11-21T07:30:00+00:00",
        "wall_seconds": 83.2,
        "methods": [dict(method) for method in METHODS],
        "rows": rows,
        "trainings": [_training(rng, str(method["label"]), seed) for method in METHODS for seed in range(seeds)],
        "final": _final(),
    }


def _row(
    rng: np.random.Generator,
    method: str,
    seed: int,
    granularity: str,
    sparsity: float,
    base: float,
    noise: float,
    count: int,
) -> dict[str, Any]:
    middle = _MIDPOINT[method] - (0.12 if granularity == "unit" else 0.0)
    share = 0.1 + (base - 0.1) / (1 + np.exp((sparsity - middle) / 0.035))
    share = float(np.clip(share + rng.normal(0, noise), 0.05, 1.0))
    correct = round(share * count)
    total = sum(size for _, size in LAYERS)
    layers = [
        {"name": layer, "kept": round(size * (1 - sparsity * (0.6 if at == 0 else 1.0))), "total": size}
        for at, (layer, size) in enumerate(LAYERS)
    ]
    kept = sum(int(str(layer["kept"])) for layer in layers)
    median = 0.4 + 1.6 * (1 - sparsity) + float(rng.normal(0, 0.02))
    return {
        "method": method,
        "seed": seed,
        "granularity": granularity,
        "criterion": "magnitude",
        "scope": "tensor",
        "sparsity_asked": sparsity,
        "sparsity_got": 1 - kept / total,
        "params_total": total + 186,
        "params_kept": kept + 186,
        "macs": 301_000 if granularity == "weight" else round(301_000 * (1 - sparsity) ** 1.5),
        "top1": correct / count,
        "correct": correct,
        "count": count,
        "top5": None,
        "layers": layers,
        "latency": None
        if granularity == "weight"
        else {
            "median_ms": median,
            "low_ms": median * 0.97,
            "high_ms": median * 1.05,
            "batch_size": 64,
            "threads": 2,
            "device": "cpu",
        },
        "retrained": False,
        "stage": f"{seed:04x}",
    }


def _training(rng: np.random.Generator, method: str, seed: int) -> dict[str, Any]:
    slow = {"dense": 4.0, "dropout": 5.0, "Targeted Dropout": 6.0, "DDROP": 5.0}[method]
    history = [
        {
            "epoch": epoch,
            "loss": float(2.3 * np.exp(-epoch / slow) + 0.05 + abs(rng.normal(0, 0.02))),
            "top1": float(np.clip(0.96 - 0.85 * np.exp(-epoch / slow) + rng.normal(0, 0.01), 0, 1)),
        }
        for epoch in range(1, 21)
    ]
    return {
        "method": method,
        "seed": seed,
        "steps": 460,
        "seconds": 4.2,
        "final_loss": history[-1]["loss"],
        "top1": history[-1]["top1"],
        "history": history,
    }


def _final() -> dict[str, Any]:
    place = {"batch_size": 64, "threads": 2, "device": "cpu"}
    return {
        "method": "Targeted Dropout",
        "seed": 0,
        "granularity": "unit",
        "sparsity": 0.5,
        "asked_vs_achieved": {
            "sparsity_asked": 0.5,
            "sparsity_got": 0.5,
            "params": {"dense": 10314, "cut": 2702},
            "macs": {"dense": 301_000, "cut": 88_420},
            "bytes": {"dense": 43_008, "cut": 12_400},
        },
        "verify": {"max_abs_diff": 9.5e-7, "tolerance": 1e-4, "scale": 14.2, "inputs": 360},
        "accuracy": {"dense": 0.9556, "masked": 0.9361, "cut": 0.9361, "fine_tuned": 0.9528, "reloaded": 0.9528},
        "latency": {
            "dense": {"median_ms": 2.01, "low_ms": 1.96, "high_ms": 2.1, **place},
            "cut": {"median_ms": 1.12, "low_ms": 1.08, "high_ms": 1.19, **place},
            "ratio": {"median": 1.79, "low": 1.7, "high": 1.88, "resolved": True},
        },
        "memory": {"dense_peak_bytes": 9_400_000, "cut_peak_bytes": 5_100_000},
        "exports": [
            {"format": "onnx", "path": "network.onnx", "bytes": 13_000, "max_abs_diff": 2e-6, "tolerance": 1e-4},
            {"format": "torch.export", "path": "network.pt2", "bytes": 31_000, "max_abs_diff": 0.0, "tolerance": 1e-4},
        ],
        "file": {"path": "network.safetensors", "bytes": 12_400, "reload_max_abs_diff": 0.0},
    }
