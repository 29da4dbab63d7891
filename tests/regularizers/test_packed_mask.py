"""Masks of a bit a weight: the same product, to the bit, as with the numbers themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.regularizers import candidates, packed_mask
from secateur.regularizers.candidates import all_but_lowest
from secateur.regularizers.packed_mask import PackedMask, pack, unpack

INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
SHAPES = [(1,), (7,), (5, 3), (64, 9), (33, 5, 3, 3), (16, 8, 2), (3, 0), (0, 4)]


def _same_bits(a, b):
    # Signs of zeros and kinds of NaN included.
    return torch.equal(a.contiguous().view(INTEGERS[a.element_size()]), b.contiguous().view(INTEGERS[b.element_size()]))


def _random(shape, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return torch.randn(shape).to(dtype), torch.rand(shape) < 0.5


@given(st.lists(st.booleans(), max_size=40))
@settings(deadline=None, max_examples=30)
def test_bits_come_back(decisions):
    kept = torch.tensor(decisions, dtype=torch.bool)
    packed = pack(kept)
    assert len(packed) == -(-len(decisions) // 8)
    assert torch.equal(unpack(packed, len(kept)), kept.to(torch.uint8))
    # What other devices do in place of numpy.
    assert torch.equal(packed_mask._pack_on_device(kept), packed)
    assert torch.equal(packed_mask._unpack_on_device(packed, len(kept)), kept.to(torch.uint8))


@pytest.mark.parametrize("piece", [8, 50, 1 << 17])
@pytest.mark.parametrize("factor", [1.0, 2.0, 1 / 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_is_that_of_the_numbers(shape, dtype, factor, piece, monkeypatch):
    monkeypatch.setattr(packed_mask, "_PIECE", piece)
    tensor, kept = _random(shape, dtype)
    if tensor.numel() > 4:
        tensor.view(-1)[:4] = torch.tensor([-0.0, float("nan"), float("inf"), -float("inf")])
    factor = float(torch.tensor(factor, dtype=dtype))
    numbers = kept.to(dtype) * factor
    mask = PackedMask(kept, factor)
    assert _same_bits(mask.dense(dtype), numbers)
    expected = tensor * numbers
    mask.multiply_(tensor)
    assert torch.equal(tensor.isnan(), expected.isnan())
    assert _same_bits(tensor.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("piece", [8, 1 << 17])
def test_layouts_are_multiplied_where_they_lie(piece, monkeypatch):
    monkeypatch.setattr(packed_mask, "_PIECE", piece)
    tensor, kept = _random((24, 6, 3, 3))
    for one in (tensor.clone(memory_format=torch.channels_last), tensor.transpose(0, 1).contiguous().transpose(0, 1)):
        strides, expected = one.stride(), one * kept
        PackedMask(kept).multiply_(one)
        assert one.stride() == strides
        assert torch.equal(one, expected)


def test_a_mask_takes_a_bit_a_weight():
    assert PackedMask(torch.ones(100, 81, dtype=torch.bool))._bits.nbytes == -(-8100 // 8)


@pytest.mark.parametrize("piece", [1, 64, 1 << 16])
@pytest.mark.parametrize("shape", [(0, 5), (1, 40), (9, 33), (50, 7)])
def test_the_lowest_are_found_whatever_is_looked_at_together(shape, piece, monkeypatch):
    monkeypatch.setattr(candidates, "_PIECE", piece)
    rng = np.random.default_rng(1)
    # Rounded, so that ties abound.
    values = torch.from_numpy(rng.normal(size=shape).round(1).astype(np.float32))
    for k in (0, 1, shape[1] // 2, shape[1]):
        order = torch.sort(values.abs(), dim=1, stable=True).indices[:, :k]
        expected = torch.ones(shape, dtype=torch.bool).scatter_(1, order, False)
        assert torch.equal(all_but_lowest(values, k), expected)
