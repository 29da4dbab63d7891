"""Load a data set by name or folder, split it, and normalize it: one call, no download unless asked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from secateur.errors import DataError, NoEffectError, UnknownNameError, UsageError
from secateur.lab.data.catalog import DATASETS
from secateur.lab.data.dataset import Dataset, Normalize, fingerprint, stratified
from secateur.lab.data.sources import (
    Arrays,
    load_arrays,
    load_digits,
    load_image_folder,
    load_torchvision,
)

__all__ = ["load_data"]

_CHUNK = 4096


def load_data(
    name: str,
    *,
    data_dir: Path | str | None = None,
    download: bool = False,
    validation: float | int = 0,
    seed: int = 0,
    subset: int | None = None,
    test_subset: int | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    memory_limit: int = 4 << 30,
) -> Dataset:
    """Load `name` into memory.

    Args:
        name: a name in `DATASETS`, or a folder: of the data folder, or (with a `/`, `.` or `~`) anywhere. A folder
            holds `{train,test}_{images,labels}.npy`, or `train/CLASS/*.jpg` beside `test/` or `val/`.
            The known names may be such folders of arrays too.
        data_dir: the data folder; else the environment variable `SECATEUR_DATA_DIR`. `digits` needs none.
        download: let torchvision download what is missing into the data folder.
        validation: share (float, in [0, 1)) or number (int) of training images to hold out, every class in
            proportion.
        seed: of the validation split and the subsets.
        subset: train on this many images only, drawn after the validation split, every class in proportion.
        test_subset: keep this many test images only, every class in proportion.
        num_classes: of a folder of arrays; else the largest training label plus one.
        image_size: image folders: scale the shorter side to this and cut out the middle square.
        normalize: (mean, std), a number a channel with pixels in [0, 1]; else the set's usual ones, else those
            of its training images before any split.
        memory_limit: bytes that the decoded images of an image folder may take.

    Raises:
        DataError: missing or malformed files; the message says where it looked and how to get them.
        UnknownNameError: neither a known name nor a folder.
        UsageError: a split that cannot be made.

    Randomness: streams `(seed, "validation")`, `(seed, "subset")`, `(seed, "test subset")`. The test set of
    `digits` is always the same.
    """
    arrays = _find(name, data_dir, download, num_classes, image_size, memory_limit)
    if image_size is not None and arrays.train_images.shape[-2:] != (image_size, image_size):
        raise NoEffectError(
            f'data "{name}": image_size={image_size} resizes image folders only, and these are arrays of '
            f"{list(arrays.train_images.shape[1:])}; leave it out"
        )
    train_images, train_labels = arrays.train_images, arrays.train_labels
    test_images, test_labels = arrays.test_images, arrays.test_labels
    transform = _normalization(name, arrays, normalize)
    held_images, held_labels = train_images[:0], train_labels[:0]
    count = _validation_count(validation, len(train_labels))
    if arrays.validation is not None:
        if count:
            raise UsageError(f'data "{name}" comes with its own val/ folder; set validation to 0 or remove it')
        held_images, held_labels = arrays.validation
    elif count:
        held, rest = stratified(train_labels, count, seed, "validation")
        held_images, held_labels = train_images[held], train_labels[held]
        train_images, train_labels = train_images[rest], train_labels[rest]
    train_images, train_labels = _subset("subset", train_images, train_labels, subset, seed)
    test_images, test_labels = _subset("test subset", test_images, test_labels, test_subset, seed)
    parts = {
        "train_images": train_images,
        "train_labels": train_labels,
        "validation_images": held_images,
        "validation_labels": held_labels,
        "test_images": test_images,
        "test_labels": test_labels,
    }
    return Dataset(
        name=name,
        **parts,
        num_classes=arrays.num_classes,
        normalize=transform,
        fingerprint=fingerprint(parts, transform, arrays.num_classes),
    )


def _find(
    name: str,
    data_dir: Path | str | None,
    download: bool,
    num_classes: int | None,
    image_size: int | None,
    memory_limit: int,
) -> Arrays:
    known = DATASETS.get(name)
    if name == "digits":
        return load_digits()
    if known is not None:
        root = _data_root(name, data_dir)
        if (root / name / "train_images.npy").is_file():
            return load_arrays(root / name, known.num_classes, known.in_shape)
        return load_torchvision(known, root, download)
    anywhere = "/" in name or os.sep in name or name[:1] in (".", "~")
    if not anywhere and data_dir is None and not os.environ.get("SECATEUR_DATA_DIR"):
        where = "for a folder of your own pass data_dir (--data-dir DIR) or set SECATEUR_DATA_DIR"
        raise UnknownNameError("data set", name, DATASETS, where)
    folder = Path(name).expanduser() if anywhere else _data_root(name, data_dir) / name
    if not folder.is_dir():
        if anywhere:
            raise DataError(f'data "{name}": no such folder; looked for {folder.absolute()}')
        there = sorted(p.name for p in folder.parent.iterdir() if p.is_dir()) if folder.parent.is_dir() else []
        raise UnknownNameError("data set", name, [*DATASETS, *there], f"and there is no folder {folder}")
    if (folder / "train").is_dir():
        return load_image_folder(folder, image_size, memory_limit)
    return load_arrays(folder, num_classes, None)


def _data_root(name: str, data_dir: Path | str | None) -> Path:
    root = data_dir if data_dir is not None else os.environ.get("SECATEUR_DATA_DIR") or None
    if root is None:
        raise DataError(
            f'data "{name}" needs a data folder; pass data_dir (--data-dir DIR) or set the environment variable '
            'SECATEUR_DATA_DIR ("digits" needs none)'
        )
    return Path(root).expanduser()


def _validation_count(validation: float | int, total: int) -> int:
    if isinstance(validation, bool) or not isinstance(validation, int | float):
        raise UsageError(f"validation: got {validation!r}, expected a share in [0, 1) or a number of images")
    if isinstance(validation, float):
        if not 0 <= validation < 1:
            raise UsageError(f"validation: got {validation}, expected a share in [0, 1) or an integer count")
        return int(validation * total + 1e-9)
    if not 0 <= validation < total:
        raise UsageError(f"validation: got {validation} images, expected 0 to {total - 1} of {total}")
    return validation


def _subset(what: str, images: Tensor, labels: Tensor, count: int | None, seed: int) -> tuple[Tensor, Tensor]:
    if count is None:
        return images, labels
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= len(labels):
        raise UsageError(f"{what}: got {count!r} images, expected 1 to {len(labels)}")
    drawn, _ = stratified(labels, count, seed, what)
    return images[drawn], labels[drawn]


def _normalization(name: str, arrays: Arrays, given: tuple[Sequence[float], Sequence[float]] | None) -> Normalize:
    channels = arrays.train_images.shape[1]
    known = DATASETS.get(name)
    if given is not None:
        mean, std = (tuple(float(v) for v in values) for values in given)
        if len(mean) != channels or len(std) != channels or min(std) <= 0:
            raise UsageError(
                f"normalize: got mean {list(mean)}, std {list(std)}, expected {channels} numbers each, std above 0"
            )
    elif known is not None and known.mean:
        mean, std = known.mean, known.std
    else:
        mean, std = _statistics(arrays.train_images, arrays.scale)
    return Normalize(mean, std, arrays.scale)


def _statistics(images: Tensor, scale: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel, in two passes of chunks; a constant channel gets deviation 1."""
    count = images[:, 0].numel()
    chunks = range(0, len(images), _CHUNK)
    total = torch.stack([images[i : i + _CHUNK].sum((0, 2, 3), dtype=torch.float64) for i in chunks]).sum(0)
    mean = total / count
    center = mean.view(1, -1, 1, 1)
    squares = [(images[i : i + _CHUNK].double() - center).square().sum((0, 2, 3)) for i in chunks]
    std = (torch.stack(squares).sum(0) / count).sqrt() / scale
    std = torch.where(std > 0, std, torch.ones_like(std))
    return tuple((mean / scale).tolist()), tuple(std.tolist())
