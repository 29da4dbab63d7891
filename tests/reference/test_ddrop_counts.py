"""The published DDROP parameter counts, by cutting the networks for real (Table 1; transformers: MLP hidden units)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.core.groups import Groups
from secateur.core.targets import find_targets
from secateur.criteria.magnitude import Magnitude
from secateur.lab.models import build_model
from secateur.sparsify.ranking import SelectionRule, rank_units
from secateur.surgery.engine import trace_groups
from secateur.surgery.plan import make_plan
from secateur.surgery.verify import cut_verified_

WIDE = {"widths": [16, 32, 64, 128]}
RESNETS = [
    ("ddrop_resnet18", 10, None, 176_402, 54_378),
    ("ddrop_resnet34", 10, None, 335_154, 100_188),
    ("ddrop_resnet50", 10, None, 375_762, 108_395),
    ("ddrop_resnet18", 100, WIDE, 713_076, 228_700),
    ("ddrop_resnet34", 100, WIDE, 1_346_228, 416_524),
    ("ddrop_resnet50", 100, WIDE, 1_530_356, 470_154),
]
VGGS = [("ddrop_vgg11", 9_758_474, 1_172_827), ("ddrop_vgg13", 9_943_370, 1_189_243)]
TRANSFORMERS = [("ddrop_vit_b_16", 86_604_520, 46_924_120), ("ddrop_swin_t", 28_306_018, 16_207_570)]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def randomize_(model: nn.Module) -> None:
    """Fresh statistics and heads would make equality vacuous."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.05, generator=generator)


def cut(model: nn.Module, groups: Groups, x: torch.Tensor, rounding: str) -> float:
    randomize_(model)
    ranking = rank_units(model, Magnitude(), groups, rule=SelectionRule(rounding=rounding))
    plan = make_plan(model, ranking.groups, ranking.kept(0.7))
    return cut_verified_(model, plan, x).max_abs_diff


@pytest.mark.parametrize(("name", "classes", "kwargs", "dense", "pruned"), RESNETS)
def test_resnets_cut_inner_channels(name, classes, kwargs, dense, pruned):
    model = build_model(name, num_classes=classes, in_shape=(3, 32, 32), kwargs=kwargs)
    assert parameters(model) == dense
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert cut(model, trace_groups(model, x[:1]).inner(), x, "keep_floor") < 1e-4
    assert parameters(model) == pruned


@pytest.mark.parametrize(("name", "dense", "pruned"), VGGS)
def test_vggs_cut_every_convolution(name, dense, pruned):
    model = build_model(name, num_classes=10, in_shape=(3, 32, 32))
    assert parameters(model) == dense
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    convolutions = {t.name for t in find_targets(model) if t.kind == "conv"}
    groups = Groups([g for g in trace_groups(model, x[:1]).inner() if g.name in convolutions])
    assert cut(model, groups, x, "keep_floor") < 1e-4
    assert parameters(model) == pruned


@pytest.mark.parametrize(("name", "dense", "pruned"), TRANSFORMERS)
def test_transformers_cut_mlp_hidden_units(name, dense, pruned):
    model = build_model(name, num_classes=1000, in_shape=(3, 224, 224))
    assert parameters(model) == dense
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    groups = trace_groups(model, x[:1], roots=["*mlp.0"])
    hidden = Groups([g for g in groups.prunable() if g.name.endswith("mlp.0.weight")])
    assert cut(model, hidden, x, "prune_floor") < 1e-3
    assert parameters(model) == pruned
