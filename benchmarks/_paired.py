"""Side-by-side timing: one process, one thread, random order, median of per-round paired ratios.

A ratio is taken inside a round, between runs that saw the same machine load, so a busy neighbor shifts both
sides alike; CPU time leaves out what other processes took.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import multiprocessing
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

__all__ = ["Row", "machine", "parser", "peak_extra_bytes", "ratios", "report", "steady", "timed", "timed_rounds"]


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Args:
        case: what was measured on.
        name: the variant.
        milliseconds: median time of one run.
        ratio: median of the paired ratios; what it is a ratio to, the table's title says.
        low, high: 95 % interval of that median.
        goal: bound on `ratio`, or None where there is none.
        at_least: the goal is a lower bound (a speed-up), not an upper one.
        note: anything else, in a few words.
    """

    case: str
    name: str
    milliseconds: float
    ratio: float
    low: float
    high: float
    goal: float | None = None
    at_least: bool = False
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the median reaches the goal."""
        if self.goal is None:
            return None
        return self.ratio >= self.goal if self.at_least else self.ratio <= self.goal


def parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """The flags all benchmarks share."""
    flags = argparse.ArgumentParser(description=description.splitlines()[0])
    flags.add_argument("--rounds", type=int, default=rounds, help=f"interleaved rounds (default {rounds})")
    flags.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    return flags


def steady(seed: int = 0) -> None:
    """One thread, a fixed seed, and an allocator that keeps its pages: page faults differ from run to run."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    if sys.platform == "linux":
        m_trim_threshold, m_mmap_threshold, largest_accepted = -1, -3, 1 << 25
        libc = ctypes.CDLL(None)
        libc.mallopt(m_trim_threshold, 1 << 30)
        libc.mallopt(m_mmap_threshold, largest_accepted)


def timed(action: Callable[[], Any]) -> float:
    """CPU milliseconds of one call in this process."""
    start = time.process_time()
    action()
    return (time.process_time() - start) * 1e3


def timed_rounds(
    variants: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    warm: int = 1,
    clock: Callable[[Callable[[], Any]], float] = timed,
) -> dict[str, list[float]]:
    """Times of every variant, one per round; each round runs all of them in a new random order."""
    order, shuffle = list(variants), random.Random(0).shuffle
    for _ in range(warm):
        for action in variants.values():
            action()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            times[name].append(clock(variants[name]))
    return times


def ratios(over: Sequence[float], under: Sequence[float]) -> tuple[float, float, float]:
    """Median of the paired ratios, and its 95 % interval from order statistics (all of them below six rounds).

    >>> ratios([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    (2.0, 2.0, 3.0)
    """
    paired = sorted(a / b for a, b in zip(over, under, strict=True))
    n, cut, tail = len(paired), 0, 0.5 ** len(paired)
    while tail <= 0.025:
        cut += 1
        tail += math.comb(n, cut) * 0.5**n
    cut = max(0, cut - 1)
    return median(paired), paired[cut], paired[n - 1 - cut]


def peak_extra_bytes(action: Callable[..., Any], *args: Any) -> int:
    """How far resident memory rises while `action(*args)()` runs, in a fresh process (Linux).

    `action` is a module-level function that prepares (not counted) and returns what is measured.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_extra_bytes, action, args).result()


def _peak_extra_bytes(action: Callable[..., Callable[[], Any]], args: tuple[Any, ...]) -> int:
    import torch

    torch.set_num_threads(1)
    libc, m_mmap_threshold = ctypes.CDLL(None), -3
    libc.mallopt(m_mmap_threshold, 1 << 16)  # what is freed goes back at once, so nothing old is reused unseen
    measured = action(*args)
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    measured()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def machine() -> dict[str, str]:
    """What the figures depend on; no names and no dates."""
    import numpy
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": str(os.cpu_count()),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }


def report(title: str, rows: Sequence[Row], rounds: int, json_file: Path | None) -> None:
    """Print the table; write it as JSON too if asked."""
    facts = machine()
    print(f"\n{title}\n{facts['cpu']} ({facts['simd']}), 1 thread, torch {facts['torch']}, {rounds} rounds\n")
    print(f"| {'case':<24} | {'variant':<38} | {'ms':>9} | {'ratio':>7} | {'95 %':>15} | {'goal':>8} | {'':<6} | note")
    print(f"|{'-' * 26}|{'-' * 40}|{'-' * 11}|{'-' * 9}|{'-' * 17}|{'-' * 10}|{'-' * 8}|{'-' * 6}")
    for row in rows:
        goal = "" if row.goal is None else f"{'>=' if row.at_least else '<='} {row.goal:g}"
        met = {None: "", True: "met", False: "MISSED"}[row.met]
        interval = f"{row.low:.3f}..{row.high:.3f}"
        print(
            f"| {row.case:<24} | {row.name:<38} | {row.milliseconds:9.2f} | {row.ratio:7.3f} | {interval:>15} "
            f"| {goal:>8} | {met:<6} | {row.note}"
        )
    if json_file is not None:
        table = [{**asdict(row), "met": row.met} for row in rows]
        json_file.write_text(json.dumps({"title": title, "machine": facts, "rounds": rounds, "rows": table}, indent=1))
