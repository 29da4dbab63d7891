"""How sparsity is shared out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.core.allocation import allocate, erk
from secateur.core.targets import find_targets
from secateur.errors import UnknownNameError, UsageError

networks = st.lists(
    st.builds(
        lambda kind, i, o: nn.Linear(i, o) if kind else nn.Conv2d(i, o, 3),
        st.booleans(),
        st.integers(1, 40),
        st.integers(1, 40),
    ),
    min_size=1,
    max_size=5,
).map(lambda layers: nn.ModuleList(layers))


@given(networks, st.floats(0, 0.99))
@settings(max_examples=150, deadline=None)
def test_erk_keeps_the_total_and_stays_in_range(network, sparsity):
    targets = find_targets(network)
    shares = erk(targets, sparsity)
    assert all(0 <= s < 1 for s in shares.values())
    kept = sum((1 - shares[t.name]) * t.numel for t in targets)
    total = sum(t.numel for t in targets)
    assert kept == pytest.approx((1 - sparsity) * total, rel=1e-9)
    # Where no density is capped, densities follow (sum of dimensions) / (product of dimensions).
    free = [t for t in targets if shares[t.name] > 0]
    ratios = [(1 - shares[t.name]) / (sum(t.shape) / t.numel) for t in free]
    assert all(r == pytest.approx(ratios[0], rel=1e-6) for r in ratios)
    for t in targets:
        if shares[t.name] == 0 and ratios:
            assert ratios[0] * sum(t.shape) / t.numel >= 1 - 1e-9


def test_erk_by_hand():
    network = nn.Sequential(nn.Linear(100, 50), nn.Linear(50, 2))
    # Ratios 150/5000 and 52/100; at 90 % the second is capped (densities x e: e * 0.52 > 1 for e = 510/202).
    shares = erk(find_targets(network), 0.9)
    assert shares["1.weight"] == 0.0
    assert shares["0.weight"] == pytest.approx(1 - (510 - 100) / 5000)


def test_uniform_and_given():
    targets = find_targets(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)))
    assert allocate(targets, 0.5) == {"0.weight": 0.5, "1.weight": 0.5}
    given_ = {"0.weight": 0.1, "1.weight": 0.9}
    assert allocate(targets, 0.5, given_) == given_


@pytest.mark.parametrize(
    ("allocation", "message"),
    [
        ({"0.weight": 0.1}, r"gives no sparsity for \['1.weight'\]"),
        ({"0.weight": 0.1, "1.weight": 0.1, "2.weight": 0.1}, "target in the allocation"),
        ({"0.weight": 0.1, "1.weight": 1.0}, r"\[0, 1\)"),
    ],
)
def test_bad_allocations(allocation, message):
    targets = find_targets(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)))
    with pytest.raises(UsageError, match=message):
        allocate(targets, 0.5, allocation)
    with pytest.raises(UnknownNameError, match='"erg"; nearest: erk'):
        allocate(targets, 0.5, "erg")
    with pytest.raises(UsageError):
        erk(targets, 1.0)
