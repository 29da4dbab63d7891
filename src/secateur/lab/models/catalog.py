"""The networks that ship with secateur: name, builder, one line, and the input they were published for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from secateur.registry import Registry

__all__ = ["CATALOG", "MODELS", "ModelInfo"]

_ROOM = "secateur.lab.models"


@dataclass(frozen=True)
class ModelInfo:
    """One line of the catalog.

    Args:
        name: what recipes and the command line call it.
        builder: `"module:function"`; called with `num_classes`, `in_shape` and the network's own arguments.
        summary: what it is, in one line.
        in_shape: (channels, height, width) it was published for; other shapes work unless it says otherwise.
        num_classes: classes it was published for.
    """

    name: str
    builder: str
    summary: str
    in_shape: tuple[int, int, int]
    num_classes: int


_DIGITS, _MNIST, _CIFAR, _IMAGENET = (1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 224, 224)

_ENTRIES = (
    ModelInfo("mlp", f"{_ROOM}.small:mlp", "fully connected, any hidden widths (512, 512)", _MNIST, 10),
    ModelInfo(
        "digits_cnn",
        f"{_ROOM}.small:digits_cnn",
        "3 convolutions with BatchNorm, seconds on a CPU",
        _DIGITS,
        10,
    ),
    ModelInfo("dropnet_a", f"{_ROOM}.small:dropnet_a", "DropNet Model A: 784-40-40-10", _MNIST, 10),
    ModelInfo("dropnet_b", f"{_ROOM}.small:dropnet_b", "DropNet Model B: 2 convolutions of 64", _MNIST, 10),
    ModelInfo("dropnet_c", f"{_ROOM}.small:dropnet_c", "DropNet Model C: 64-64-128-128, dense 256", _CIFAR, 10),
    ModelInfo("thesis_cnn", f"{_ROOM}.small:thesis_cnn", "64-128-256 and dense 512, no BatchNorm", (3, 128, 128), 10),
    ModelInfo("resnet20", f"{_ROOM}.resnet_cifar:resnet20", "He et al.'s CIFAR ResNet, padded shortcuts", _CIFAR, 10),
    ModelInfo("resnet32", f"{_ROOM}.resnet_cifar:resnet32", "He et al.'s CIFAR ResNet, padded shortcuts", _CIFAR, 10),
    ModelInfo("resnet56", f"{_ROOM}.resnet_cifar:resnet56", "He et al.'s CIFAR ResNet, padded shortcuts", _CIFAR, 10),
    ModelInfo("resnet18", f"{_ROOM}.ddrop:resnet18", "ResNet-18 with a 3x3 stem, for CIFAR", _CIFAR, 10),
    ModelInfo("resnet50", f"{_ROOM}.ddrop:resnet50", "ResNet-50 with a 3x3 stem, for CIFAR", _CIFAR, 10),
    ModelInfo(
        "td_resnet32",
        f"{_ROOM}.resnet_cifar:td_resnet32",
        "Targeted Dropout's wide pre-activation ResNet",
        _CIFAR,
        10,
    ),
    ModelInfo("vgg11", f"{_ROOM}.vgg:vgg11", "VGG with BatchNorm and one linear layer, for CIFAR", _CIFAR, 10),
    ModelInfo("vgg13", f"{_ROOM}.vgg:vgg13", "VGG with BatchNorm and one linear layer, for CIFAR", _CIFAR, 10),
    ModelInfo("vgg16", f"{_ROOM}.vgg:vgg16", "VGG with BatchNorm and one linear layer, for CIFAR", _CIFAR, 10),
    ModelInfo("vgg19", f"{_ROOM}.vgg:vgg19", "VGG with BatchNorm and one linear layer, for CIFAR", _CIFAR, 10),
    ModelInfo("ddrop_resnet18", f"{_ROOM}.ddrop:ddrop_resnet18", "DDROP's narrow ResNet-18 (8-16-32-64)", _CIFAR, 10),
    ModelInfo("ddrop_resnet34", f"{_ROOM}.ddrop:ddrop_resnet34", "DDROP's narrow ResNet-34 (8-16-32-64)", _CIFAR, 10),
    ModelInfo("ddrop_resnet50", f"{_ROOM}.ddrop:ddrop_resnet50", "DDROP's narrow ResNet-50 (8-16-32-64)", _CIFAR, 10),
    ModelInfo("ddrop_vgg11", f"{_ROOM}.vgg:ddrop_vgg11", "DDROP's VGG-11, dense 512-512 with LayerNorm", _CIFAR, 10),
    ModelInfo("ddrop_vgg13", f"{_ROOM}.vgg:ddrop_vgg13", "DDROP's VGG-13, dense 512-512 with LayerNorm", _CIFAR, 10),
    ModelInfo(
        "ddrop_vit_b_16",
        f"{_ROOM}.ddrop:ddrop_vit_b_16",
        "ViT-B/16 with a scale on its MLP features",
        _IMAGENET,
        1000,
    ),
    ModelInfo(
        "ddrop_swin_t",
        f"{_ROOM}.ddrop:ddrop_swin_t",
        "Swin-T with a scale on its MLP features",
        _IMAGENET,
        1000,
    ),
)

CATALOG: Mapping[str, ModelInfo] = {entry.name: entry for entry in _ENTRIES}
"""Every built-in network by name, in the order they are listed."""

MODELS = Registry("model", "secateur.models", {name: entry.builder for name, entry in CATALOG.items()})
"""Builders by name; other packages add theirs through the entry-point group `secateur.models`."""
