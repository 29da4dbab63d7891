"""Batches from memory against torchvision's data set, transforms and a DataLoader without workers.

Both sides deliver shuffled, normalized float32 batches of the same shapes on one thread. Every round times both,
in random order, in process CPU time; the table has the median of the rounds' paired ratios. Images are random
bytes: what is timed does not depend on them, and no files are needed.

    python benchmarks/loader.py [--rounds 7] [--images 10000] [--batch 128]
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from _paired import Row, parser, ratios, report, steady, timed_rounds
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from secateur.lab.data import DATASETS, Loader, Normalize


def torchvision_epoch(name: str, images: np.ndarray, labels: np.ndarray, batch: int) -> Callable[[], int]:
    """An epoch of the usual pipeline: image by image through PIL, one batch collated at a time."""
    known = DATASETS[name]
    steps: list[Any] = [transforms.ToTensor(), transforms.Normalize(known.mean, known.std)]
    if name == "cifar10":
        steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *steps]
    source_class = getattr(datasets, known.torchvision)
    # Made without its constructor, which insists on files; item access is torchvision's own.
    source = source_class.__new__(source_class)
    source.transform, source.target_transform = transforms.Compose(steps), None
    source.data = torch.from_numpy(images) if name == "mnist" else images
    source.targets = torch.from_numpy(labels) if name == "mnist" else labels.tolist()
    loader = DataLoader(source, batch_size=batch, shuffle=True, num_workers=0)

    def epoch() -> int:
        return sum(len(y) for _, y in loader)

    return epoch


def memory_epoch(name: str, images: np.ndarray, labels: np.ndarray, batch: int) -> Callable[[], int]:
    """An epoch of ours, a new order and new augmentation each time."""
    known = DATASETS[name]
    stacked = torch.from_numpy(images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2).copy())
    loader = Loader(
        stacked,
        torch.from_numpy(labels),
        batch,
        seed=0,
        normalize=Normalize(known.mean, known.std, 255.0),
        augment="crop_flip" if name == "cifar10" else "none",
    )
    done = 0

    def epoch() -> int:
        nonlocal done
        first, done = done, done + loader.steps_per_epoch
        return sum(len(loader.batch(step)[1]) for step in range(first, done))

    return epoch


def main() -> None:
    flags = parser(__doc__, rounds=7)
    flags.add_argument("--images", type=int, default=10_000, help="images an epoch")
    flags.add_argument("--batch", type=int, default=128, help="batch size")
    asked = flags.parse_args()
    steady()
    rng = np.random.default_rng(0)
    rows = []
    for name, goal in {"mnist": 30.0, "cifar10": 15.0}.items():
        channels, height, width = DATASETS[name].in_shape
        shape = (height, width) if channels == 1 else (height, width, channels)
        images = rng.integers(0, 256, (asked.images, *shape), dtype=np.uint8)
        labels = rng.integers(0, 10, asked.images)
        sides = {
            "torchvision DataLoader, no workers": torchvision_epoch(name, images, labels, asked.batch),
            "secateur, in memory": memory_epoch(name, images, labels, asked.batch),
        }
        times = timed_rounds(sides, asked.rounds)
        theirs = times["torchvision DataLoader, no workers"]
        for side, own in times.items():
            rate = f"{asked.images / median(own) * 1e3:,.0f} images a second"
            wanted = goal if own is not theirs else None
            rows.append(Row(f"{name} shape", side, median(own), *ratios(theirs, own), wanted, True, rate))
    report(f"One epoch of {asked.images} images, speed-up", rows, asked.rounds, asked.json)


if __name__ == "__main__":
    main()
