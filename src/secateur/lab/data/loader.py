"""Batches from images in memory: no worker processes, and every step can be made again from its number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from secateur.core.seeds import keyed_generator, keyed_numpy
from secateur.errors import UnknownNameError, UsageError
from secateur.lab.data.dataset import Normalize

__all__ = ["AUGMENTATIONS", "Loader", "crop_flip", "evaluation_batches"]

_PADDING = 4

Augmentation = Callable[[Tensor, np.random.Generator], Tensor]


def crop_flip(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Random crop after 4 zero pixels are added on every side, and a left-right flip with probability 1/2.

    Drawn for each image on its own; distributed as torchvision's `RandomCrop(size, padding=4)` followed by
    `RandomHorizontalFlip()`.

    Args:
        images: `[batch, channels, height, width]` of any type; zero means what black is stored as.
        rng: where offsets and flips are drawn from.

    Returns: a new tensor, same shape and type.
    """
    batch, channels, height, width = images.shape
    tall, wide = height + 2 * _PADDING, width + 2 * _PADDING
    top = rng.integers(0, 2 * _PADDING + 1, batch)
    left = rng.integers(0, 2 * _PADDING + 1, batch)
    flipped = np.flatnonzero(rng.integers(0, 2, batch, dtype=bool))
    pixels = images.numpy()
    padded = np.zeros((batch, channels, tall, wide), pixels.dtype)
    inside = padded[:, :, _PADDING:-_PADDING, _PADDING:-_PADDING]
    inside[...] = pixels
    inside[flipped] = _mirror(pixels[flipped])
    # Every cropped row is one run of bytes in `padded`; a view of all runs, one a pixel, lets numpy copy each
    # as a single item instead of pixel by pixel.
    flat = padded.reshape(-1)
    runs = np.ndarray((flat.size - width + 1,), f"V{width * flat.itemsize}", buffer=flat.data, strides=(flat.itemsize,))
    image, channel, row = np.ogrid[:batch, :channels, :height]
    first = ((image * channels + channel) * tall + top[:, None, None] + row) * wide + left[:, None, None]
    return torch.from_numpy(runs[first].view(pixels.dtype).reshape(pixels.shape))


def _mirror(pixels: np.ndarray) -> np.ndarray:
    """`pixels` reversed along the last axis."""
    if pixels.dtype == np.uint8 and pixels.shape[-1] % 8 == 0 and pixels.flags.c_contiguous:
        # Reversing bytes inside 8-byte words, then the words, is several times quicker than byte by byte.
        words = np.ascontiguousarray(pixels.view(np.uint64).byteswap()[..., ::-1])
        return words.view(np.uint8)
    return pixels[..., ::-1]


AUGMENTATIONS: Mapping[str, Augmentation | None] = {"none": None, "crop_flip": crop_flip}
"""What may be done to a training batch before it is normalized."""


class Loader:
    """Training batches by step number, without state: any step can be asked for, in any order, any time.

    The order of epoch `e` comes from the stream `(seed, "order", e)` and the augmentation of step `s` from
    `(seed, "augment", s)`, so a run that resumes at step `s` sees bitwise what an uninterrupted one would.

    Args:
        images: `[n, channels, height, width]`, uint8 or float32, on the CPU.
        labels: int64 `[n]`.
        batch_size: images a batch, at least 1.
        seed: root seed of the run.
        normalize: from stored pixels to the network's input; None: only to float32.
        augment: a name in `AUGMENTATIONS`.
        drop_last: leave out an epoch's last batch if it is smaller; else it is given as it is.
        shuffle: a new order every epoch; else as stored.

    Raises:
        UsageError: nothing to give: no images, or fewer than a batch with `drop_last`.
        UnknownNameError: no such augmentation.

    Cost: on one core a few microseconds an image of 3x32x32 with `crop_flip`; memory for one batch and one order.

    Examples:
        >>> loader = Loader(torch.arange(6.0).view(6, 1, 1, 1), torch.arange(6), batch_size=4, seed=0)
        >>> loader.steps_per_epoch, [len(loader.batch(step)[1]) for step in range(3)]
        (2, [4, 2, 4])
        >>> torch.equal(loader.batch(5)[0], loader.batch(5)[0])
        True
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        seed: int,
        *,
        normalize: Normalize | None = None,
        augment: str = "none",
        drop_last: bool = False,
        shuffle: bool = True,
    ) -> None:
        _check_batches(images, labels, batch_size)
        if augment not in AUGMENTATIONS:
            raise UnknownNameError("augmentation", augment, AUGMENTATIONS)
        if drop_last and len(labels) < batch_size:
            raise UsageError(
                f"batch_size: got {batch_size} with drop_last, expected at most the {len(labels)} images there are"
            )
        self.images, self.labels, self.batch_size, self.seed = images, labels, batch_size, seed
        self.normalize, self.augment, self.shuffle = normalize, AUGMENTATIONS[augment], shuffle
        self.steps_per_epoch = len(labels) // batch_size if drop_last else -(-len(labels) // batch_size)
        # Only a cache: the order of the epoch last asked for.
        self._order: tuple[int, Tensor] | None = None

    def indices(self, step: int) -> Tensor:
        """Which images the batch of `step` holds, as positions in `images`."""
        if step < 0:
            raise UsageError(f"step: got {step}, expected 0 or more")
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._draw_order(epoch))
        return self._order[1][position * self.batch_size : (position + 1) * self.batch_size]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images `[batch, channels, height, width]` (float32, normalized) and labels of `step`, counted from 0."""
        chosen = self.indices(step)
        images = self.images.index_select(0, chosen)
        if self.augment is not None:
            images = self.augment(images, keyed_numpy(self.seed, "augment", step))
        return _finish(images, self.normalize), self.labels.index_select(0, chosen)

    def _draw_order(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(len(self.labels))
        return torch.randperm(len(self.labels), generator=keyed_generator(self.seed, "order", epoch))


def evaluation_batches(
    images: Tensor, labels: Tensor, batch_size: int, *, normalize: Normalize | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image once, in order, normalized and not augmented; the last batch may be smaller."""
    _check_batches(images, labels, batch_size)
    for start in range(0, len(labels), batch_size):
        part = slice(start, start + batch_size)
        yield _finish(images[part], normalize), labels[part]


def _finish(images: Tensor, normalize: Normalize | None) -> Tensor:
    return images.to(torch.float32) if normalize is None else normalize(images)


def _check_batches(images: Tensor, labels: Tensor, batch_size: int) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise UsageError(f"batch_size: got {batch_size!r}, expected an integer of at least 1")
    if len(images) != len(labels) or len(labels) == 0:
        raise UsageError(
            f"batches: got {len(images)} images and {len(labels)} labels, expected as many of each, at least one"
        )
