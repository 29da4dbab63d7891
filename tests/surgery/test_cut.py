"""Cuts: equal to the masked self, optimizer and averages cut along, and everything put back on failure."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from surgery_networks import NETWORKS, HardCoded, network, randomize_, some_kept
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from secateur.core.groups import unit_masks
from secateur.errors import EquivalenceError, UsageError, VacuousProofError
from secateur.surgery import Plan, cut_, cut_verified_, make_plan, max_difference, trace_groups

_GROUPS = {name: trace_groups(*network(name)) for name in NETWORKS}


def plan_for(name: str, seed: int = 0, keep: float = 0.5) -> tuple[nn.Module, Tensor, Plan]:
    model, inputs = network(name)
    return model, inputs, make_plan(model, _GROUPS[name], some_kept(_GROUPS[name], seed, keep))


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[Any]:
    """Identities and values of everything a cut may touch."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    found: list[Any] = [(name, id(t), t.detach().clone(), t.grad) for name, t in tensors]
    found.append([{k: v for k, v in vars(m).items() if isinstance(v, int | tuple)} for m in model.modules()])
    if optimizer is not None:
        found.append([[id(p) for p in group["params"]] for group in optimizer.param_groups])
        found.append([(id(p), {k: id(v) for k, v in s.items()}) for p, s in optimizer.state.items()])
    return found


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        x == y
        if not isinstance(x, tuple)
        else x[:2] == y[:2] and torch.equal(x[2].nan_to_num(), y[2].nan_to_num()) and x[3] is y[3]
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31), keep=st.floats(0.05, 0.95))
def test_cut_equals_masked(name: str, seed: int, keep: float) -> None:
    model, inputs = network(name)
    groups = _GROUPS[name]
    kept = some_kept(groups, seed, keep)
    if all(bool(k.all()) for k in kept.values()):
        return
    plan = Plan.from_json(make_plan(model, groups, kept).to_json())
    masks = plan.masks(model)
    expected = unit_masks(groups, {k: v for k, v in kept.items() if not v.all()}, model)
    assert masks.keys() == expected.keys()
    assert all(torch.equal(masks[k], expected[k]) for k in masks)
    try:
        report = cut_verified_(model, plan, inputs)
    except VacuousProofError:  # one sigmoid unit left of a normalized row is a constant
        return
    assert report.max_abs_diff is not None
    assert report.max_abs_diff <= 1e-10 * report.scale
    assert report.tolerance == 1e-10
    removed = sum(int((~m).sum()) for m in expected.values())
    assert report.parameters_before - report.parameters_after == removed
    model.train()(inputs).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("name", ["conv_bn", "grouped", "residual", "concat", "depthwise", "transposed"])
def test_masked_by_hand_equals_cut(name: str) -> None:
    """Without our own reference: zero the masked weights in a copy, and compare."""
    model, inputs, plan = plan_for(name, seed=3)
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for path, mask in plan.masks(zeroed).items():
            zeroed.get_parameter(path).mul_(mask)
    cut_(model, plan)
    assert max_difference(model, zeroed, inputs) < 1e-10
    assert max_difference(model, network(name)[0], inputs) > 1e-3


def test_masks_of_a_layer_cut_on_both_sides_and_report() -> None:
    model, inputs, plan = plan_for("mlp")
    assert {(c.path, c.dim) for c in plan.cuts} >= {("2.weight", 0), ("2.weight", 1)}
    report = cut_verified_(model, plan, inputs)
    assert report.units == (("0.weight", 12, 6), ("2.weight", 10, 5))
    assert (model[0].out_features, model[2].in_features, model[2].out_features) == (6, 6, 5)
    assert report.inputs == 5
    assert report.to_dict()["units"] == [["0.weight", 12, 6], ["2.weight", 10, 5]]
    assert report.compression > 1


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
        lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    ],
)
@pytest.mark.parametrize("name", ["grouped", "residual", "transposed", "tied"])
def test_optimizer_goes_on_training_every_tensor(name: str, build: Any) -> None:
    model, inputs, plan = plan_for(name)
    optimizer = build(model.parameters())
    twin = copy.deepcopy(model)
    for _ in range(2):
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()
    names = {id(p): n for n, p in model.named_parameters()}
    old_state = {names[id(p)]: dict(s) for p, s in optimizer.state.items()}
    old = dict(model.named_parameters())
    cut_(model, plan, optimizer=optimizer)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    masks = plan.masks(twin)
    for path, parameter in model.named_parameters():
        keep = masks.get(path, torch.ones_like(old[path], dtype=torch.bool))
        assert torch.equal(parameter.detach().flatten(), old[path].detach()[keep])
        assert torch.equal(parameter.grad.flatten(), old[path].grad[keep])
        assert optimizer.state[parameter].keys() == old_state[path].keys()
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor) and value.ndim:
                assert torch.equal(value.flatten(), old_state[path][key][keep])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.zero_grad()
    model(inputs).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("wrapped", [True, False])
