"""ResNets for CIFAR with a 3x3 stem, DDROP's narrow ones among them, and its transformers with a scale."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.lab.models.parts import FeatureScale, check_pools, check_widths, conv3x3

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "NarrowResNet",
    "ddrop_resnet18",
    "ddrop_resnet34",
    "ddrop_resnet50",
    "ddrop_swin_t",
    "ddrop_vit_b_16",
    "resnet18",
    "resnet50",
]

_WIDTHS, _WIDE = (8, 16, 32, 64), (64, 128, 256, 512)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm; a 1x1 projection where shapes change."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _projection(inputs, width, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 (which has the stride) and 1x1 convolution with BatchNorm, the last four times as wide."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _projection(inputs, outputs, stride)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu3(out + (x if self.downsample is None else self.downsample(x)))


def _projection(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    conv = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class NarrowResNet(nn.Module):
    """The ImageNet ResNet with a 3x3 stem and no first pool, so that 32x32 images start at full size."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: Sequence[int],
        widths: Sequence[int],
        channels: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        inputs = widths[0]
        stages: list[nn.Sequential] = []
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            strides = [1 if stage == 0 else 2] + [1] * (count - 1)
            members: list[nn.Module] = []
            for stride in strides:
                members.append(block(inputs, width, stride))
                inputs = width * block.expansion
            stages.append(nn.Sequential(*members))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.flatten(self.avgpool(x)))


def ddrop_resnet18(num_classes: int, in_shape: Sequence[int], widths: Sequence[int] = _WIDTHS) -> nn.Module:
    """DDROP's ResNet-18; 176,402 parameters on CIFAR-10.

    Args:
        widths: channels of the four stages; the paper takes (8, 16, 32, 64) on CIFAR-10 and twice that on
            CIFAR-100 (713,076 parameters).
    """
    return _narrow("ddrop_resnet18", BasicBlock, (2, 2, 2, 2), num_classes, in_shape, widths)


def resnet18(num_classes: int, in_shape: Sequence[int], widths: Sequence[int] = _WIDE) -> nn.Module:
    """ResNet-18 with a 3x3 stem and no pool before its stages, as usual on CIFAR; 11,173,962 parameters on CIFAR-10.

    Args:
        widths: channels of the four stages.

    Reference: He et al. (CVPR 2016); stochastic pruning's network.
    """
    return _narrow("resnet18", BasicBlock, (2, 2, 2, 2), num_classes, in_shape, widths)


def resnet50(num_classes: int, in_shape: Sequence[int], widths: Sequence[int] = _WIDE) -> nn.Module:
    """As `resnet18`, with bottlenecks; 23,520,842 parameters on CIFAR-10."""
    return _narrow("resnet50", Bottleneck, (3, 4, 6, 3), num_classes, in_shape, widths)


def ddrop_resnet34(num_classes: int, in_shape: Sequence[int], widths: Sequence[int] = _WIDTHS) -> nn.Module:
    """As `ddrop_resnet18`, deeper; 335,154 parameters on CIFAR-10, 1,346,228 on CIFAR-100."""
    return _narrow("ddrop_resnet34", BasicBlock, (3, 4, 6, 3), num_classes, in_shape, widths)


def ddrop_resnet50(num_classes: int, in_shape: Sequence[int], widths: Sequence[int] = _WIDTHS) -> nn.Module:
    """As `ddrop_resnet18`, of bottlenecks; 375,762 parameters on CIFAR-10, 1,530,356 on CIFAR-100."""
    return _narrow("ddrop_resnet50", Bottleneck, (3, 4, 6, 3), num_classes, in_shape, widths)


def _narrow(
    network: str,
    block: type[BasicBlock] | type[Bottleneck],
    blocks: Sequence[int],
    num_classes: int,
    in_shape: Sequence[int],
    widths: Sequence[int],
) -> nn.Module:
    widths = check_widths(network, "widths", widths, count=4)
    return NarrowResNet(block, blocks, widths, in_shape[0], num_classes)


def ddrop_vit_b_16(num_classes: int, in_shape: Sequence[int]) -> nn.Module:
    """torchvision's ViT-B/16 with a `FeatureScale` after the first linear layer of each MLP.

    86,604,520 parameters for 224x224 images and 1000 classes. Names of torchvision's own parameters stay, so
    that its published weights load with only the scales missing.

    Shape: square RGB images whose side is a multiple of 16.
    """
    from torchvision.models import vit_b_16

    _check_rgb("ddrop_vit_b_16", in_shape)
    _, height, width = in_shape
    if height != width or height % 16:
        raise UsageError(
            f'model "ddrop_vit_b_16": got {height}x{width} images, expected square ones with a side that is '
            "a multiple of 16; resize them"
        )
    return _scale_features(vit_b_16(weights=None, num_classes=num_classes, image_size=height))


def ddrop_swin_t(num_classes: int, in_shape: Sequence[int]) -> nn.Module:
    """torchvision's Swin-T with a `FeatureScale` after the first linear layer of each MLP.

    28,306,018 parameters for 1000 classes. Names of torchvision's own parameters stay.

    Shape: RGB images of at least 32x32.
    """
    from torchvision.models import swin_t

    _check_rgb("ddrop_swin_t", in_shape)
    check_pools("ddrop_swin_t", in_shape, 5)
    return _scale_features(swin_t(weights=None, num_classes=num_classes))


def _check_rgb(network: str, in_shape: Sequence[int]) -> None:
    if in_shape[0] != 3:
        raise UsageError(f'model "{network}": got {in_shape[0]} channels, expected 3 (RGB); repeat the channel')


def _scale_features(model: nn.Module) -> nn.Module:
    """Put a `FeatureScale` behind the first linear layer of every torchvision MLP in `model`, in place."""
    from torchvision.ops.misc import MLP

    for mlp in [m for m in model.modules() if isinstance(m, MLP)]:
        children = list(mlp.named_children())
        for name, _ in children:
            delattr(mlp, name)
        # A Sequential runs its children in order whatever their names, so the old ones keep theirs.
        for position, (name, child) in enumerate(children):
            mlp.add_module(name, child)
            if position == 0:
                mlp.add_module("scale", FeatureScale(child.out_features))
    return model
