"""Latency of several networks measured together, so that their ratio means something on a busy machine.

The networks take turns in random order, round by round, in one run; a neighbor's load then hits all of them
alike. Ratios are taken within rounds before the median is.
"""

from __future__ import annotations

import gc
import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur.analysis.inputs import Inputs, as_args, evaluating, with_batch
from secateur.errors import UsageError

__all__ = ["Latency", "LatencyRatio", "device_name", "latency_ratio", "measure_latency", "median_interval"]

MIN_ROUNDS = 6
"""Fewest rounds whose range covers the median with 95 % confidence: 1 - 2 / 2**6 = 0.969."""


@dataclass(frozen=True)
class Latency:
    """Time of one call.

    Args:
        median_ms: median over rounds, milliseconds per call (not per image).
        low_ms, high_ms: 95 % interval of the median (`median_interval`).
        n: rounds.
        calls: calls timed together in one round.
        batch_size: rows of input in one call.
        threads: intra-op threads torch was set to (a runtime of its own may have been set up otherwise).
        device: processor or accelerator model.
        clock: "wall", or "cpu" (time the process spent computing, all threads added up).
        run: the measurement this belongs to; ratios are only taken within one.
        rounds_ms: milliseconds per call of each round, in order.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    n: int
    calls: int
    batch_size: int
    threads: int
    device: str
    clock: str
    run: int
    rounds_ms: tuple[float, ...]

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        return (
            f"{self.median_ms:.3g} ms (95 % interval {self.low_ms:.3g}..{self.high_ms:.3g}; "
            f"{self.n} rounds of {self.calls}; batch {self.batch_size}; {threads}; {self.device})"
        )


@dataclass(frozen=True)
class LatencyRatio:
    """How many times faster the pruned network is: median of the per-round ratios dense / pruned.

    Args:
        median, low, high: the ratio and the 95 % interval of its median.
        n: rounds.
        resolved: the interval leaves out 1, so the networks do differ in speed.
    """

    median: float
    low: float
    high: float
    n: int
    resolved: bool

    @property
    def verdict(self) -> Literal["resolved", "not resolved"]:
        return "resolved" if self.resolved else "not resolved"

    def __str__(self) -> str:
        interval = f"95 % interval {self.low:.2f}..{self.high:.2f}"
        return f"x{self.median:.2f} ({interval}, {self.n} rounds, {self.verdict})"


def measure_latency(
    models: Mapping[str, nn.Module | Callable[..., Any]],
    example_input: Inputs,
    *,
    batch_size: int = 1,
    threads: int = 1,
    warmup: int = 3,
    rounds: int = 30,
    min_time: float = 0.01,
    clock: Literal["wall", "cpu"] = "wall",
    seed: int = 0,
) -> dict[str, Latency]:
    """Time all `models` in turn, in random order each round, and report each one's time per call.

    Modules run in eval mode under `torch.inference_mode()`; any other callable is called as it is, so
    sessions of another runtime can be compared among themselves. Speed-ups belong inside one runtime.

    Args:
        models: name -> network or callable.
        example_input: tensor `[batch, ...]` or tuple of positional arguments; its rows are cycled to
            `batch_size`.
        threads: torch's intra-op threads while measuring; restored afterwards.
        warmup: untimed calls of each before the first round, at least 1.
        rounds: at least 6, or no 95 % interval exists.
        min_time: seconds; each timed block repeats the call until it should last this long.
        clock: "wall"; "cpu" ignores the time other processes take, and is wrong for GPUs and misleading with
            more than one thread.
        seed: of the order within rounds only.

    Raises:
        UsageError: nothing to measure, or an argument out of range.
    """
    if not models:
        raise UsageError("nothing to measure: expected at least one named network")
    for label, got, least in (("rounds", rounds, MIN_ROUNDS), ("warmup", warmup, 1), ("threads", threads, 1)):
        if got < least:
            raise UsageError(f"{label}={got} is too few; expected at least {least}")
    if clock not in ("wall", "cpu"):
        raise UsageError(f'clock "{clock}" is unknown; expected "wall" or "cpu"')
    args = with_batch(as_args(example_input), batch_size)
    device = next(a.device for a in args if isinstance(a, Tensor))
    if clock == "cpu" and device.type != "cpu":
        raise UsageError(f'clock "cpu" cannot see work done on {device.type}; use clock "wall"')
    now = time.perf_counter_ns if clock == "wall" else time.process_time_ns
    settle = _synchronizer(device)
    order = random.Random(seed)
    run = time.time_ns()
    with evaluating(*models.values()), torch.inference_mode(), _threads(threads), _no_collector():
        calls = {name: _calls(model, args, warmup, min_time, settle) for name, model in models.items()}
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(rounds):
            for name in order.sample(list(models), len(models)):
                model, repeats = models[name], calls[name]
                settle()
                start = now()
                for _ in range(repeats):
                    model(*args)
                settle()
                times[name].append((now() - start) / repeats / 1e6)
    return {
        name: Latency(
            statistics.median(values),
            *median_interval(values),
            n=rounds,
            calls=calls[name],
            batch_size=batch_size,
            threads=threads,
            device=device_name(device),
            clock=clock,
            run=run,
            rounds_ms=tuple(values),
        )
        for name, values in times.items()
    }


def latency_ratio(dense: Latency, pruned: Latency) -> LatencyRatio:
    """How many times faster `pruned` is than `dense`, from ratios taken round by round.

    Raises:
        UsageError: the two come from different measurements, so their rounds are no pairs.
    """
    if dense.run != pruned.run or len(dense.rounds_ms) != len(pruned.rounds_ms):
        raise UsageError("latencies of different runs are not paired; measure both in one measure_latency call")
    ratios = [a / b for a, b in zip(dense.rounds_ms, pruned.rounds_ms, strict=True)]
    low, high = median_interval(ratios)
    return LatencyRatio(statistics.median(ratios), low, high, len(ratios), not low <= 1 <= high)


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Distribution-free interval of the median from order statistics.

    The k-th smallest and k-th largest of n independent values enclose the median of any distribution with
    probability at least 1 - 2 P(Binomial(n, 1/2) < k); k is the largest for which this is >= `confidence`.
    Slow drift during a run makes rounds dependent and the interval too narrow; ratios suffer less.

    Raises:
        UsageError: too few values for the confidence, or confidence outside (0, 1).

    Examples:
        >>> median_interval([5.0, 1.0, 4.0, 2.0, 6.0, 3.0])
        (1.0, 6.0)
    """
    if not 0 < confidence < 1:
        raise UsageError(f"confidence {confidence} is out of range; expected 0 < confidence < 1")
    n = len(values)
    # Whole numbers: 2 * sum C(n, i) <= (1 - confidence) * 2**n, without rounding for any n.
    budget = math.floor((1 - confidence) * 2**n / 2) if n < 1000 else int((1 - confidence) * 2**53) * 2 ** (n - 54)
    k, tail, term = 0, 0, 1
    while tail + term <= budget:
        tail += term
        term = term * (n - k) // (k + 1)
        k += 1
    if k == 0:
        raise UsageError(f"{n} values are too few for a {100 * confidence:g} % interval of the median")
    ordered = sorted(values)
    return ordered[k - 1], ordered[n - k]


def device_name(device: torch.device | str = "cpu") -> str:
    """Model name of the processor or accelerator, as the system tells it."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown CPU"


def _calls(
    model: Callable[..., Any], args: tuple[Any, ...], warmup: int, min_time: float, settle: Callable[[], None]
) -> int:
    fastest = math.inf
    for _ in range(warmup):
        settle()
        start = time.perf_counter()
        model(*args)
        settle()
        fastest = min(fastest, time.perf_counter() - start)
    return max(1, math.ceil(min_time / max(fastest, 1e-9)))


def _synchronizer(device: torch.device) -> Callable[[], None]:
    """A call that returns once the device has finished; nothing to wait for on the CPU."""
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.accelerator.synchronize(device)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_collector() -> Iterator[None]:
    """Keep the garbage collector from running inside one network's turn and not the other's."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
