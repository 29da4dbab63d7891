"""Where images come from: scikit-learn, torchvision, folders of arrays, folders of image files."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from secateur.errors import DataError, UsageError
from secateur.lab.data.catalog import KnownSet
from secateur.lab.data.dataset import check_images, check_labels, stratified

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Arrays", "load_arrays", "load_digits", "load_image_folder", "load_torchvision"]

_DIGITS_TEST = 360


@dataclass(frozen=True, eq=False)
class Arrays:
    """Checked images and labels as they come from a source, before any split; `scale`: a pixel's 1.0."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    scale: float
    validation: tuple[Tensor, Tensor] | None = None


def load_digits() -> Arrays:
    """scikit-learn's 1,797 digits, pixels 0 to 16: 1,437 to train on and always the same 360 to test on."""
    from sklearn.datasets import load_digits as bundled

    digits = bundled()
    images = torch.from_numpy(digits.images.astype(np.uint8))[:, None].contiguous()
    labels = torch.from_numpy(digits.target.astype(np.int64))
    test, train = stratified(labels, _DIGITS_TEST, 0, "digits test")
    return Arrays(images[train], labels[train], images[test], labels[test], 10, 16.0)


def load_torchvision(known: KnownSet, root: Path, download: bool) -> Arrays:
    """One of torchvision's data sets from `root`; downloaded only if `download`.

    torchvision checks the files of CIFAR against their published hashes before it reads them.
    """
    from torchvision import datasets

    source = getattr(datasets, known.torchvision)
    loaded: list[tuple[Tensor, Tensor]] = []
    for train in (True, False):
        try:
            part = source(str(root), train=train, download=download)
        except (OSError, RuntimeError, ValueError, EOFError) as error:
            raise DataError(_not_there(known, root, download, error)) from error
        where = f"{known.name} {'train' if train else 'test'}"
        images = check_images(np.asarray(part.data), where)
        labels = check_labels(np.asarray(part.targets), len(images), known.num_classes, where)
        loaded.append((images, labels))
    return Arrays(*loaded[0], *loaded[1], num_classes=known.num_classes, scale=255.0)


def _not_there(known: KnownSet, root: Path, download: bool, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    places = f"{root / known.files} or {root / known.name}/train_images.npy"
    if download:
        return f'data "{known.name}": downloading failed ({reason}); try again, or put the files into {places} yourself'
    # What torchvision says of its own argument is no advice for a caller of ours.
    reason = reason.partition(" You can use download")[0].rstrip(".")
    return (
        f'data "{known.name}" not found or broken ({reason}); looked for {places}; put the files there, name another '
        "folder (--data-dir), or allow downloading them (download=True, --download)"
    )


def load_arrays(folder: Path, num_classes: int | None, in_shape: tuple[int, int, int] | None) -> Arrays:
    """A folder with `{train,test}_{images,labels}.npy`.

    Args:
        num_classes: labels must be below it; None: the largest training label plus one.
        in_shape: what images must be shaped like; None: all alike.

    Raises:
        DataError: a file is missing, truncated, holds Python objects, or does not fit the others.
    """
    names = [f"{part}_{kind}.npy" for part in ("train", "test") for kind in ("images", "labels")]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{folder}: missing {', '.join(missing)}; expected {', '.join(names)}, or image files in "
            "train/CLASS/ and test/CLASS/ (or val/CLASS/)"
        )
    read = {name: _read(folder / name) for name in names}
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    for part in ("train", "test"):
        images = check_images(read[f"{part}_images.npy"], str(folder / f"{part}_images.npy"))
        where = str(folder / f"{part}_labels.npy")
        labels = check_labels(read[f"{part}_labels.npy"], len(images), num_classes, where)
        num_classes = num_classes if num_classes is not None else int(labels.max()) + 1
        parts[part] = (images, labels)
    (train_images, train_labels), (test_images, test_labels) = parts["train"], parts["test"]
    expected = in_shape or tuple(train_images.shape[1:])
    for part, (images, _) in parts.items():
        if tuple(images.shape[1:]) != expected:
            raise DataError(
                f"{folder}: {part} images are shaped {tuple(images.shape[1:])}, expected {expected} "
                "(channels, height, width)"
            )
    if train_images.dtype != test_images.dtype:
        raise DataError(
            f"{folder}: training images are {train_images.dtype} and test images {test_images.dtype}, expected "
            "the same type; store both as uint8 or both as float"
        )
    assert num_classes is not None
    scale = 255.0 if train_images.dtype == torch.uint8 else 1.0
    return Arrays(train_images, train_labels, test_images, test_labels, num_classes, scale)


