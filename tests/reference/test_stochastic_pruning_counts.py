"""How many weights stochastic pruning keeps of each network: the counts its paper and code agree on."""

from __future__ import annotations

import pytest
import torch

from secateur.core.select import prune_count
from secateur.core.targets import find_targets
from secateur.lab.explore.recipe import ExploreRecipe
from secateur.lab.models import build_model


@pytest.mark.parametrize(
    ("name", "prunable", "sparsity", "kept"),
    [
        ("resnet18", 11_157_504, 0.9, 1_115_750),
        ("resnet50", 23_445_504, 0.95, 1_172_275),
        ("vgg19", 20_017_152, 0.944, 1_120_961),
    ],
)
def test_the_preset_prunes_the_papers_weights(name: str, prunable: int, sparsity: float, kept: int) -> None:
    section = {"kind": "noise", "sigmas": [0.005], "sparsities": [sparsity]}
    recipe = ExploreRecipe.model_validate({"name": "x", "preset": "sp_paper", "explore": [section]})
    with torch.device("meta"):
        model = build_model(name, num_classes=10, in_shape=(3, 32, 32))
    targets = find_targets(model, recipe.include, recipe.excluded)
    assert sum(target.numel for target in targets) == prunable
    # Their counts round to the nearest whole weight; a variant never removes more than asked: one less at most.
    assert prunable - prune_count(prunable, sparsity, "nearest") == kept
    assert 0 <= prunable - prune_count(prunable, sparsity) - kept <= 1
