"""The interval covers the median as often as it says; the measurement takes turns and leaves no trace."""

from __future__ import annotations

import json
import time
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.analysis import Latency, device_name, latency_ratio, measure_latency, median_interval
from secateur.errors import UsageError


def _latency(rounds_ms, run: int = 1) -> Latency:
    low, high = median_interval(rounds_ms)
    return Latency(
        float(np.median(rounds_ms)),
        low,
        high,
        len(rounds_ms),
        1,
        1,
        1,
        "simulated",
        "wall",
        run,
        tuple(rounds_ms),
    )


@pytest.mark.parametrize("n", [6, 9, 20, 31, 100])
def test_interval_covers_the_true_median_of_a_skewed_distribution(n: int) -> None:
    rng = np.random.default_rng(n)
    trials = 4000
    hits = 0
    for sample in rng.lognormal(0.0, 1.0, (trials, n)):  # median exp(0) = 1
        low, high = median_interval(sample)
        hits += low <= 1.0 <= high
    assert hits / trials >= 0.95 - 3 * (0.05 * 0.95 / trials) ** 0.5


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=6, max_size=60))
def test_interval_is_made_of_values_and_holds_the_sample_median(values) -> None:
    low, high = median_interval(values)
    assert low in values
    assert high in values
    assert low <= float(np.median(values)) <= high
    assert median_interval(values, 0.5)[0] >= low


def test_interval_agrees_with_the_tables_and_has_no_size_limit() -> None:
    # Order statistics 10 and 21 of 30, 40 and 61 of 100: the classic sign-test table.
    assert median_interval(list(range(1, 31))) == (10, 21)
    assert median_interval(list(range(1, 101))) == (40, 61)
    low, high = median_interval(list(range(5000)))
    assert high - low == pytest.approx(2 * 1.96 * 0.5 * 5000**0.5, rel=0.03)


def test_pairing_resolves_what_common_noise_hides() -> None:
    rng = np.random.default_rng(0)
    load = rng.lognormal(0.0, 0.8, 40)
    dense = _latency(list(1.10 * load * rng.normal(1, 0.01, 40)))
    pruned = _latency(list(load * rng.normal(1, 0.01, 40)))
    ratio = latency_ratio(dense, pruned)
    assert ratio.resolved
    assert ratio.verdict == "resolved"
    assert ratio.low <= 1.10 <= ratio.high
    assert pruned.high_ms > dense.low_ms
    same = latency_ratio(dense, dense)
    assert (same.median, same.verdict) == (1.0, "not resolved")
    assert "not resolved" in str(same)


def test_ratio_refuses_rounds_that_are_no_pairs() -> None:
    with pytest.raises(UsageError, match="not paired"):
        latency_ratio(_latency([1.0] * 8, run=1), _latency([1.0] * 8, run=2))


def test_a_slower_callable_is_slower() -> None:
    results = measure_latency(
        {"slow": lambda _: time.sleep(0.006), "fast": lambda _: time.sleep(0.001)},
        torch.zeros(1, 1),
        rounds=8,
        min_time=0,
    )
    ratio = latency_ratio(results["slow"], results["fast"])
    assert ratio.resolved
    assert ratio.median > 2
    assert results["slow"].low_ms >= 6
    assert results["slow"].device == device_name()
    assert results["slow"].n == len(results["slow"].rounds_ms) == 8


def test_cpu_clock_ignores_waiting() -> None:
    result = measure_latency({"a": lambda _: time.sleep(0.01)}, torch.zeros(1), rounds=6, min_time=0, clock="cpu")
    assert result["a"].median_ms < 5


def test_every_round_has_everyone_once_in_changing_order() -> None:
    log: list[str] = []
    models = {name: (lambda _, name=name: log.append(name)) for name in "abc"}
    measure_latency(models, torch.zeros(1), warmup=1, rounds=12, min_time=0)
    rounds = [tuple(log[i : i + 3]) for i in range(3, len(log), 3)]
    assert len(rounds) == 12
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 2
    first, log[:] = list(log), []
    measure_latency(models, torch.zeros(1), warmup=1, rounds=12, min_time=0)
    assert log == first


def test_short_calls_are_repeated_within_a_round() -> None:
    result = measure_latency({"a": lambda _: time.sleep(0.001)}, torch.zeros(1), rounds=6, min_time=0.01)["a"]
    assert 3 <= result.calls <= 10
    assert result.median_ms < 6


def test_modules_run_in_eval_and_inference_mode_and_come_back_as_they_were() -> None:
    seen = []

    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            seen.append((self.training, torch.is_inference_mode_enabled(), torch.get_num_threads(), x.shape[0]))
            return self.norm(x)

    net = Probe()
    net.norm.eval()
    threads, mean = torch.get_num_threads(), net.norm.running_mean.clone()
    result = measure_latency({"net": net}, torch.randn(2, 3), batch_size=5, threads=2, rounds=6, min_time=0)["net"]
    assert set(seen) == {(False, True, 2, 5)}
    assert (result.batch_size, result.threads) == (5, 2)
    assert net.training
    assert not net.norm.training
    assert torch.get_num_threads() == threads
    assert torch.equal(mean, net.norm.running_mean)
    assert json.loads(json.dumps(asdict(result)))["batch_size"] == 5
    assert "batch 5; 2 threads" in str(result)


def test_threads_and_flags_come_back_after_a_failure() -> None:
    net = nn.Linear(3, 2)
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError):
        measure_latency({"net": net}, torch.randn(1, 4), threads=threads + 1)
    assert net.training
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": 5}, "rounds=5"),
        ({"warmup": 0}, "warmup=0"),
        ({"threads": 0}, "threads=0"),
        ({"batch_size": 0}, "0"),
    ],
)
def test_arguments_out_of_range(arguments, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        measure_latency({"a": nn.Identity()}, torch.zeros(1), **arguments)


def test_nothing_to_measure_and_too_few_values() -> None:
    with pytest.raises(UsageError, match="nothing to measure"):
        measure_latency({}, torch.zeros(1))
    with pytest.raises(UsageError, match="5 values are too few"):
        median_interval([1.0] * 5)
    with pytest.raises(UsageError, match="clock"):
        measure_latency({"a": nn.Identity()}, torch.zeros(1), clock="sun")  # type: ignore[arg-type]
