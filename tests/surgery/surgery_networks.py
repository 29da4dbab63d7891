"""Small networks, one for each way units run through layers, with statistics that make comparisons mean something."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.core.groups import Groups


def randomize_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter and statistic: zero heads and identity norms would make equality vacuous."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            spread = 1.0 if tensor.ndim < 2 else (2.0 / max(1, tensor[0].numel())) ** 0.5
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
            elif buffer.is_floating_point():
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return model


def some_kept(groups: Groups, seed: int, keep: float = 0.5) -> dict[str, Tensor]:
    """A random choice every group allows: as many in each block, at least one."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for group in groups.prunable():
        width = group.units // group.blocks
        rank = torch.rand(group.blocks, width, generator=generator).argsort(1).argsort(1)
        kept[group.name] = (rank < max(1, round(keep * width))).reshape(-1)
    return kept


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.a = nn.Conv2d(8, 12, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(12)
        self.b = nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.b(F.relu(self.bn(self.a(x)))))
        return self.head(x.mean((2, 3)))


class Concat(nn.Module):
    """Every layer reads the input and everything before it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(9)
        self.b = nn.Conv2d(9, 4, 3, padding=1)
        self.c = nn.Conv2d(13, 5, 1)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.a(x)], 1)
        x = torch.cat([x, F.relu(self.b(F.relu(self.norm(x))))], 1)
        return self.head(F.relu(self.c(x)).mean((2, 3)))


class Gated(nn.Module):
    """One layer makes both a value and its gate: units of two entries."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(6, 16)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.both(x).chunk(2, dim=1)
        return self.out(value * torch.sigmoid(gate))


class Tied(nn.Module):
    """Two layers share a weight, not a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.a = nn.Linear(10, 10)
        self.b = nn.Linear(10, 10)
        self.b.weight = self.a.weight
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(torch.tanh(self.first(x)))))))


class Mlp(nn.Sequential):
    def __init__(self, norm: bool = False) -> None:
        hidden: list[nn.Module] = [nn.Linear(7, 12), *([nn.LayerNorm(12)] if norm else []), nn.Sigmoid()]
        super().__init__(*hidden, nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 4))


class HardCoded(nn.Module):
    """A width written into the code."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.b = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)).view(-1, 8))


def _pooled(*layers: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


_IMAGE, _FLAT = (4, 3, 8, 8), (5, 6)

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (Mlp, (5, 7)),
    "mlp_layer_norm": (lambda: Mlp(norm=True), (5, 7)),
    "mlp_layer_norm_plain": (
        lambda: nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9, elementwise_affine=False), nn.ReLU(), nn.Linear(9, 3)),
        _FLAT,
    ),
    "rms_norm": (lambda: nn.Sequential(nn.Linear(6, 9), nn.RMSNorm(9), nn.ReLU(), nn.Linear(9, 3)), _FLAT),
    "conv_bn": (
        lambda: _pooled(
            *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
            *(nn.Conv2d(8, 10, 3, bias=False), nn.BatchNorm2d(10), nn.Sigmoid()),
            width=10,
        ),
        _IMAGE,
    ),
    "grouped": (
        lambda: _pooled(
            *(nn.Conv2d(3, 12, 3), nn.PReLU(12), nn.Conv2d(12, 18, 3, groups=3), nn.BatchNorm2d(18)),
            *(nn.ReLU(), nn.Conv2d(18, 6, 1)),
            width=6,
        ),
        _IMAGE,
    ),
    "depthwise": (
        lambda: _pooled(
            *(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 6, 1)),
            width=6,
        ),
        _IMAGE,
    ),
    "transposed": (
        lambda: _pooled(
            *(nn.ConvTranspose2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 12, 3, groups=4), nn.BatchNorm2d(12)),
            *(nn.ReLU(), nn.ConvTranspose2d(12, 6, 2, stride=2)),
            width=6,
        ),
        _IMAGE,
    ),
    "conv1d": (
        lambda: nn.Sequential(
            *(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 6, 3), nn.Tanh()),
            *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 4)),
        ),
        (4, 3, 12),
    ),
    "conv3d": (
        lambda: nn.Sequential(
            *(nn.Conv3d(2, 6, 2), nn.InstanceNorm3d(6, affine=True), nn.ReLU(), nn.Conv3d(6, 4, 2)),
            *(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3)),
        ),
        (2, 2, 5, 5, 5),
    ),
    "group_norm": (
        lambda: _pooled(nn.Conv2d(3, 12, 3), nn.GroupNorm(3, 12), nn.ReLU(), nn.Conv2d(12, 6, 1), width=6),
        _IMAGE,
    ),
    "flatten": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(54, 10), nn.Sigmoid(), nn.Linear(10, 4)),
        ),
        _IMAGE,
    ),
    "residual": (Residual, _IMAGE),
    "concat": (Concat, _IMAGE),
    "gated": (Gated, _FLAT),
    "tied": (Tied, _FLAT),
}


def network(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """The network `name` with random statistics, in double precision, and inputs for it."""
    build, shape = NETWORKS[name]
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return randomize_(build(), seed).double(), inputs