def test_average_is_cut_the_same(wrapped: bool) -> None:
    model, inputs, plan = plan_for("residual")
    ema = AveragedModel(model) if wrapped else copy.deepcopy(model)
    cut_(model, plan, ema=ema)
    assert max_difference(model, ema, inputs) == 0.0
    assert {id(p) for p in model.parameters()}.isdisjoint({id(p) for p in ema.parameters()})
    if isinstance(ema, AveragedModel):
        ema.update_parameters(model)


def test_frozen_models_are_cut_and_stay_frozen() -> None:
    model, inputs = network("conv_bn")
    model.requires_grad_(False)
    groups = trace_groups(model, inputs)
    report = cut_verified_(model, make_plan(model, groups, some_kept(groups, 0)), inputs)
    assert report.parameters_after < report.parameters_before
    assert not any(p.requires_grad for p in model.parameters())


def test_tied_weights_stay_tied() -> None:
    model, inputs, plan = plan_for("tied")
    cut_verified_(model, plan, inputs)
    assert model.a.weight is model.b.weight
    assert model.a.weight.shape == (5, 5)


def test_a_meta_network_is_cut_like_a_real_one() -> None:
    model, _, plan = plan_for("concat")
    ghost = copy.deepcopy(model).to("meta")
    cut_(model, plan)
    cut_(ghost, plan)
    assert {n: p.shape for n, p in ghost.state_dict().items()} == {n: p.shape for n, p in model.state_dict().items()}
    assert all(p.is_meta for p in ghost.parameters())


def test_training_flags_and_random_state_survive_verification() -> None:
    model, inputs, plan = plan_for("conv_bn")
    model.train()
    model[1].eval()
    flags = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    statistics = model[4].running_mean.clone()
    cut_verified_(model, plan, inputs)
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert set(model[4].running_mean.tolist()) <= set(statistics.tolist())
    assert all(not m._forward_hooks for m in model.modules())


def test_a_hard_coded_size_is_an_error_and_changes_nothing() -> None:
    model = randomize_(HardCoded())
    inputs = torch.randn(5, 6)
    optimizer = torch.optim.Adam(model.parameters())
    model(inputs).sum().backward()
    optimizer.step()
    ema = copy.deepcopy(model)
    groups = trace_groups(model, inputs)
    plan = make_plan(model, groups, {"a.weight": torch.arange(8) < 6})
    before, averaged = snapshot(model, optimizer), snapshot(ema)
    with pytest.raises(EquivalenceError, match=r"cut of HardCoded undone: its forward fails with RuntimeError"):
        cut_verified_(model, plan, inputs, optimizer=optimizer, ema=ema)
    assert same(before, snapshot(model, optimizer))
    assert same(averaged, snapshot(ema))


