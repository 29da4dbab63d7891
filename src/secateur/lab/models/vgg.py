"""VGG networks for 32x32 images: the usual ones with BatchNorm, and DDROP's with a dense part."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from secateur.lab.models.parts import check_pools, check_widths, conv3x3

__all__ = ["ddrop_vgg11", "ddrop_vgg13", "vgg11", "vgg13", "vgg16", "vgg19"]

# Convolutions in each of the five stages; a 2x2 pool ends each stage.
_STAGES_11, _STAGES_13, _STAGES_16, _STAGES_19 = (1, 1, 2, 2, 2), (2, 2, 2, 2, 2), (2, 2, 3, 3, 3), (2, 2, 4, 4, 4)
_WIDTHS = (64, 128, 256, 512, 512)


def vgg11(num_classes: int, in_shape: Sequence[int], widths: Sequence[int] = _WIDTHS) -> nn.Module:
    """VGG-11 with BatchNorm: 8 convolutions, one linear layer.

    Args:
        widths: channels of the five stages.

    Shape: images of at least 32x32; `[batch, *in_shape]` to `[batch, num_classes]`.

    Reference: Simonyan and Zisserman (ICLR 2015), with BatchNorm and a single linear layer as usual on CIFAR.
    """
    return _vgg("vgg11", _STAGES_11, num_classes, in_shape, widths, ())


def vgg13(num_classes: int, in_shape: Sequence[int], widths: Sequence[int] = _WIDTHS) -> nn.Module:
    """As `vgg11`, 10 convolutions."""
    return _vgg("vgg13", _STAGES_13, num_classes, in_shape, widths, ())


def vgg16(num_classes: int, in_shape: Sequence[int], widths: Sequence[int] = _WIDTHS) -> nn.Module:
    """As `vgg11`, 13 convolutions."""
    return _vgg("vgg16", _STAGES_16, num_classes, in_shape, widths, ())


def vgg19(num_classes: int, in_shape: Sequence[int], widths: Sequence[int] = _WIDTHS) -> nn.Module:
    """As `vgg11`, 16 convolutions."""
    return _vgg("vgg19", _STAGES_19, num_classes, in_shape, widths, ())


def ddrop_vgg11(
    num_classes: int,
    in_shape: Sequence[int],
    widths: Sequence[int] = _WIDTHS,
    hidden: Sequence[int] = (512, 512),
) -> nn.Module:
    """DDROP's VGG-11: dense layers with LayerNorm before the classifier; 9,758,474 parameters on CIFAR-10.

    Args:
        widths: channels of the five stages.
        hidden: widths of the dense layers.
    """
    return _vgg("ddrop_vgg11", _STAGES_11, num_classes, in_shape, widths, hidden)


def ddrop_vgg13(
    num_classes: int,
    in_shape: Sequence[int],
    widths: Sequence[int] = _WIDTHS,
    hidden: Sequence[int] = (512, 512),
) -> nn.Module:
    """As `ddrop_vgg11`, 10 convolutions; 9,943,370 parameters on CIFAR-10."""
    return _vgg("ddrop_vgg13", _STAGES_13, num_classes, in_shape, widths, hidden)


def _vgg(
    network: str,
    stages: Sequence[int],
    num_classes: int,
    in_shape: Sequence[int],
    widths: Sequence[int],
    hidden: Sequence[int],
) -> nn.Module:
    widths = check_widths(network, "widths", widths, count=len(_WIDTHS))
    channels, height, width = check_pools(network, in_shape, len(_WIDTHS))
    features: OrderedDict[str, nn.Module] = OrderedDict()
    for stage, (outputs, count) in enumerate(zip(widths, stages, strict=True), start=1):
        for i in range(1, count + 1):
            features[f"conv{stage}_{i}"] = conv3x3(channels, outputs, bias=True)
            features[f"bn{stage}_{i}"] = nn.BatchNorm2d(outputs)
            features[f"relu{stage}_{i}"] = nn.ReLU()
            channels = outputs
        features[f"pool{stage}"] = nn.MaxPool2d(2)
    for module in features.values():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    classifier: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    size = channels * height * width
    for i, outputs in enumerate(check_widths(network, "hidden", hidden), start=1):
        classifier[f"fc{i}"] = nn.Linear(size, outputs)
        classifier[f"norm{i}"] = nn.LayerNorm(outputs)
        classifier[f"relu{i}"] = nn.ReLU()
        size = outputs
    classifier["head"] = nn.Linear(size, num_classes)
    return nn.Sequential(OrderedDict(features=nn.Sequential(features), classifier=nn.Sequential(classifier)))
