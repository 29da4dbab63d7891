"""Masks by LAMP's score without its scores: those of the complete scores, whatever the bracket finds."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core import cells, tail_share
from secateur.core.select import select
from secateur.core.tail_share import TailShares, select_tail_shares
from secateur.criteria.base import Evidence
from secateur.criteria.lamp import Lamp
from secateur.errors import DataError, UsageError

KINDS = ["normal", "heavy", "sorted", "quantized", "half_zero", "mostly_zero", "zero", "constant"]
sparsities = st.one_of(st.sampled_from([0.0, 0.5, 0.9, 0.99, 0.999]), st.floats(0, 0.9999))
roundings = st.sampled_from(["prune_floor", "keep_floor", "nearest"])


def _values(kind, shape, generator):
    x = generator.normal(size=shape)
    return {
        "normal": x,
        "heavy": generator.standard_t(1.5, size=shape),
        "sorted": np.sort(x, axis=None).reshape(shape),
        "quantized": np.round(2 * x),
        "half_zero": np.where(generator.random(shape) < 0.5, 0.0, x),
        "mostly_zero": np.where(generator.random(shape) < 0.95, 0.0, x),
        "zero": np.zeros(shape),
        "constant": np.ones(shape),
    }[kind]


@st.composite
def networks(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """A few tensors, of very different sizes and scales, some of them equal to another."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    out: dict[str, torch.Tensor] = {}
    for i in range(draw(st.integers(1, 5))):
        # Powers of two: equal shares of equal sums stay equal.
        scale = 2.0 ** draw(st.integers(-20, 20))
        shape = draw(st.sampled_from([(1,), (3, 2), (50,), (9, 30), (700,), (20, 15, 3, 3)]))
        out[f"t{i}"] = torch.tensor(scale * _values(draw(st.sampled_from(KINDS)), shape, generator)).float()
        if draw(st.integers(0, 4)) == 0:
            out[f"again{i}"] = out[f"t{i}"].clone()
    return out


def _brackets_on_small_tensors(sample=16, errors=2.0):
    return mock.patch.multiple(tail_share, _SAMPLE=sample, _SAMPLE_SHARE=1 / 16, _STANDARD_ERRORS=errors)


def _scores(weights):
    return {name: Lamp().score(Evidence(target=None, weight=w)) for name, w in weights.items()}


def _never():
    raise AssertionError("scores were computed")


def _same(weights, sparsity, **rule):
    """The masks, after a comparison with those of the complete scores."""
    got = select_tail_shares(TailShares(weights, _never), sparsity, **rule)
    complete = select(_scores(weights), sparsity, scope="global", **rule)
    assert list(got) == list(complete)
    for name, mask in got.items():
        assert mask.shape == weights[name].shape
        assert torch.equal(mask, complete[name]), name
    return got


@given(
    networks(),
    sparsities,
    roundings,
    st.sampled_from([0, 1, 2, 40]),
    st.sampled_from([1, 4, 16]),
    st.sampled_from([0.01, 0.5, 2.0, 6.0]),
)
@settings(max_examples=500, deadline=None)
def test_masks_are_those_of_the_complete_scores(weights, sparsity, rounding, min_keep, sample, errors):
    small_chunks = mock.patch.object(cells, "CHUNK", 256), mock.patch.object(tail_share, "CHUNK", 256)
    with _brackets_on_small_tensors(sample, errors), small_chunks[0], small_chunks[1]:
        _same(weights, sparsity, rounding=rounding, min_keep=min_keep)
    _same(weights, sparsity, rounding=rounding, min_keep=min_keep)


@given(networks(), sparsities, sparsities, st.integers(0, 2))
@settings(max_examples=100, deadline=None)
def test_masks_are_nested_over_sparsity(weights, a, b, min_keep):
    with _brackets_on_small_tensors():
        less, more = (select_tail_shares(TailShares(weights, _never), s, min_keep=min_keep) for s in sorted((a, b)))
    assert all(bool((~more[n] | less[n]).all()) for n in less)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", [0.0, 0.02, 0.5, 0.9, 0.999])
def test_large_tensors(kind, sparsity):
    generator = np.random.default_rng(1)
    shapes = [(64, 3, 7, 7), (128, 128, 3, 3), (256, 64), (1000, 300)]
    scales = [1.0, 0.25, 4.0, 0.5]
    weights = {
        f"{i}": torch.from_numpy(scale * _values(kind, shape, generator)).float()
        for i, (scale, shape) in enumerate(zip(scales, shapes, strict=True))
    }
    _same(weights, sparsity, min_keep=1)


