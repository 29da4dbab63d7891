"""Which groups are found, what they hold, and that finding them leaves nothing behind and ends in time."""

from __future__ import annotations

import os
import time

import pytest
import torch
from surgery_networks import NETWORKS, network
from torch import Tensor, nn

from secateur.errors import NoEffectError, TraceError, UnknownNameError, UsageError
from secateur.surgery import TorchPruningEngine, trace_groups
from secateur.surgery.isolate import OutOfTime, WorkFailed, run_in_fork, run_in_thread


def summary(name: str) -> dict[str, tuple[int, int, bool]]:
    model, inputs = network(name)
    return {g.name: (g.units, g.blocks, g.blocked is None) for g in trace_groups(model, inputs)}


def test_mlp_groups() -> None:
    assert summary("mlp") == {"0.weight": (12, 1, True), "2.weight": (10, 1, True), "4.weight": (4, 1, False)}


def test_grouped_convolutions_have_blocks() -> None:
    assert summary("grouped") == {
        "0.weight": (12, 3, True),
        "2.weight": (18, 3, True),
        "5.weight": (6, 1, True),
        "8.weight": (4, 1, False),
    }
    assert summary("group_norm")["0.weight"] == (12, 3, True)
    assert summary("transposed")["0.weight"] == (8, 4, True)


def test_depthwise_follows_its_producer() -> None:
    model, inputs = network("depthwise")
    group = trace_groups(model, inputs)["0.weight"]
    assert group.producers == ("0.weight",)
    assert group.consumers == ("4.weight",)
    assert {m.path for m in group.members if m.role == "follower"} >= {"1.weight", "1.bias", "2.running_var"}


def test_residual_is_coupled_and_inner_leaves_it_out() -> None:
    model, inputs = network("residual")
    groups = trace_groups(model, inputs)
    assert groups["stem.0.weight"].coupled
    assert groups["b.weight"] is groups["stem.0.weight"]
    assert groups.inner().names == ["a.weight"]
    assert groups.prunable().names == ["stem.0.weight", "a.weight"]


def test_concat_offsets_start_after_the_input() -> None:
    model, inputs = network("concat")
    group = trace_groups(model, inputs)["a.weight"]
    index = {m.path: m.index[:, 0].tolist() for m in group.members}
    assert index["b.weight"] == index["c.weight"] == index["norm.running_mean"] == [3, 4, 5, 6, 7, 8]
    assert trace_groups(model, inputs)["b.weight"].members[-1].index[:, 0].tolist() == [9, 10, 11, 12]


def test_flatten_gives_one_entry_per_position() -> None:
    model, inputs = network("flatten")
    members = {m.path: m.index for m in trace_groups(model, inputs)["0.weight"].members}
    assert members["4.weight"].shape == (6, 9)
    assert members["4.weight"][2].tolist() == list(range(18, 27))


def test_gated_halves_are_one_unit() -> None:
    model, inputs = network("gated")
    group = trace_groups(model, inputs)["both.weight"]
    assert group.units == 8
    assert group.members[0].index[3].tolist() == [3, 11]


def test_tied_layers_are_one_group() -> None:
    model, inputs = network("tied")
    group = trace_groups(model, inputs)["a.weight"]
    assert group.units == 10
    assert {m.path for m in group.members} >= {
        "first.weight",
        "a.weight",
        "b.weight",
        "a.bias",
        "b.bias",
        "head.weight",
    }


class AddsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(x + self.a(x)))


class Bare(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
        self.scale = nn.Parameter(torch.ones(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * self.scale)


def test_blocked_groups_say_why() -> None:
    assert "input" in str(trace_groups(AddsInput(), torch.randn(2, 3, 6, 6))["a.weight"].blocked)
    positions = trace_groups(Bare(1, 3, 6), torch.randn(2, 3, 4))["a.weight"]
    assert positions.blocked == 'they add up with the bare parameter "scale" [1, 3, 6]'
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(4, 8), encoder, nn.Linear(8, 3))
    groups = trace_groups(model, torch.randn(2, 5, 4))
    assert groups.prunable().names == ["1.linear1.weight"]
    assert "MultiheadAttention" in str(groups["0.weight"].blocked)


def test_a_bare_scale_of_one_dimension_follows() -> None:
    group = trace_groups(Bare(6), torch.randn(2, 4))["a.weight"]
    assert group.blocked is None
    assert [m.role for m in group.members if m.path == "scale"] == ["follower"]


def test_parametrized_weights_are_blocked() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 2))
    assert "parametrized" in str(trace_groups(model, torch.randn(2, 4))[0].blocked)


