"""ResNets made for 32x32 images: He et al.'s thin ones, and the wide one of Targeted Dropout."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from secateur.errors import UsageError
from secateur.lab.models.parts import check_pools, check_widths, conv3x3

__all__ = [
    "PadShortcut",
    "ThinBlock",
    "ThinResNet",
    "WideUnit",
    "resnet20",
    "resnet32",
    "resnet56",
    "td_resnet32",
]


class PadShortcut(nn.Module):
    """Shortcut without parameters: every `stride`-th pixel, and zero channels added on both sides (option A).

    Args:
        before, after: zero channels put before and after the input's own.
        stride: step between the pixels kept, both ways.
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.before, self.after, self.stride = before, after, stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return functional.pad(x, (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        return f"before={self.before}, after={self.after}, stride={self.stride}"


class ThinBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, added to the shortcut before the last ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            added = outputs - inputs
            self.shortcut = PadShortcut(added // 2, added - added // 2, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + self.shortcut(x))


class ThinResNet(nn.Module):
    """A 3x3 stem, three stages of `ThinBlock`s, global average, one linear layer.

    Module names are those of the usual published weights (`conv1`, `layer1.0.conv1`, `linear`).
    """

    def __init__(self, channels: int, num_classes: int, blocks: int, widths: Sequence[int]) -> None:
        super().__init__()
        first, second, third = widths
        self.conv1 = conv3x3(channels, first)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu = nn.ReLU()
        self.layer1 = _stage(ThinBlock, first, first, blocks, 1)
        self.layer2 = _stage(ThinBlock, first, second, blocks, 2)
        self.layer3 = _stage(ThinBlock, second, third, blocks, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(third, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.flatten(self.pool(x)))


class WideUnit(nn.Module):
    """Pre-activation unit: two 3x3 convolutions, each behind BatchNorm and ReLU; 1x1 projection if needed."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = _slow_norm(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn2 = _slow_norm(outputs)
        self.relu2 = nn.ReLU()
        self.conv2 = conv3x3(outputs, outputs)
        self.projection = None
        if stride != 1 or inputs != outputs:
            self.projection = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x))
        shortcut = x if self.projection is None else self.projection(active)
        return self.conv2(self.relu2(self.bn2(self.conv1(active)))) + shortcut


class WideResNet(nn.Module):
    """A 7x7 stem, three stages of `WideUnit`s, BatchNorm, ReLU, global average, one linear layer."""

    def __init__(self, channels: int, num_classes: int, units: int, stem: int, widths: Sequence[int]) -> None:
        super().__init__()
        first, second, third = widths
        self.stem = nn.Conv2d(channels, stem, 7, padding=3, bias=False)
        self.stage1 = _stage(WideUnit, stem, first, units, 1)
        self.stage2 = _stage(WideUnit, first, second, units, 2)
        self.stage3 = _stage(WideUnit, second, third, units, 2)
        self.norm = _slow_norm(third)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.logits = nn.Linear(third, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_normal_(module.weight)
        nn.init.zeros_(self.logits.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.logits(self.flatten(self.pool(self.relu(self.norm(x)))))


def _slow_norm(features: int) -> nn.BatchNorm2d:
    # The paper's BatchNorm: statistics decay by .997 a step (torch counts what is taken in), epsilon 1e-3.
    return nn.BatchNorm2d(features, eps=1e-3, momentum=0.003)


def _stage(
    block: type[ThinBlock] | type[WideUnit], inputs: int, outputs: int, count: int, stride: int
) -> nn.Sequential:
    rest = [block(outputs, outputs, 1) for _ in range(count - 1)]
    return nn.Sequential(block(inputs, outputs, stride), *rest)


def resnet20(num_classes: int, in_shape: Sequence[int], widths: Sequence[int] = (16, 32, 64)) -> nn.Module:
    """He et al.'s ResNet-20 for CIFAR: three blocks a stage, shortcuts without parameters (option A).

    Args:
        widths: channels of the three stages, none smaller than the one before.

    Reference: He et al., Deep Residual Learning (CVPR 2016), section 4.2.
    """
    return _thin("resnet20", 3, num_classes, in_shape, widths)


def resnet32(num_classes: int, in_shape: Sequence[int], widths: Sequence[int] = (16, 32, 64)) -> nn.Module:
    """As `resnet20`, five blocks a stage."""
    return _thin("resnet32", 5, num_classes, in_shape, widths)


def resnet56(num_classes: int, in_shape: Sequence[int], widths: Sequence[int] = (16, 32, 64)) -> nn.Module:
    """As `resnet20`, nine blocks a stage."""
    return _thin("resnet56", 9, num_classes, in_shape, widths)


def _thin(network: str, blocks: int, num_classes: int, in_shape: Sequence[int], widths: Sequence[int]) -> nn.Module:
    widths = check_widths(network, "widths", widths, count=3)
    if list(widths) != sorted(widths):
        raise UsageError(
            f'model "{network}": widths got {list(widths)}, expected none smaller than the one before: '
            "its shortcuts add zero channels and cannot remove any"
        )
    channels, _, _ = check_pools(network, in_shape, 2)
    return ThinResNet(channels, num_classes, blocks, widths)


def td_resnet32(
    num_classes: int,
    in_shape: Sequence[int],
    widths: Sequence[int] = (32, 64, 128),
    stem: int = 16,
    units: int = 5,
) -> nn.Module:
    """Targeted Dropout's ResNet-32: pre-activation, 7x7 stem, stages of 32, 64 and 128, projection at each.

    1,849,344 convolution weights in 2,464 filters beside the stem: four times the usual ResNet-32.

    Args:
        widths: channels of the three stages.
        stem: channels of the stem, which the paper never prunes.
        units: units a stage.

    Reference: Gomez et al., Learning Sparse Networks Using Targeted Dropout (2019), section 5.
    """
    widths = check_widths("td_resnet32", "widths", widths, count=3)
    stem, units = check_widths("td_resnet32", "stem, units", [stem, units])
    channels, _, _ = check_pools("td_resnet32", in_shape, 2)
    return WideResNet(channels, num_classes, units, stem, widths)
