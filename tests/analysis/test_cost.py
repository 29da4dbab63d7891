"""Costs against numbers worked out by hand, and against the file they speak of."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import nn

from secateur.analysis import asked_vs_achieved, compare_costs, measure_cost, safetensors_bytes
from secateur.errors import UsageError

# tokens * (in_proj + out_proj) + scores + weighted values
ATTENTION_MACS = 7 * (16 * 48 + 16 * 16) + 2 * 7 * 7 * 16


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]
DTYPES = [*FLOATS, *INTEGERS, torch.bool, torch.complex64]


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


WORKED = {
    "linear": (nn.Linear(20, 5), (20,), 20 * 5),
    "linear over positions": (nn.Linear(20, 5), (9, 20), 9 * 20 * 5),
    "conv": (nn.Conv2d(3, 8, 3), (3, 10, 12), 8 * 10 * 8 * 3 * 9),
    "strided, padded conv": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 9, 9), 5 * 5 * 6 * 4 * 9),
    "grouped conv": (nn.Conv2d(8, 12, 3, padding=1, groups=4), (8, 6, 6), 6 * 6 * 12 * 2 * 9),
    "depthwise conv": (nn.Conv2d(8, 8, 5, padding=2, groups=8), (8, 6, 6), 6 * 6 * 8 * 1 * 25),
    "conv1d": (nn.Conv1d(4, 6, 3), (4, 11), 9 * 6 * 4 * 3),
    "transposed conv": (nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 5, 5), 5 * 5 * 4 * 3 * 9),
    "attention": (SelfAttention(), (7, 16), ATTENTION_MACS),
    "encoder layer": (
        nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
        (7, 16),
        ATTENTION_MACS + 2 * 7 * 16 * 32,
    ),
    "lstm": (nn.LSTM(16, 32, batch_first=True), (5, 16), 5 * 4 * 32 * (16 + 32)),
    "norm and activation": (nn.Sequential(nn.BatchNorm1d(6), nn.ReLU()), (6,), 0),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("case", WORKED)
def test_macs_by_hand(case: str, device: str) -> None:
    model, shape, macs = WORKED[case]
    model = copy.deepcopy(model).to(device)
    cost = measure_cost(model, torch.randn(3, *shape, device=device))
    assert cost.macs == cost.effective_macs == macs
    assert cost.input_shapes == ((1, *shape),)


def test_effective_macs_follow_the_density_of_each_weight() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Flatten(), nn.Linear(8 * 4 * 4, 10))
    conv_macs, linear_macs = 4 * 4 * 8 * 27, 128 * 10
    with torch.no_grad():
        net[0].weight[:6] = 0
        net[2].weight[:, :32] = 0
        net[2].bias.zero_()
    cost = measure_cost(net, torch.randn(2, 3, 6, 6))
    assert cost.macs == conv_macs + linear_macs
    assert cost.effective_macs == conv_macs // 4 + linear_macs * 3 // 4
    assert cost.nonzero == 2 * 27 + 96 * 10
    assert cost.params == 8 * 27 + 1280 + 10


def test_attention_scores_have_no_weight_to_be_sparse() -> None:
    net = SelfAttention()
    with torch.no_grad():
        net.attention.in_proj_weight.zero_()
    cost = measure_cost(net, torch.randn(1, 7, 16))
    assert cost.macs == ATTENTION_MACS
    assert cost.effective_macs == ATTENTION_MACS - 7 * 16 * 48


def test_parametrized_convolution_counts_the_weight_it_uses() -> None:
    class Half(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            mask = torch.ones_like(weight)
            mask[: weight.shape[0] // 2] = 0
            return weight * mask

    net = nn.Conv2d(2, 4, 3)
    nn.utils.parametrize.register_parametrization(net, "weight", Half())
    cost = measure_cost(net, torch.randn(1, 2, 5, 5))
    assert (cost.macs, cost.effective_macs) == (9 * 4 * 18, 9 * 2 * 18)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.embed(x))


def test_tied_weights_count_once(tmp_path) -> None:
    net = Tied()
    cost = measure_cost(net, torch.zeros(2, 4, dtype=torch.long))
    assert cost.params == 66
    assert cost.macs == 4 * 66
    save_file({"embed.weight": net.embed.weight.detach()}, tmp_path / "net.safetensors")
    assert cost.bytes == (tmp_path / "net.safetensors").stat().st_size


def test_bytes_are_the_files_size(tmp_path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 9, 3), nn.BatchNorm2d(9), nn.Linear(5, 3).half(), nn.Linear(3, 2).double())
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    size = (tmp_path / "net.safetensors").stat().st_size
    assert safetensors_bytes(net) == size
    assert safetensors_bytes(net.to("meta")) == size


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=6).filter(lambda s: "." not in s and not hasattr(nn.Module(), s)),
        st.tuples(
            st.sampled_from(DTYPES),
            st.lists(st.integers(0, 7), max_size=3),
        ),
        max_size=12,
    )
)
def test_bytes_for_any_names_types_and_shapes(entries) -> None:
    net = nn.Module()
    for name, (dtype, shape) in entries.items():
        net.register_buffer(name, torch.zeros(shape, dtype=dtype))
    assert safetensors_bytes(net) == len(save(dict(net.state_dict())))


def test_the_model_is_left_as_found() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
    net.train()
    net[1].eval()
    calls = []
    net[0].register_forward_hook(lambda *_: calls.append(1))
    net(torch.randn(4, 6)).sum().backward()
    calls.clear()
    flags = [m.training for m in net.modules()]
    gradients = [p.grad.clone() for p in net.parameters()]
    state = {k: v.clone() for k, v in net.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    switches = _switches()
    measure_cost(net, torch.randn(4, 6))
    assert calls == [1]
    assert flags == [m.training for m in net.modules()]
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, net.parameters(), strict=True))
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    assert switches == _switches()


def test_a_failing_network_leaves_no_trace_either() -> None:
    net = nn.Sequential(nn.Linear(6, 2))
    switches = _switches()
    with pytest.raises(RuntimeError):
        measure_cost(net, torch.randn(1, 5))
    assert net.training
    assert net[0].training
    assert switches == _switches()


def _switches() -> list[bool]:
    return [
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cudnn.enabled,
        torch._C._get_mkldnn_enabled(),
        torch.is_grad_enabled(),
    ]


def test_wrappers_are_looked_through() -> None:
    net = nn.Linear(6, 2)
    assert measure_cost(torch.compile(net), torch.randn(1, 6)) == measure_cost(net, torch.randn(1, 6))


def test_ratios_and_the_asked_against_achieved_record() -> None:
    dense = measure_cost(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)), torch.randn(1, 8))
    pruned = measure_cost(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4)), torch.randn(1, 8))
    ratios = compare_costs(dense, pruned)
    assert ratios["mac_reduction"] == (8 * 16 + 16 * 4) / (8 * 4 + 4 * 4)
    assert ratios["compression"] == (8 * 16 + 16 + 16 * 4 + 4) / (8 * 4 + 4 + 4 * 4 + 4)
    assert ratios["byte_reduction"] == dense.bytes / pruned.bytes
    record = asked_vs_achieved(0.75, targets_kept=48, targets_total=192, dense=dense, pruned=pruned)
    assert record.targets == 0.75
    assert record.macs == pytest.approx(0.75)
    assert record.stored == pytest.approx(1 - 56 / 212)
    assert f"{100 * record.stored:.2f} %" in str(record)
    assert len(str(record).splitlines()) == 7
    assert json.loads(json.dumps(dataclasses.asdict(dense)))["macs"] == dense.macs


def test_nothing_left_is_infinitely_compressed() -> None:
    dense = measure_cost(nn.Linear(4, 2), torch.randn(1, 4))
    gone = dataclasses.replace(dense, nonzero=0, effective_macs=0)
    assert compare_costs(dense, gone)["nonzero_compression"] == math.inf
    assert compare_costs(gone, gone)["nonzero_compression"] == 1.0


def test_bad_input_is_said_plainly() -> None:
    cost = measure_cost(nn.Linear(4, 2), torch.randn(1, 4))
    other = measure_cost(nn.Linear(4, 2), torch.randn(1, 3, 4))
    with pytest.raises(UsageError, match="no batch dimension"):
        measure_cost(nn.Linear(4, 2), torch.tensor(1.0))
    with pytest.raises(UsageError, match="same example input"):
        compare_costs(cost, other)
    with pytest.raises(UsageError, match="out of range"):
        asked_vs_achieved(1.0, targets_kept=1, targets_total=2, dense=cost, pruned=cost)
    with pytest.raises(UsageError, match="impossible"):
        asked_vs_achieved(0.5, targets_kept=3, targets_total=2, dense=cost, pruned=cost)
