"""Gradual pruning against its formulas, written again in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from secateur.core.duration import Progress
from secateur.regularizers.gradual_pruning import GradualPruning

SHAPES = {
    "linear": lambda t: t,
    "cosine": lambda t: (1 - np.cos(np.pi * t)) / 2,
    "cubic": lambda t: 1 - (1 - t) ** 3,
}


@pytest.mark.parametrize("ramp", SHAPES)
def test_sparsity_follows_the_ramp_in_equal_steps_of_time(ramp):
    spec = GradualPruning(0.8, 0.2, ramp, start=0.1, end=0.6, updates=5)
    for t in np.linspace(0, 1, 97):
        done = np.clip(np.floor((t - 0.1) / 0.1 + 1e-9), 0, 5) / 5
        expected = 0.0 if t < 0.1 else 0.2 + 0.6 * SHAPES[ramp](done)
        assert spec.sparsity_at(t) == pytest.approx(expected)


def test_what_goes_is_what_numpy_says():
    layer = nn.Linear(20, 6, bias=False)
    start = layer.weight.detach().numpy().copy()
    attachment = GradualPruning(0.5, ramp="linear", end=1.0, updates=4).attach(layer)
    for step in range(1, 9):
        attachment.after_step(Progress(step, 8, 8))
        count = int(0.5 * (step // 2) / 4 * start.size + 1e-9)
        kept = np.ones(start.size, dtype=bool)
        kept[np.argsort(np.abs(start).ravel(), kind="stable")[:count]] = False
        np.testing.assert_array_equal(layer.weight.detach().numpy(), np.where(kept.reshape(start.shape), start, 0))
    masks = attachment.finalize()
    assert masks.sparsity == 0.5
    assert torch.equal(masks["weight"], layer.weight != 0)
