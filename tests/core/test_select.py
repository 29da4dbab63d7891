"""Selection: exact counts, nesting, ties, scopes; against a plain sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.select import prune_count, select
from secateur.errors import DataError, UsageError

scopes = st.sampled_from(["tensor", "global"])
roundings = st.sampled_from(["prune_floor", "keep_floor", "nearest"])
sparsities = st.floats(0, 0.999)


@st.composite
def scores(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """A few tensors of any shape; sometimes with many equal values."""
    values = draw(st.sampled_from(["normal", "quantized", "constant"]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    out = {}
    for i in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
        x = generator.normal(size=shape)
        x = {"normal": x, "quantized": np.round(x), "constant": np.ones(shape)}[values]
        out[f"t{i}"] = torch.tensor(x, dtype=torch.float32)
    return out


@given(scores(), sparsities, scopes, roundings, st.sampled_from(["index", "random"]))
@settings(max_examples=150, deadline=None)
def test_asked_is_got(given_scores, sparsity, scope, rounding, ties):
    keep = select(given_scores, sparsity, scope=scope, rounding=rounding, ties=ties)
    sizes = {n: s.numel() for n, s in given_scores.items()}
    if scope == "global":
        assert sum(int((~k).sum()) for k in keep.values()) == prune_count(sum(sizes.values()), sparsity, rounding)
    else:
        for name, k in keep.items():
            assert int((~k).sum()) == prune_count(sizes[name], sparsity, rounding)
    for name, k in keep.items():
        assert k.shape == given_scores[name].shape
        if scope == "tensor" and k.any() and (~k).any():
            assert given_scores[name][~k].max() <= given_scores[name][k].min()


@given(scores(), sparsities, sparsities, scopes, st.integers(0, 2), st.sampled_from(["index", "random"]))
@settings(max_examples=150, deadline=None)
def test_masks_are_nested_over_sparsity(given_scores, a, b, scope, min_keep, ties):
    low, high = sorted((a, b))
    kwargs = {"scope": scope, "min_keep": min_keep, "ties": ties, "seed": 3}
    less, more = select(given_scores, low, **kwargs), select(given_scores, high, **kwargs)
    assert all(bool((~more[n] | less[n]).all()) for n in less)


@given(scores(), sparsities, st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_min_keep_holds_and_the_global_total_stays_exact(given_scores, sparsity, min_keep):
    keep = select(given_scores, sparsity, scope="global", min_keep=min_keep)
    total = sum(s.numel() for s in given_scores.values())
    safe = sum(min(min_keep, s.numel()) for s in given_scores.values())
    assert all(int(k.sum()) >= min(min_keep, k.numel()) for k in keep.values())
    assert sum(int((~k).sum()) for k in keep.values()) == min(prune_count(total, sparsity), total - safe)


@pytest.mark.parametrize("fill", ["normal", "half_zero", "quantized", "sorted", "constant"])
@pytest.mark.parametrize("sparsity", [0.01, 0.5, 0.9, 0.999])
def test_large_sets_equal_a_full_stable_sort(fill, sparsity):
    generator = np.random.default_rng(1)
    x = generator.normal(size=600_000).astype(np.float32)
    x = {
        "normal": x,
        "half_zero": np.where(generator.random(x.size) < 0.5, 0, x).astype(np.float32),
        "quantized": np.round(x * 4).astype(np.float32),
        "sorted": np.sort(x),
        "constant": np.ones_like(x),
    }[fill]
    parts = {"a": torch.from_numpy(x[:250_000]), "b": torch.from_numpy(x[250_000:])}
    keep = select(parts, sparsity, scope="global", absolute=True)
    expected = np.ones(x.size, bool)
    expected[np.argsort(np.abs(x), kind="stable")[: prune_count(x.size, sparsity)]] = False
    assert np.array_equal(torch.cat([keep["a"], keep["b"]]).numpy(), expected)


def test_column_scope_prunes_each_row_exactly():
    x = torch.tensor([[3.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    keep = select({"w": x}, 0.5, scope="column")["w"]
    assert keep.tolist() == [[True, False, True, False], [False, False, True, True]]


def test_random_ties_depend_on_the_seed_only():
    x = {"w": torch.zeros(1000)}
    first, again, other = (select(x, 0.5, ties="random", seed=s)["w"] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_type_and_non_contiguous_scores(dtype):
    x = torch.arange(12).reshape(3, 4).to(dtype).t()
    keep = select({"w": x}, 0.5)["w"]
    assert torch.equal(keep, x >= 6)


def test_bad_input_is_refused_in_one_line():
    with pytest.raises(UsageError, match=r"\[0, 1\), got 1"):
        select({"w": torch.ones(3)}, 1.0)
    with pytest.raises(DataError, match=r'scores of "w".*flat index 1'):
        select({"w": torch.tensor([1.0, float("nan")])}, 0.5)
    with pytest.raises(UsageError, match=r'unknown scope "glob".*global'):
        select({"w": torch.ones(3)}, 0.5, scope="glob")


@given(
    st.integers(1, 6),
    st.integers(1, 12),
    sparsities,
    sparsities,
    st.integers(0, 2),
    st.sampled_from(["index", "random"]),
)
@settings(max_examples=100, deadline=None)
def test_columns_are_exact_and_nested(rows, width, a, b, min_keep, ties):
    generator = np.random.default_rng(rows * 100 + width)
    x = {"w": torch.tensor(np.round(generator.normal(size=(rows, width))))}
    kwargs = {"scope": "column", "min_keep": min_keep, "ties": ties, "seed": 5}
    less, more = (select(x, s, **kwargs)["w"] for s in sorted((a, b)))
    assert bool((less | ~more).all())
    for keep, sparsity in ((less, min(a, b)), (more, max(a, b))):
        expected = min(prune_count(width, sparsity), width - min(min_keep, width))
        assert (~keep).sum(1).tolist() == [expected] * rows
        for row in range(rows):
            if expected and expected < width:
                assert x["w"][row][~keep[row]].max() <= x["w"][row][keep[row]].min()


@pytest.mark.parametrize("size", [10, 300_000])
def test_infinite_scores_and_mixed_precision_are_ordered(size):
    x = torch.arange(size, dtype=torch.float32)
    x[3], x[7] = float("-inf"), float("inf")
    keep = select({"a": x, "b": x.double()[: size // 2]}, 2 / (size + size // 2), scope="global")
    gone = [(n, int(i)) for n in keep for i in (~keep[n]).nonzero()]
    assert gone == [("a", 3), ("b", 3)]


def test_one_sparsity_for_each_tensor():
    x = {"a": torch.arange(10.0), "b": torch.arange(10.0)}
    keep = select(x, {"a": 0.2, "b": 0.7})
    assert [int(k.sum()) for k in keep.values()] == [8, 3]
    with pytest.raises(UsageError, match="takes one sparsity"):
        select(x, {"a": 0.2, "b": 0.7}, scope="global")
