"""Small networks: perceptrons, the digits network, DropNet's Models A, B and C, the thesis network."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from math import prod

from torch import nn

from secateur.lab.models.parts import check_pools, check_widths, conv3x3

__all__ = ["digits_cnn", "dropnet_a", "dropnet_b", "dropnet_c", "mlp", "thesis_cnn"]


def mlp(num_classes: int, in_shape: Sequence[int], hidden: Sequence[int] = (512, 512)) -> nn.Module:
    """Fully connected: flatten, then `fc1`, ReLU, ..., `head`.

    Args:
        hidden: widths of the hidden layers; none makes it linear.

    Shape: `[batch, *in_shape]` to `[batch, num_classes]`.
    """
    return _perceptron("mlp", num_classes, in_shape, hidden)


def dropnet_a(num_classes: int, in_shape: Sequence[int], hidden: Sequence[int] = (40, 40)) -> nn.Module:
    """DropNet's Model A: 784-40-40-10 on MNIST.

    Reference: Tan and Motani, DropNet (ICML 2020), section 5.
    """
    return _perceptron("dropnet_a", num_classes, in_shape, hidden)


def _perceptron(network: str, num_classes: int, in_shape: Sequence[int], hidden: Sequence[int]) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    features = prod(in_shape)
    for i, width in enumerate(check_widths(network, "hidden", hidden), start=1):
        layers[f"fc{i}"] = nn.Linear(features, width)
        layers[f"relu{i}"] = nn.ReLU()
        features = width
    layers["head"] = nn.Linear(features, num_classes)
    return nn.Sequential(layers)


def digits_cnn(num_classes: int, in_shape: Sequence[int], widths: Sequence[int] = (16, 32, 64)) -> nn.Module:
    """Three 3x3 convolutions with BatchNorm and ReLU, a pool before the last, one linear layer.

    Sized for the 8x8 digits of scikit-learn: an epoch takes a fraction of a second on one core.

    Args:
        widths: channels of the three convolutions.

    Shape: `[batch, *in_shape]` to `[batch, num_classes]`; images of at least 2x2.
    """
    widths = check_widths("digits_cnn", "widths", widths, count=3)
    channels, height, width = check_pools("digits_cnn", in_shape, 1)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, outputs in enumerate(widths, start=1):
        layers[f"conv{i}"] = conv3x3(channels, outputs)
        layers[f"bn{i}"] = nn.BatchNorm2d(outputs)
        layers[f"relu{i}"] = nn.ReLU()
        if i == 2:
            layers["pool"] = nn.MaxPool2d(2)
        channels = outputs
    layers["flatten"] = nn.Flatten()
    layers["head"] = nn.Linear(channels * height * width, num_classes)
    return nn.Sequential(layers)


def dropnet_b(num_classes: int, in_shape: Sequence[int], widths: Sequence[int] = (64, 64)) -> nn.Module:
    """DropNet's Model B: two 3x3 convolutions, each with ReLU and a 2x2 pool, one linear layer.

    Reference: Tan and Motani, DropNet (ICML 2020), section 5.
    """
    return _plain("dropnet_b", num_classes, in_shape, check_widths("dropnet_b", "widths", widths, count=2), None)


def dropnet_c(
    num_classes: int, in_shape: Sequence[int], widths: Sequence[int] = (64, 64, 128, 128), hidden: int = 256
) -> nn.Module:
    """DropNet's Model C: four 3x3 convolutions, each with ReLU and a 2x2 pool, dense 256, one linear layer.

    Reference: Tan and Motani, DropNet (ICML 2020), section 5.
    """
    widths = check_widths("dropnet_c", "widths", widths, count=4)
    return _plain("dropnet_c", num_classes, in_shape, widths, hidden)


def thesis_cnn(
    num_classes: int, in_shape: Sequence[int], widths: Sequence[int] = (64, 128, 256), hidden: int = 512
) -> nn.Module:
    """The mask-guided pruning thesis's network: three 3x3 convolutions with ReLU and pool, dense 512, linear.

    33,930,890 parameters for 128x128 images and 10 classes. Its dropout masks are not part of the network:
    they are attached to it.
    """
    widths = check_widths("thesis_cnn", "widths", widths, count=3)
    return _plain("thesis_cnn", num_classes, in_shape, widths, hidden)


def _plain(
    network: str, num_classes: int, in_shape: Sequence[int], widths: Sequence[int], hidden: int | None
) -> nn.Module:
    """Convolution, ReLU, pool for each width; then a dense layer if asked; then the classifier."""
    channels, height, width = check_pools(network, in_shape, len(widths))
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, outputs in enumerate(widths, start=1):
        layers[f"conv{i}"] = conv3x3(channels, outputs, bias=True)
        layers[f"relu{i}"] = nn.ReLU()
        layers[f"pool{i}"] = nn.MaxPool2d(2)
        channels = outputs
    layers["flatten"] = nn.Flatten()
    features = channels * height * width
    if hidden is not None:
        (hidden,) = check_widths(network, "hidden", [hidden])
        layers["fc1"] = nn.Linear(features, hidden)
        layers["relu_fc1"] = nn.ReLU()
        features = hidden
    layers["head"] = nn.Linear(features, num_classes)
    return nn.Sequential(layers)
