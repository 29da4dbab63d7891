"""Accuracy, with counts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from secateur.lab.runtime import Runtime

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """How many of `count` samples were right, and their mean cross-entropy. Top-5 needs at least 6 classes."""

    correct: int
    correct5: int | None
    count: int
    loss: float

    @property
    def top1(self) -> float:
        return self.correct / self.count

    @property
    def top5(self) -> float | None:
        return None if self.correct5 is None else self.correct5 / self.count


def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], runtime: Runtime) -> Evaluation:
    """Evaluate in eval mode; the model's mode is put back."""
    correct = correct5 = count = classes = 0
    loss = 0.0
    with runtime.evaluating(model):
        for batch in batches:
            inputs, labels = runtime.to_device(*batch)
            outputs = model(inputs).float()
            classes = outputs.shape[1]
            ranked = outputs.topk(min(5, classes), dim=1).indices == labels[:, None]
            correct += int(ranked[:, 0].sum())
            correct5 += int(ranked.sum())
            count += len(labels)
            loss += float(nn.functional.cross_entropy(outputs, labels, reduction="sum"))
    return Evaluation(correct, correct5 if classes > 5 else None, count, loss / max(1, count))