def _read(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        pickled = any(word in str(error).lower() for word in ("pickle", "object"))
        hint = "it may hold Python objects, store plain numbers with numpy.save" if pickled else "make it again"
        raise DataError(f"{path}: not a readable array ({error}); {hint}") from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: got an archive of several arrays, expected one array; use numpy.save")
    return array


def load_image_folder(folder: Path, image_size: int | None, memory_limit: int) -> Arrays:
    """`train/CLASS/*` and `test/CLASS/*` (or `val/`), decoded once as 8-bit RGB.

    With both `test/` and `val/`, `val/` is the validation set. Classes are the folders of `train/`, sorted.

    Raises:
        DataError: no images, a file that is none, classes that differ, sizes that differ without
            `image_size`, or more than `memory_limit` bytes decoded.
    """
    if image_size is not None and (not isinstance(image_size, int) or image_size < 1):
        raise UsageError(f"image_size: got {image_size!r}, expected an integer of at least 1")
    others = [part for part in ("test", "val") if (folder / part).is_dir()]
    if not others:
        raise DataError(f"{folder}: has train/ but neither test/ nor val/; expected one of them to test on")
    listed = {part: _listing(folder / part) for part in ("train", *others)}
    classes = listed["train"][0]
    for part in others:
        if listed[part][0] != classes:
            odd = sorted(set(listed[part][0]) ^ set(classes))
            raise DataError(f"{folder}: classes of train/ and {part}/ differ: {', '.join(odd[:5])} in only one")
    count = sum(len(files) for _, files in listed.values())
    height, width = (image_size, image_size) if image_size else _open(listed["train"][1][0][0]).size[::-1]
    needed = count * 3 * height * width
    if needed > memory_limit:
        raise DataError(
            f"{folder}: {count} images of {height}x{width} take {needed / 2**30:.1f} GiB decoded, expected at most "
            f"{memory_limit / 2**30:.1f} GiB; set a smaller image_size or a larger memory_limit"
        )
    decoded = {part: _decode(files, image_size, (height, width)) for part, (_, files) in listed.items()}
    train, test = decoded["train"], decoded[others[0]]
    validation = decoded["val"] if len(others) == 2 else None
    return Arrays(*train, *test, num_classes=len(classes), scale=255.0, validation=validation)


def _listing(folder: Path) -> tuple[list[str], list[tuple[str, int]]]:
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(folder))
    except (FileNotFoundError, OSError) as error:
        raise DataError(f"{folder}: {error}; expected images in one folder for each class") from error
    return found.classes, found.samples


def _open(path: str) -> Image.Image:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path}: not a readable image ({error}); remove or replace it") from error


def _decode(files: list[tuple[str, int]], image_size: int | None, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    images = np.empty((len(files), 3, *shape), dtype=np.uint8)

    def fill(index: int) -> None:
        path = files[index][0]
        image = _open(path)
        if image_size is not None:
            image = _square(image, image_size)
        if image.size[::-1] != shape:
            raise DataError(
                f"{path}: is {image.size[1]}x{image.size[0]}, expected {shape[0]}x{shape[1]} as the first image; "
                "set image_size to scale and crop all of them"
            )
        images[index] = np.asarray(image).transpose(2, 0, 1)

    # Pillow decodes outside the interpreter lock, so threads do help.
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(fill, range(len(files))):
            pass
    return torch.from_numpy(images), torch.tensor([label for _, label in files], dtype=torch.int64)


def _square(image: Image.Image, side: int) -> Image.Image:
    from torchvision.transforms import functional

    if image.size == (side, side):
        return image
    return functional.center_crop(functional.resize(image, [side], antialias=True), [side, side])
