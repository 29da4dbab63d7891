"""LAMP keeps the promise that its masks are found by."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from secateur.criteria.base import Evidence
from secateur.criteria.lamp import Lamp
from secateur.testing import check_criterion


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("seed", range(3))
def test_scores_rise_with_magnitude_then_index(dtype, seed):
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(seed)).to(dtype)
    weight[:, ::3] = weight[:, ::3].round()
    scores = Lamp().score(Evidence(target=None, weight=weight)).flatten().numpy()
    by_rank = np.argsort(weight.float().abs().flatten().numpy(), kind="stable")
    assert scores.dtype == np.float64
    assert (np.argsort(scores, kind="stable") == by_rank).all()
    not_zero = by_rank[scores[by_rank] > 0]
    assert (np.diff(scores[not_zero]) > 0).all()


def test_contract():
    assert Lamp.tail_share
    assert not Lamp.absolute
    check_criterion(Lamp())
