"""A data set in memory, its fingerprint, and the checks that every array passes on its way in."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateur.core.seeds import keyed_numpy
from secateur.errors import DataError, UsageError

__all__ = ["Dataset", "Normalize", "check_images", "check_labels", "fingerprint", "stratified"]

_CHUNK = 4096


@dataclass(frozen=True)
class Normalize:
    """Stored pixels to what a network sees: `(pixel / scale - mean) / std`, float32, channel by channel.

    Args:
        mean, std: one number a channel, in units of `pixel / scale`; std above 0.
        scale: 255 for 8-bit images, 1 for images stored as floats.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float

    def __call__(self, images: Tensor) -> Tensor:
        """`[batch, channels, height, width]` of any type to float32 of the same shape; never changes its input."""
        factor = [1.0 / (self.scale * std) for std in self.std]
        offset = [-mean / std for mean, std in zip(self.mean, self.std, strict=True)]
        values = images.to(torch.float32, copy=True)
        # Two in-place passes are quicker than one fused addcmul with broadcast operands.
        return values.mul_(_by_channel(factor, images)).add_(_by_channel(offset, images))


def _by_channel(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device).view(1, -1, 1, 1)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images `[n, channels, height, width]` (uint8 or float32) and int64 labels `[n]`, all in memory.

    Args:
        name: what it was asked for as.
        train_images, train_labels: what is trained on, without the validation part.
        validation_images, validation_labels: held out from training data; empty (`n = 0`) when not asked for.
        test_images, test_labels: never used for any choice.
        num_classes: labels are in `[0, num_classes)`.
        normalize: from stored pixels to the network's input.
        fingerprint: changes when images, labels, split or normalization do (hash of all labels, all shapes
            and a fixed subset of the images).
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    normalize: Normalize
    fingerprint: str

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        _, channels, height, width = self.train_images.shape
        return channels, height, width


def fingerprint(parts: dict[str, Tensor], normalize: Normalize, num_classes: int) -> str:
    """Hexadecimal hash of shapes, types, labels, normalization, and every image.

    Cost: one read of the data, about a second a gigabyte.
    """
    digest = hashlib.sha256(f"{normalize!r} {num_classes}".encode())
    for name, tensor in parts.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()[:32]


def check_images(images: np.ndarray, where: str) -> Tensor:
    """Images of any usual layout as `[n, channels, height, width]`, uint8 or float32.

    `[n, h, w]`, `[n, h, w, 1|3|4]` and `[n, 1|3|4, h, w]` are taken; uint8 or floats.

    Raises:
        DataError: none at all, another shape or type, or a number that is not finite.
    """
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise DataError(f"{where}: got images of type {images.dtype}, expected uint8 or float; convert them")
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4:
        first, last = images.shape[1] in (1, 3, 4), images.shape[3] in (1, 3, 4)
        if first == last:
            raise DataError(
                f"{where}: cannot tell the channels of images shaped {images.shape}; expected [n, h, w, channels] "
                "or [n, channels, h, w] with 1, 3 or 4 channels and larger height and width"
            )
        images = images.transpose(0, 3, 1, 2) if last else images
    else:
        raise DataError(
            f"{where}: got images shaped {images.shape}, expected [n, h, w], [n, h, w, channels] or [n, channels, h, w]"
        )
    if images.size == 0:
        raise DataError(f"{where}: empty (shape {images.shape}); expected at least one image")
    if images.dtype == np.uint8:
        return torch.from_numpy(np.array(images, order="C"))
    for start in range(0, len(images), _CHUNK):
        good = np.isfinite(images[start : start + _CHUNK]).reshape(len(images[start : start + _CHUNK]), -1).all(1)
        if not good.all():
            index = start + int(np.argmin(good))
            raise DataError(f"{where}: image {index} has NaN or infinite pixels; expected finite numbers")
    return torch.from_numpy(np.array(images, dtype=np.float32, order="C"))


def check_labels(labels: np.ndarray, images: int, num_classes: int | None, where: str) -> Tensor:
    """Labels as int64 `[n]`.

    Args:
        images: how many images there are.
        num_classes: labels must be below it; None: only not negative.

    Raises:
        DataError: wrong count, shape, type or range; the message has the index of the first offender.
    """
    if labels.dtype.kind not in "iu":
        raise DataError(f"{where}: got labels of type {labels.dtype}, expected integers; convert them")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise DataError(f"{where}: got labels shaped {labels.shape}, expected one number an image, [{images}]")
    if len(labels) != images:
        raise DataError(f"{where}: got {len(labels)} labels for {images} images, expected as many of each")
    limit = num_classes if num_classes is not None else np.iinfo(np.int64).max
    wrong = (labels < 0) | (labels >= limit)
    if wrong.any():
        first = int(np.argmax(wrong))
        expected = f"0 <= label < {num_classes} classes" if num_classes is not None else "label >= 0"
        raise DataError(
            f"{where}: labels out of range: got min {labels.min()}, max {labels.max()}, expected {expected} "
            f"(first at index {first}: {labels[first]})"
        )
    return torch.from_numpy(labels.astype(np.int64))


def stratified(labels: Tensor, count: int, seed: int, purpose: str) -> tuple[Tensor, Tensor]:
    """Split positions into `count` drawn with every class in proportion, and the rest; both ascending.

    Shares are rounded by largest remainder, so that exactly `count` are drawn.

    Randomness: the stream `(seed, purpose)`; the same labels and seed give the same split.

    Examples:
        >>> labels = torch.arange(20) % 2
        >>> drawn, rest = stratified(labels, 6, seed=0, purpose="doc")
        >>> labels[drawn].bincount().tolist(), len(rest)
        ([3, 3], 14)
    """
    if not 0 <= count <= len(labels):
        raise UsageError(f"{purpose} split: got {count} images, expected 0 to {len(labels)}")
    rng = keyed_numpy(seed, purpose)
    values = labels.numpy()
    sizes = np.bincount(values)
    exact = sizes * count / max(1, len(values))
    shares = np.floor(exact + 1e-9).astype(np.int64)
    # Classes with the largest remainder get one more; stable, so that ties go to the lower class.
    shares[np.argsort(shares - exact, kind="stable")[: count - shares.sum()]] += 1
    chosen = np.zeros(len(values), dtype=bool)
    for label in np.flatnonzero(sizes):
        members = np.flatnonzero(values == label)
        chosen[rng.permutation(members)[: shares[label]]] = True
    return torch.from_numpy(np.flatnonzero(chosen)), torch.from_numpy(np.flatnonzero(~chosen))