class Mixing(nn.Module):
    """Its width changes its result: no cut can equal the masked self."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)) * self.a.out_features)


def test_a_wrong_cut_is_an_error_and_changes_nothing() -> None:
    model = randomize_(Mixing())
    inputs = torch.randn(5, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(inputs).sum().backward()
    optimizer.step()
    plan = make_plan(model, trace_groups(model, inputs), {"a.weight": torch.arange(8) < 6})
    before = snapshot(model, optimizer)
    with pytest.raises(EquivalenceError, match=r"max \|masked - cut\| = .*expected at most 0.0001"):
        cut_verified_(model, plan, inputs, optimizer=optimizer)
    assert same(before, snapshot(model, optimizer))


def test_proofs_that_prove_nothing_are_refused() -> None:
    model, inputs, plan = plan_for("mlp")
    nn.init.zeros_(model[4].weight)
    before = snapshot(model)
    with pytest.raises(VacuousProofError, match="the same output for every input"):
        cut_verified_(model, plan, inputs)
    nn.init.constant_(model[4].weight, torch.nan)
    with pytest.raises(EquivalenceError, match="not finite"):
        cut_verified_(model, plan, inputs)
    assert [entry[1] for entry in before[:-1]] == [entry[1] for entry in snapshot(model)[:-1]]


def test_other_networks_and_optimizers_are_refused() -> None:
    model, inputs, plan = plan_for("mlp")
    cut_(model, plan)
    with pytest.raises(UsageError, match="this one has already been cut"):
        cut_(model, plan)
    with pytest.raises(UsageError, match="another"):
        cut_verified_(network("residual")[0], plan, inputs)
    model, _, plan = plan_for("mlp")
    before = snapshot(model)
    with pytest.raises(UsageError, match="SGD holds none of the"):
        cut_(model, plan, optimizer=torch.optim.SGD(network("mlp")[0].parameters(), lr=0.1))
    with pytest.raises(UsageError, match="the plan is for network"):
        cut_(model, plan, ema=network("residual")[0])
    assert same(before, snapshot(model))


def test_state_that_cannot_be_cut_is_refused() -> None:
    model, inputs, plan = plan_for("mlp")
    optimizer = torch.optim.Adafactor(model.parameters())
    model(inputs).sum().backward()
    optimizer.step()
    before = snapshot(model, optimizer)
    with pytest.raises(UsageError, match="Adafactor: state 'row_var'"):
        cut_(model, plan, optimizer=optimizer)
    assert same(before, snapshot(model, optimizer))


def test_outputs_may_be_nested() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)

        def forward(self, x: Tensor, scale: Tensor) -> dict[str, Any]:
            h = torch.relu(self.a(x))
            return {"first": self.b(h) * scale, "rest": (self.c(h), [h.argmax(dim=0).new_zeros(1)])}

    model = randomize_(Many())
    inputs = (torch.randn(4, 6), torch.tensor(2.0))
    groups = trace_groups(model, inputs)
    assert groups.prunable().names == ["a.weight"]
    assert groups["a.weight"].consumers == ("b.weight", "c.weight")
    report = cut_verified_(model, make_plan(model, groups, {"a.weight": torch.arange(8) % 2 == 0}), inputs)
    assert report.units == (("a.weight", 8, 4),)


@pytest.mark.parametrize(
    "name",
    [
        *("resnet18", "resnet50", "mobilenet_v2", "vgg11_bn"),
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("densenet121", "resnext50_32x4d", "convnext_tiny")),
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("efficientnet_b0", "mobilenet_v3_small", "swin_t")),
    ],
)
def test_torchvision_networks(name: str) -> None:
    from torchvision import models

    with torch.device("meta"):
        model = models.get_model(name, weights=None, num_classes=7)
    model = model.to_empty(device="cpu")
    for key, value in models.get_model(name, weights=None, num_classes=7).named_buffers() if name == "swin_t" else ():
        model.get_buffer(key).copy_(value)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.running_mean)
            nn.init.ones_(module.running_var)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
    with torch.no_grad():
        for module in model.modules():
            own = dict(module.named_parameters(recurse=False))
            if not isinstance(module, nn.Conv2d | nn.Linear):
                for parameter in own.values():
                    parameter.uniform_(0.5, 1.5)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
    inputs = torch.randn(2, 3, 64, 64)
    groups = trace_groups(model, inputs)
    plan = make_plan(model, groups, some_kept(groups, 0))
    report = cut_verified_(model, plan, inputs)
    assert report.parameters_after < 0.72 * report.parameters_before
    model.train()(torch.randn(4, 3, 64, 64)).sum().backward()
