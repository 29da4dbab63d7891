"""The stream that noise is drawn from: its numbers, its state, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch

from secateur.regularizers.stream import NoiseStream
from secateur.testing.snapshots import generators

DRAWS = [
    lambda s: s.normal((3, 5)),
    lambda s: s.bernoulli((7,), 0.3),
    lambda s: s.uniform((9,)),
    lambda s: s.normal((1,)),
    lambda s: s.bernoulli((2, 3), torch.tensor([0.2, 0.5, 0.9])),
    lambda s: s.uniform((1,)),
    lambda s: s.normal((4,)),
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("before", range(len(DRAWS)))
def test_saved_after_any_call_it_goes_on_bitwise(before, device):
    stream, other = NoiseStream(4, device), NoiseStream(99, device)
    for draw in DRAWS[:before]:
        draw(stream)
    saved = stream.state_dict()
    # Half of a word may be left over from odd counts, in the state and in what the other one drew before.
    other.uniform((1,))
    other.load_state_dict(saved)
    for draw in DRAWS[before:]:
        assert torch.equal(draw(stream), draw(other))
    assert torch.equal(stream.state_dict()["generator"], other.state_dict()["generator"])


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_depend_on_the_seed_and_on_nothing_else(device):
    untouched = generators()
    for draw in ("normal", "uniform"):
        first, again, other = (getattr(NoiseStream(seed, device), draw)((4, 3)) for seed in (1, 1, 2))
        assert first.shape == (4, 3)
        assert first.dtype == torch.float32
        assert first.device.type == device
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        stream = NoiseStream(1, device)
        assert not torch.equal(getattr(stream, draw)((4, 3)), getattr(stream, draw)((4, 3)))
    assert generators() == untouched


@pytest.mark.parametrize("device", DEVICES)
def test_moments_are_those_of_the_distribution(device):
    stream, n = NoiseStream(3, device), 200_000
    normal, uniform = stream.normal((n,)).double(), stream.uniform((n,)).double()
    # Five standard errors: the square roots of the moments' variances over n.
    bound = 5 / n**0.5
    assert abs(normal.mean()) < bound
    assert abs(normal.square().mean() - 1) < bound * 2**0.5
    assert abs(normal.pow(4).mean() - 3) < bound * 96**0.5
    assert abs(uniform.mean() - 0.5) < bound * 12**-0.5
    assert abs(uniform.square().mean() - 1 / 3) < bound * (4 / 45) ** 0.5
    assert 0 <= uniform.min() < 1e-3
    assert 1 - 1e-3 < uniform.max() < 1


def test_decisions_are_those_that_older_files_go_on_with():
    drawn = NoiseStream(0).bernoulli((16,), 0.5).int().tolist()
    assert drawn == [1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 0, 1, 1, 0, 1, 1]
