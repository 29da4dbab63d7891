"""The data sets known by name: their shapes, and the mean and deviation their images are normalized with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["DATASETS", "KnownSet"]


@dataclass(frozen=True)
class KnownSet:
    """A data set known by name.

    Args:
        name: what recipes call it; also the folder looked in for plain arrays.
        summary: what it is, in one line.
        num_classes: number of classes.
        in_shape: (channels, height, width).
        mean, std: of each channel over the training images, pixels in [0, 1]; empty: computed on loading.
        torchvision: name of torchvision's class; empty when it does not come from there.
        files: where that class keeps its files, under the data folder.
    """

    name: str
    summary: str
    num_classes: int
    in_shape: tuple[int, int, int]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    torchvision: str = ""
    files: str = ""


_KNOWN = (
    KnownSet("digits", "1,797 scanned digits inside scikit-learn; always there", 10, (1, 8, 8)),
    KnownSet(
        "mnist",
        "70,000 handwritten digits",
        10,
        (1, 28, 28),
        (0.1307,),
        (0.3081,),
        "MNIST",
        "MNIST/raw",
    ),
    KnownSet(
        "fashion_mnist",
        "70,000 pieces of clothing",
        10,
        (1, 28, 28),
        (0.2860,),
        (0.3530,),
        "FashionMNIST",
        "FashionMNIST/raw",
    ),
    KnownSet(
        "cifar10",
        "60,000 small color photographs",
        10,
        (3, 32, 32),
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        "CIFAR10",
        "cifar-10-batches-py",
    ),
    KnownSet(
        "cifar100",
        "60,000 small color photographs in 100 classes",
        100,
        (3, 32, 32),
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
        "CIFAR100",
        "cifar-100-python",
    ),
)

DATASETS: Mapping[str, KnownSet] = {known.name: known for known in _KNOWN}
"""Every data set known by name; any other name is a folder."""
