"""Sizes of the thesis's L2 baseline: counts, parameters and pruned ratio at all nine rates, from a real cut."""

from __future__ import annotations

import math

import pytest
import torch

from secateur.core.targets import find_targets
from secateur.lab.models.small import thesis_cnn
from secateur.surgery import cut_, make_plan, trace_groups
from secateur.variants import UnitsByCriterion, Workbench

NAMES = ["conv1.weight", "conv2.weight", "conv3.weight", "fc1.weight"]
A1 = {
    0.1: ([58, 116, 231, 461], 27_570_464, 0.1875),
    0.2: ([52, 103, 205, 410], 21_761_323, 0.3587),
    0.3: ([45, 90, 180, 359], 16_730_459, 0.5069),
    0.4: ([39, 77, 154, 308], 12_281_062, 0.6381),
    0.5: ([32, 64, 128, 256], 8_484_682, 0.7499),
    0.6: ([26, 52, 103, 205], 5_468_960, 0.8388),
    0.7: ([20, 39, 77, 154], 3_072_075, 0.9095),
    0.8: ([13, 26, 52, 103], 1_387_931, 0.9591),
    0.9: ([7, 13, 26, 52], 350_790, 0.9897),
}


@pytest.fixture(scope="module")
def choosing():
    """The thesis network for images of 8 x 8: as many units in every layer, few weights."""
    torch.manual_seed(0)
    network = thesis_cnn(10, (3, 8, 8))
    return Workbench(network, find_targets(network, exclude=["@last"]))


@pytest.fixture(scope="module")
def full():
    """The whole network without memory for it, and what goes together in it."""
    with torch.device("meta"):
        network = thesis_cnn(10, (3, 128, 128))
        return network, trace_groups(network, torch.zeros(1, 3, 128, 128))


@pytest.mark.parametrize("rate", A1)
def test_a1_counts_parameters_and_ratio_of_the_cut(rate, choosing, full):
    widths, parameters, pruned = A1[rate]
    kept = UnitsByCriterion(rate).kept(choosing)
    assert [int(kept[name].sum()) for name in NAMES] == widths
    network, groups = full
    with torch.device("meta"):
        small = thesis_cnn(10, (3, 128, 128))
    report = cut_(small, make_plan(network, groups, kept))
    assert report.parameters_before == 33_930_890
    assert report.parameters_after == parameters
    assert round(1 - report.parameters_after / report.parameters_before, 4) == pruned
    assert small.fc1.in_features == 16 * 16 * widths[2]


@pytest.mark.parametrize("rate", A1)
def test_a1_the_units_that_go_have_the_lowest_l2_norm(rate, choosing):
    kept = UnitsByCriterion(rate).kept(choosing)
    for name, weight in choosing.targets.tensors(choosing.network).items():
        norms = weight.detach().double().flatten(1).square().sum(1).sqrt()
        order = norms.argsort(stable=True)
        gone = math.floor(len(norms) * rate + 1e-9)
        expected = torch.ones(len(norms), dtype=torch.bool)
        expected[order[:gone]] = False
        assert torch.equal(kept[name], expected)
