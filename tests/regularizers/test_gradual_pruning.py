"""Gradual pruning in a training loop: nothing comes back, units go whole, bad settings are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.core.duration import Progress
from secateur.core.targets import find_targets
from secateur.errors import UnknownNameError, UsageError
from secateur.regularizers.gradual_pruning import GradualPruning
from secateur.testing import check_regularizer


def _train(spec, optimizer, steps=20):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))
    steered = optimizer(network.parameters())
    counts = []
    with spec.attach(network, find_targets(network, exclude=["@last"])) as attachment:
        for step in range(steps):
            steered.zero_grad()
            nn.functional.cross_entropy(network(torch.randn(16, 8)), torch.randint(3, (16,))).backward()
            before = network[0].weight.detach() == 0
            steered.step()
            attachment.after_step(Progress(step + 1, steps, 5))
            after = network[0].weight.detach() == 0
            assert bool((after | ~before).all()), "a removed weight came back"
            counts.append(int(after.sum()))
        masks = attachment.finalize()
    return network, masks, counts


@pytest.mark.parametrize(
    "optimizer",
    [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1), lambda p: torch.optim.AdamW(p, 0.01)],
)
@pytest.mark.parametrize("granularity", ["weight", "unit"])
def test_nothing_comes_back(optimizer, granularity):
    network, masks, counts = _train(GradualPruning(0.75, granularity=granularity), optimizer)
    assert counts == sorted(counts)
    assert counts[-1] == 72 == int((~masks["0.weight"]).sum())
    assert torch.equal(network[0].weight != 0, masks["0.weight"])
    if granularity == "unit":
        assert {int(row.sum()) for row in masks["0.weight"]} == {0, 8}


def test_finalize_reaches_the_sparsity_even_if_the_run_was_cut_short():
    network = nn.Linear(10, 10)
    assert GradualPruning(0.5).attach(network).finalize().sparsity == 0.5


@pytest.mark.parametrize("settings", [{}, {"granularity": "unit", "scope": "global", "ramp": "linear"}])
def test_the_contract_holds(settings):
    check_regularizer(GradualPruning(0.5, end=0.5, updates=2, **settings), compiled=False)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"sparsity": 1.0}, UsageError, "initial <= sparsity < 1"),
        ({"initial": 0.95}, UsageError, "initial <= sparsity < 1"),
        ({"start": 0.8}, UsageError, "start < end"),
        ({"updates": 0}, UsageError, "at least 1"),
        ({"ramp": "cubik"}, UnknownNameError, "cubic"),
        ({"scope": "column"}, UnknownNameError, "global"),
    ],
)
def test_bad_settings_are_refused(settings, error, words):
    with pytest.raises(error, match=words):
        GradualPruning(**settings)
