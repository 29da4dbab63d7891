"""Masks of several seeds, lost layers, and the spread of a number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from secateur.analysis.spread import spread
from secateur.analysis.stability import LayerCollapse, collapsed_layers, mask_overlap
from secateur.core.masks import Masks
from secateur.core.statistics import mean_interval
from secateur.errors import NoEffectError, UsageError


def _masks(seed, kept=0.4):
    generator = np.random.default_rng(seed)
    return Masks({n: torch.tensor(generator.random(s) < kept) for n, s in {"a": (6, 5), "b": (4, 3, 2)}.items()})


def _jaccard(one, other):
    one, other = one.ravel(), other.ravel()
    return (one & other).sum() / (one | other).sum()


def test_overlap_is_jaccards_of_what_is_kept_and_of_what_is_removed():
    masks = [_masks(seed) for seed in range(3)]
    found = mask_overlap(masks)
    assert found.pairs == ((0, 1), (0, 2), (1, 2))
    flat = [np.concatenate([m[n].numpy().ravel() for n in m]) for m in masks]
    assert found.overall.kept == pytest.approx([_jaccard(flat[i], flat[j]) for i, j in found.pairs])
    assert found.overall.removed == pytest.approx([_jaccard(~flat[i], ~flat[j]) for i, j in found.pairs])
    for name in ("a", "b"):
        parts = [m[name].numpy() for m in masks]
        layer = found.layers[name]
        assert layer.kept == pytest.approx([_jaccard(parts[i], parts[j]) for i, j in found.pairs])
        assert layer.removed == pytest.approx([_jaccard(~parts[i], ~parts[j]) for i, j in found.pairs])
        assert layer.mean_kept == pytest.approx(np.mean(layer.kept))
        assert layer.mean_removed == pytest.approx(np.mean(layer.removed))


def test_overlap_of_equals_is_one_and_of_opposites_zero():
    mask = _masks(0)
    same = mask_overlap([mask, mask]).overall
    assert (same.kept, same.removed) == ((1.0,), (1.0,))
    opposite = mask_overlap([mask, Masks({n: ~m for n, m in mask.items()})]).overall
    assert (opposite.kept, opposite.removed) == ((0.0,), (0.0,))


def test_overlap_refuses():
    with pytest.raises(UsageError, match="got 1 masks"):
        mask_overlap([_masks(0)])
    with pytest.raises(UsageError, match='masks 0 and 1 differ in "b"'):
        mask_overlap([_masks(0), Masks({"a": _masks(0)["a"]})])
    with pytest.raises(UsageError, match='masks 0 and 1 differ in "a"'):
        mask_overlap([Masks({"a": torch.ones(2, dtype=torch.bool)}), Masks({"a": torch.ones(3, dtype=torch.bool)})])


def test_collapse_names_empty_and_thin_layers():
    masks = Masks(
        {
            "full": torch.ones(10, dtype=torch.bool),
            "thin": torch.arange(10) < 1,
            "edge": torch.arange(10) < 2,
            "empty": torch.zeros(10, dtype=torch.bool),
        }
    )
    empty = LayerCollapse("empty", 0, 10, "empty")
    assert collapsed_layers(masks) == [empty]
    assert collapsed_layers(masks, below=0.2) == [LayerCollapse("thin", 1, 10, "thin"), empty]
    assert collapsed_layers(Masks({"full": masks["full"]}), below=1.0) == []


def test_collapse_refuses():
    for below in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="share in"):
            collapsed_layers(_masks(0), below=below)
    with pytest.raises(NoEffectError, match="empty"):
        collapsed_layers(Masks({}))


def test_spread_of_shares_has_the_interval_of_means():
    values = [0.9, 0.92, 0.88, 0.95]
    found = spread(values, count=360)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.deviation == pytest.approx(np.std(values, ddof=1))
    assert (found.low, found.high) == (0.88, 0.95)
    assert found.interval == mean_interval(values, 360)


def test_spread_of_other_numbers_is_not_cut_off_at_one():
    values = [8.7, 8.4, 9.3, -1.0]
    found = spread(values, shares=False).interval
    half = stats.t.ppf(0.975, 3) * np.std(values, ddof=1) / 2
    assert (found.low, found.high) == pytest.approx((np.mean(values) - half, np.mean(values) + half))
    assert found.method == "t over seeds"
    assert found.p is None


@pytest.mark.parametrize("shares", [True, False])
def test_one_seed_and_no_spread_have_no_interval(shares):
    one, flat = spread([0.5], shares=shares), spread([0.5, 0.5], shares=shares)
    assert (one.deviation, one.interval.low, one.interval.method) == (None, None, "no interval from one seed")
    assert (flat.deviation, flat.interval.low) == (0.0, None)
    assert flat.interval.method.startswith("no interval: no spread")


def test_spread_refuses():
    for values in ([], [0.5, float("nan")], [[0.5]]):
        with pytest.raises(UsageError, match="at least one number"):
            spread(values)
    with pytest.raises(UsageError, match="shares=False"):
        spread([0.5, 1.5])
    with pytest.raises(UsageError, match="count is for shares"):
        spread([2.0, 1.5], shares=False, count=10)
