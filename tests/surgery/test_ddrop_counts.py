"""The ten parameter counts of the DDROP paper that its rule gives exactly, out of our own cut (oracle B3)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.lab.models import build_model
from secateur.surgery import cut_, make_plan, trace_groups


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "classes", "dense", "published"),
    [
        ("ddrop_resnet18", 10, 176_402, 54_378),
        ("ddrop_resnet34", 10, 335_154, 100_188),
        ("ddrop_resnet50", 10, 375_762, 108_395),
        ("ddrop_resnet18", 100, 713_076, 228_700),
        ("ddrop_resnet34", 100, 1_346_228, 416_524),
        ("ddrop_resnet50", 100, 1_530_356, 470_154),
        ("ddrop_vgg11", 10, 9_758_474, 1_172_827),
        ("ddrop_vgg13", 10, 9_943_370, 1_189_243),
        ("ddrop_vit_b_16", 1000, 86_604_520, 46_924_120),
        ("ddrop_swin_t", 1000, 28_306_018, 16_207_570),
    ],
)
def test_published_counts(name: str, classes: int, dense: int, published: int) -> None:
    """Inner channels only: 30 % of the convolutions' channels stay, 70 % of the MLPs' hidden units go."""
    transformer = "vit" in name or "swin" in name
    side = 224 if transformer else 32
    kwargs = {"widths": [16, 32, 64, 128]} if classes == 100 else None
    with torch.device("meta"):
        model = build_model(name, num_classes=classes, in_shape=(3, side, side), kwargs=kwargs)
    assert parameters(model) == dense
    groups = trace_groups(model, torch.zeros(1, 3, side, side), roots=["*.mlp.0"] if transformer else None)
    kept = {}
    for group in groups.inner():
        layer = model.get_submodule(group.producers[0].rpartition(".")[0])
        if transformer or isinstance(layer, nn.Conv2d):
            n = group.units
            kept[group.name] = torch.arange(n) < (n - int(0.7 * n) if transformer else int(0.3 * n))
    report = cut_(model, make_plan(model, groups, kept))
    assert (report.parameters_before, report.parameters_after) == (dense, published)