def test_depthwise_with_a_multiplier_blocks_only_its_input() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.Flatten(), nn.Linear(80, 2)
    )
    groups = trace_groups(model, torch.randn(2, 3, 6, 6))
    assert groups["0.weight"].blocked is not None
    assert groups["1.weight"].blocks == 4
    assert groups["3.weight"].blocked is None


@pytest.mark.parametrize("name", NETWORKS)
def test_tracing_leaves_no_trace(name: str) -> None:
    model, inputs = network(name)
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    hooks = [len(m._forward_hooks) for m in model.modules()]
    random = torch.get_rng_state()
    frozen = trace_groups(model, inputs)
    assert len(frozen.prunable()) > 0
    assert all(m.training for m in model.modules())
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert hooks == [len(m._forward_hooks) for m in model.modules()]
    assert torch.equal(random, torch.get_rng_state())
    assert not inputs.requires_grad


def test_groups_come_in_definition_order_and_models_do_not_mix() -> None:
    first, inputs = network("concat")
    expected = trace_groups(first, inputs).names
    other, other_inputs = network("grouped")
    trace_groups(other, other_inputs)
    assert trace_groups(first, inputs).names == expected == ["a.weight", "b.weight", "c.weight", "head.weight"]


def test_roots_find_only_their_groups() -> None:
    model, inputs = network("residual")
    assert trace_groups(model, inputs, roots=["a"]).names == ["a.weight"]
    with pytest.raises(NoEffectError, match='root pattern "block" matches no'):
        trace_groups(model, inputs, roots=["block"])


def test_unknown_group_names_the_nearest() -> None:
    model, inputs = network("residual")
    with pytest.raises(UnknownNameError, match=r"stem.0.weight"):
        trace_groups(model, inputs)["stem.0.wight"]


def test_untraced_layers_are_named() -> None:
    model, inputs = network("residual")
    model.auxiliary = nn.Linear(8, 2)
    assert trace_groups(model, inputs).untraced == ("auxiliary",)


class Loops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        while True:
            time.sleep(0.01)


class Dies(Loops):
    def forward(self, x: Tensor) -> Tensor:
        os._exit(3)


def test_a_hang_ends_in_time() -> None:
    start = time.monotonic()
    with pytest.raises(TraceError, match=r"tracing Loops took longer than 0.3 s; give roots="):
        trace_groups(Loops(), torch.randn(1, 2), timeout=0.3)
    assert time.monotonic() - start < 10


def test_a_crash_and_a_failure_are_one_line() -> None:
    with pytest.raises(TraceError, match="Dies failed: the tracing process died"):
        trace_groups(Dies(), torch.randn(1, 2))
    with pytest.raises(TraceError, match=r"Mlp failed: RuntimeError: .*mat1 and mat2") as error:
        trace_groups(network("mlp")[0].float(), torch.randn(1, 3))
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="timeout=0"):
        trace_groups(Loops(), torch.randn(1, 2), timeout=0)


def test_without_fork_a_thread_gives_the_same_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = network("residual")
    forked = TorchPruningEngine().trace(network("residual")[0].eval(), (inputs,), None)
    expected = trace_groups(model, inputs).names
    monkeypatch.setattr("secateur.surgery.engine.can_fork", lambda: False)
    model.train()
    assert trace_groups(model, inputs).names == expected
    assert model.training
    assert forked
    with pytest.raises(OutOfTime):
        run_in_thread(lambda: time.sleep(1) or "", 0.05)  # type: ignore[func-returns-value]
    with pytest.raises(WorkFailed, match="ZeroDivisionError"):
        run_in_thread(lambda: str(1 // 0), 5)


def test_large_answers_cross_the_pipe() -> None:
    assert len(run_in_fork(lambda: "x" * 3_000_000, 30)) == 3_000_000


def test_swin_has_groups_and_a_small_time_limit_holds() -> None:
    from torchvision.models import swin_t

    with torch.device("meta"):
        model = swin_t(weights=None)
    inputs = torch.randn(1, 3, 64, 64)
    with pytest.raises(TraceError, match="SwinTransformer took longer"):
        trace_groups(model, inputs, timeout=0.02)
    inner = trace_groups(model, inputs, roots=["*.mlp.0"])
    assert len(inner) == len(inner.inner()) == 12
    assert inner.names[0] == "features.1.0.mlp.0.weight"
    assert trace_groups(model, inputs).prunable().names == inner.names