def _looked_at(monkeypatch, weights, sparsity, errors):
    """(tensor, whether its bracket was all of it, how many weights were inside) for every look at a tensor."""
    looks, original = [], tail_share._middle

    def spy(array, low, high, min_keep):
        middle = original(array, low, high, min_keep)
        looks.append((array.name, (low, high) == (0.0, math.inf), middle.magnitudes.size))
        return middle

    monkeypatch.setattr(tail_share, "_middle", spy)
    monkeypatch.setattr(tail_share, "_STANDARD_ERRORS", errors)
    _same(weights, sparsity)
    return looks


@pytest.mark.parametrize("sparsity", [0.3, 0.9, 0.99])
def test_a_few_percent_are_sorted(monkeypatch, sparsity):
    generator = np.random.default_rng(2)
    weights = {n: torch.from_numpy(generator.normal(size=1_000_000)).float() for n in "ab"}
    weights["b"] *= 3
    looks = _looked_at(monkeypatch, weights, sparsity, tail_share._STANDARD_ERRORS)
    assert [(n, whole) for n, whole, _ in looks] == [("a", False), ("b", False)]
    assert sum(inside for *_, inside in looks) < 0.15 * 2_000_000


def test_a_tensor_whose_bracket_misses_is_sorted_whole(monkeypatch):
    generator = np.random.default_rng(3)
    weights = {n: torch.from_numpy(generator.normal(size=100_000)).float() for n in "abc"}
    looks = _looked_at(monkeypatch, weights, 0.8, 0.2)
    first, again = looks[:3], looks[3:]
    assert not any(whole for _, whole, _ in first)
    assert again
    assert all(whole for _, whole, _ in again)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("sparsity", [0.2, 0.7, 0.97])
def test_every_float_type_and_non_contiguous_weights(dtype, sparsity):
    generator = torch.Generator().manual_seed(4)
    weights = {n: torch.randn(60, 50, generator=generator, dtype=torch.float64).to(dtype) for n in "ab"}
    weights["c"] = torch.randn(80, 90, generator=generator, dtype=torch.float64).to(dtype).t()[::2, 1::2]
    weights["d"] = torch.randn(30, 9, generator=generator).requires_grad_()
    with _brackets_on_small_tensors():
        _same(weights, sparsity, min_keep=1)


@pytest.mark.parametrize("size", [20, 30_000])
@pytest.mark.parametrize("sparsity", [0.0, 0.9])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", ["first", "largest", "smallest"])
def test_what_is_not_finite_is_refused(size, sparsity, bad, at):
    x = torch.randn(size, generator=torch.Generator().manual_seed(5))
    index = {"first": 0, "largest": int(x.abs().argmax()), "smallest": int(x.abs().argmin())}[at]
    x[index] = bad
    weights = {"fine": torch.ones(10), "w": x}
    with _brackets_on_small_tensors(), pytest.raises(DataError, match=r'scores of "w" are not numbers') as raised:
        select_tail_shares(TailShares(weights, lambda: _scores(weights)), sparsity)
    if math.isnan(bad):
        assert f"flat index {index} of {size}" in str(raised.value)


def test_bad_sparsity_and_no_weights():
    with pytest.raises(UsageError, match=r"\[0, 1\), got 1"):
        select_tail_shares(TailShares({"w": torch.ones(3)}, _never), 1.0)
    assert select_tail_shares(TailShares({}, dict), 0.5) == {}
    empty = TailShares({"w": torch.ones(0), "v": torch.ones(4)}, _never)
    assert {n: k.tolist() for n, k in select_tail_shares(empty, 0.5).items()} == {
        "w": [],
        "v": [False, False, True, True],
    }


def test_scores_are_computed_once_and_only_when_looked_at():
    calls = []
    shares = TailShares({"w": torch.ones(2)}, lambda: calls.append(1) or {"w": torch.zeros(2)})
    assert list(shares) == ["w"]
    assert len(shares) == 1
    assert "w" in shares.weights
    assert not calls
    assert shares["w"].tolist() == shares["w"].tolist() == [0.0, 0.0]
    assert calls == [1]
