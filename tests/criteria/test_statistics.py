"""Streamed activation statistics against their definitions, at the edges of their shortcuts."""

from __future__ import annotations

import pytest
import torch

from secateur.criteria.statistics import ActivationStatistics

WANTED = ("mean_abs", "variance", "zero_fraction")


def _check(batches, unit_axis, nonnegative=False, rtol=1e-5):
    found = ActivationStatistics(WANTED)
    for batch in batches:
        found.update(batch, unit_axis, nonnegative)
    a = torch.cat([b.movedim(unit_axis, 0).flatten(1) for b in batches], 1).double()
    torch.testing.assert_close(found.mean_abs, a.abs().mean(1), rtol=rtol, atol=0)
    torch.testing.assert_close(found.variance, a.var(1), rtol=rtol, atol=1e-7)
    torch.testing.assert_close(found.zero_fraction, (a == 0).double().mean(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("positions", [1, 7, 8, 12, 64, 2032, 2040, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_statistics_for_any_number_of_positions(positions, dtype):
    generator = torch.Generator().manual_seed(positions)
    batches = [torch.randn(n, 3, positions, generator=generator).relu().to(dtype) for n in (3, 2)]
    _check(batches, unit_axis=1, nonnegative=True)


@pytest.mark.parametrize("positions", [8, 2040, 2048])
def test_units_without_zeros_and_units_of_zeros(positions):
    batch = torch.ones(2, 3, positions)
    batch[:, 1] = 0.0
    batch[:, 2, -1] = -0.0
    found = ActivationStatistics(["zero_fraction"])
    for _ in range(2):
        found.update(batch, 1)
    assert found.zero_fraction.tolist() == pytest.approx([0.0, 1.0, 1 / positions], abs=1e-12)


def test_only_exact_zeros_count():
    batch = torch.full((1, 1, 8), float("nan"))
    batch[0, 0, 1:4] = torch.tensor([0.0, 1e-45, -float("inf")])
    found = ActivationStatistics(["zero_fraction"])
    found.update(batch, 1)
    assert found.zero_fraction.tolist() == pytest.approx([1 / 8])


def test_any_memory_layout():
    x = torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(0)).relu()
    _check([x, x.to(memory_format=torch.channels_last), x[:, :, ::2], x.transpose(2, 3), x[1:]], unit_axis=1)
    _check([x.transpose(0, 1)[:, :4]], unit_axis=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_without_positions_add_up(dtype):
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(0), dtype=dtype).relu()
    kept = x.clone()
    for axis in (1, -1):
        _check([x, x[:4], x[4:], x[:1]], unit_axis=axis, nonnegative=True)
    assert torch.equal(x, kept)
