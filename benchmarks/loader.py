"""Batches from memory against torchvision's data set, transforms and a DataLoader without workers.

Both sides deliver shuffled, normalized float32 batches of the same shapes on one thread. Every round times both,
in random order, in process CPU time; the table has the median of the rounds' paired ratios. Images are random
bytes: what is timed does not depend on them, and no files are needed.

    python benchmarks/loader.py [--rounds 7] [--images 10000] [--batch 128]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
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


def measure(sides: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Seconds of CPU an image, by side and round; the order of the sides is drawn anew every round."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for side in sides.values():
        side()
    order = list(sides)
    for _ in range(rounds):
        random.shuffle(order)
        for side in order:
            start = time.process_time()
            count = sides[side]()
            seconds[side].append((time.process_time() - start) / count)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    goals = {"mnist": 30, "cifar10": 15}
    print(f"{options.images} images an epoch, batch {options.batch}, {options.rounds} rounds, 1 thread, CPU time")
    print(f"{'images':<10}{'torchvision img/s':>19}{'secateur img/s':>16}{'ratio':>8}{'lowest':>8}{'goal':>7}")
    for name, goal in goals.items():
        channels, height, width = DATASETS[name].in_shape
        shape = (height, width) if channels == 1 else (height, width, channels)
        images = rng.integers(0, 256, (options.images, *shape), dtype=np.uint8)
        labels = rng.integers(0, 10, options.images)
        sides = {
            "torchvision": torchvision_epoch(name, images, labels, options.batch),
            "secateur": memory_epoch(name, images, labels, options.batch),
        }
        seconds = measure(sides, options.rounds)
        theirs, ours = (statistics.median(seconds[side]) for side in sides)
        ratios = [a / b for a, b in zip(seconds["torchvision"], seconds["secateur"], strict=True)]
        print(
            f"{name:<10}{1 / theirs:>19,.0f}{1 / ours:>16,.0f}{statistics.median(ratios):>8.1f}"
            f"{min(ratios):>8.1f}{'>= ' + str(goal):>7}"
        )


if __name__ == "__main__":
    main()
