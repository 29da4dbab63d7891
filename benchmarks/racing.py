"""Best point and Pareto front of 150 (sigma, sparsity) points x 10 variants, against trying everything on everything.

    python benchmarks/racing.py [--rounds 3] [--case NAME] [--json FILE]

A small convolution network is trained on scikit-learn's digits, enlarged to 16x16; the 5,000 images it is judged on are
held-out digits (540) in 13 shifts each, of which 5,000 are drawn. So its images are not independent of each other.
The papers' way makes a deep copy and calls `torch.nn.utils.prune` for every candidate, and evaluates it on all images.
Its time is that of a sample of candidates, drawn anew each round, times their number (a gain needs the plain
candidates too). Ours is the whole race, up to float32 numbers of the survivors on all images; the papers' way keeps the
memory format that networks have by default.

How often a race is right is counted over 20 other orders of the images and of the variants, replayed on complete tables
of values (float32 and bfloat16) and compared with the complete float32 table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from _paired import Row, parser, ratios, report, steady, timed, timed_rounds
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils import prune

from secateur.search import front
from secateur.variants import (
    Arm,
    FrontArm,
    NoisyPrune,
    Variant,
    Workbench,
    evaluate_variants,
    race_front,
    race_variants,
)
from secateur.variants.pareto_race import pareto_race
from secateur.variants.race import race

POINTS, VARIANTS, IMAGES, BATCH = 150, 10, 5000, 128
REPEATS, SAMPLE = 20, 20
WAYS = ("bfloat16, channels last", "float32, channels last", "float32")
BEST, SPARSITY, GAIN = "best gain", "front, accuracy/sparsity", "front, accuracy/gain"


def images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(x))
    train, held_out = order[:1257], order[1257:]
    tested, labels = shifted(x[held_out], y[held_out])
    chosen = torch.randperm(len(tested))[:IMAGES]
    return *shifted(x[train], y[train]), tested[chosen], labels[chosen]


def shifted(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    wide = nn.functional.pad(nn.functional.interpolate(x, scale_factor=2, mode="bilinear"), (2, 2, 2, 2))
    moves = [(i, j) for i in range(5) for j in range(5) if abs(i - 2) + abs(j - 2) <= 2]
    return torch.cat([wide[:, :, i : i + 16, j : j + 16] for i, j in moves]), y.repeat(len(moves))


def trained(x: Tensor, y: Tensor) -> nn.Module:
    def block(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]

    pool = nn.MaxPool2d(2)
    end = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    model = nn.Sequential(*block(1, 8), pool, *block(8, 32), pool, *block(32, 64), *end)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4)
    for _ in range(4):
        for index in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    return model.eval()


@dataclass(frozen=True)
class Task:
    """The question in its three forms, over the same points."""

    model: nn.Module
    x: Tensor
    y: Tensor
    points: list[tuple[float, float]]

    @property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.x.split(BATCH), self.y.split(BATCH), strict=True))

    def arms(self, question: str) -> list[Any]:
        made: list[Any] = []
        for sigma, sparsity in self.points:
            noisy = tuple(NoisyPrune(sigma, sparsity, seed) for seed in range(VARIANTS))
            plain = NoisyPrune(0.0, sparsity)
            if question == SPARSITY:
                made.append(FrontArm(noisy, known=(sparsity,)))
            else:
                made.append((Arm if question == BEST else FrontArm)(noisy, plain, sparsity))
        return made

    def candidates(self, question: str) -> int:
        return POINTS * (VARIANTS + (question != SPARSITY))


@torch.no_grad()
def by_copy(task: Task, sigma: float, sparsity: float) -> float:
    candidate = copy.deepcopy(task.model)
    layers = [m for m in candidate.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in layers:
        layer.weight.add_(torch.randn_like(layer.weight), alpha=sigma)
    prune.global_unstructured([(m, "weight") for m in layers], pruning_method=prune.L1Unstructured, amount=sparsity)
    return sum(int((candidate(x).argmax(1) == y).sum()) for x, y in task.batches) / len(task.y)


def papers_way(task: Task) -> Callable[[], None]:
    generator = np.random.default_rng(0)

    def run() -> None:
        for point in generator.choice(len(task.points), SAMPLE, replace=False):
            by_copy(task, *task.points[point])

    return run


def our_way(task: Task, question: str, fast: bool, last: bool, found: list[Any]) -> Callable[[], None]:
    model = copy.deepcopy(task.model)
    if last:
        model = model.to(memory_format=torch.channels_last)
    bench, arms, seeds = Workbench(model), task.arms(question), iter(range(10**6))
    options: dict[str, Any] = {"precision": "bfloat16" if fast else "float32"}

    def run() -> None:
        if question == BEST:
            found.append(race_variants(bench, arms, task.batches, seed=next(seeds), **options).winners)
        else:
            whole = question == GAIN
            found.append(race_front(bench, arms, task.batches, seed=next(seeds), whole_losses=whole, **options).front)

    return run


def tables(task: Task) -> dict[str, dict[Variant, np.ndarray]]:
    """Right or wrong of every variant on every image, in both precisions."""
    variants = [v for arm in task.arms(GAIN) for v in (*arm.variants, arm.baseline)]
    bench = Workbench(copy.deepcopy(task.model).to(memory_format=torch.channels_last))
    exact = evaluate_variants(bench, variants, task.batches)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        rough = evaluate_variants(bench, variants, task.batches)
    named = {"float32": exact, "bfloat16": rough}
    return {name: dict(zip(variants, outcome.values, strict=True)) for name, outcome in named.items()}


def answer(task: Task, question: str, table: dict[Variant, np.ndarray]) -> tuple[int, ...]:
    """By trying everything on everything."""
    value, gain = [], []
    for arm in task.arms(GAIN):
        above = np.stack([table[v].astype(float) - table[arm.baseline] for v in arm.variants]).mean()
        value.append(np.stack([table[v] for v in arm.variants]).mean())
        gain.append(arm.factor * above if question == BEST or above > 0 else above)
    if question == BEST:
        return (int(np.argmax(gain)),)
    other = [sparsity for _, sparsity in task.points] if question == SPARSITY else gain
    return tuple(front(np.stack([value, other], 1), ["maximize", "maximize"]))


def replays(task: Task, question: str, known: dict[str, dict[Variant, np.ndarray]], fast: bool) -> Iterator[Any]:
    for repeat in range(REPEATS):
        generator = np.random.default_rng(repeat)
        images, seeds = generator.permutation(IMAGES), generator.permutation(VARIANTS)
        arms = [replace(arm, variants=tuple(arm.variants[s] for s in seeds)) for arm in task.arms(question)]

        def of(table: dict[Variant, np.ndarray], order: np.ndarray = images) -> Callable[..., np.ndarray]:
            return lambda variant, start, stop: table[variant][order[start:stop]]

        values, final = of(known["bfloat16" if fast else "float32"]), of(known["float32"]) if fast else None
        if question == BEST:
            yield race(arms, values, IMAGES, final=final)
        else:
            yield pareto_race(arms, values, IMAGES, final=final, whole_losses=question == GAIN)


def measure(task: Task, question: str, known: dict[str, dict[Variant, np.ndarray]], rounds: int) -> list[Row]:
    expected = answer(task, question, known["float32"])
    ways = {name: (name.startswith("bf"), "last" in name) for name in WAYS}
    # Many survive on a front, and in bfloat16 the survivors are evaluated twice.
    goals = {WAYS[0]: 20.0} if question == BEST else {WAYS[1]: 5.0}
    found: dict[str, list[Any]] = {name: [] for name in ways}
    runs: dict[str, Callable[[], None]] = {
        name: our_way(task, question, *way, found[name]) for name, way in ways.items()
    }
    times = timed_rounds({"papers": papers_way(task), **runs}, rounds, warm=0)
    papers = [t * task.candidates(question) / SAMPLE for t in times["papers"]]
    note = f"{task.candidates(question)} candidates, from {SAMPLE} of them; answer has {len(expected)}"
    rows = [Row(question, "papers' way, speed-up", median(papers), 1.0, 1.0, 1.0, note=note)]
    again = {fast: list(replays(task, question, known, fast)) for fast in (True, False)}
    for name, (fast, _) in ways.items():
        share = median(r.evaluated / r.full for r in again[fast])
        given = [r.winners if question == BEST else r.front for r in again[fast]]
        recall = mean(len(set(g) & set(expected)) / len(expected) for g in given)
        same = sum(g == expected for g in given)
        timed_right = sum(g == expected for g in found[name])
        goal = goals.get(name)
        note = f"{share:.1%} of the values; same answer in {timed_right} of {rounds}"
        rows.append(
            Row(question, f"speed-up: {name}", median(times[name]), *ratios(papers, times[name]), goal, True, note)
        )
        goal = 0.95 if question == BEST else 1.0
        note = f"same answer in {same} of {REPEATS}"
        rows.append(Row(question, f"recall: {name}", float("nan"), recall, recall, recall, goal, True, note))
    return rows


def main() -> None:
    flags = parser(__doc__, rounds=3)
    flags.add_argument("--case", default="", help="only questions whose name contains this")
    asked = flags.parse_args()
    steady()
    x, y, tested, labels = images()
    generator = np.random.default_rng(0)
    drawn = zip(generator.uniform(0.001, 0.1, POINTS), generator.uniform(0.01, 0.99, POINTS), strict=True)
    task = Task(trained(x, y), tested, labels, [(float(sigma), float(sparsity)) for sigma, sparsity in drawn])
    accuracy = by_copy(task, 0.0, 0.0)
    known: dict[str, Any] = {}
    took = timed(lambda: known.update(tables(task))) / 1e3
    print(f"accuracy of the network: {accuracy:.4f}; both complete tables took {took:.0f} s CPU")
    questions = [question for question in (BEST, SPARSITY, GAIN) if asked.case in question]
    rows = [row for question in questions for row in measure(task, question, known, asked.rounds)]
    title = f"{POINTS} points x {VARIANTS} variants x {IMAGES} images: speed-up of races over the papers' way; recall"
    report(title, rows, asked.rounds, asked.json)


if __name__ == "__main__":
    main()
