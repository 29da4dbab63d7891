"""Peak memory against sums done by hand."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from secateur.analysis import peak_memory
from secateur.errors import UsageError

BATCH, WIDTH, HIDDEN, OUT = 64, 100, 2000, 500
ROUNDING = 4096


def _net(relu: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), relu, nn.Linear(HIDDEN, OUT))


@pytest.mark.parametrize(
    ("relu", "worst"),
    [
        (nn.ReLU(), 2 * BATCH * HIDDEN),  # before and after the activation
        (nn.ReLU(inplace=True), BATCH * (HIDDEN + OUT)),  # hidden layer and output
    ],
)
def test_peak_by_hand(relu: nn.Module, worst: int) -> None:
    use = peak_memory(_net(relu), torch.randn(BATCH, WIDTH))
    assert 4 * worst <= use.peak_bytes <= 4 * worst + ROUNDING
    assert use.weights_bytes == 4 * (WIDTH * HIDDEN + HIDDEN + HIDDEN * OUT + OUT)
    assert use.total_bytes == use.peak_bytes + use.weights_bytes


def test_same_number_every_time_and_linear_in_the_batch() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4))
    x = torch.randn(16, 3, 8, 8)
    uses = {peak_memory(net, x) for _ in range(3)}
    assert len(uses) == 1
    assert peak_memory(net, x[:8]).peak_bytes < uses.pop().peak_bytes


def test_tied_tensors_weigh_once() -> None:
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    net[1].weight = net[0].weight
    assert peak_memory(net, torch.randn(1, 8)).weights_bytes == 4 * 64


def test_the_model_and_the_environment_are_left_as_found(capfd, monkeypatch) -> None:
    monkeypatch.delenv("KINETO_LOG_LEVEL", raising=False)
    net = _net(nn.ReLU())
    net[1].eval()
    peak_memory(net, torch.randn(2, WIDTH))
    assert [m.training for m in net.modules()] == [True, True, False, True]
    assert all(p.grad is None for p in net.parameters())
    assert "KINETO_LOG_LEVEL" not in os.environ
    assert capfd.readouterr() == ("", "")


def test_no_values_no_memory() -> None:
    with pytest.raises(UsageError, match="meta"):
        peak_memory(nn.Linear(4, 2).to("meta"), torch.randn(1, 4, device="meta"))
