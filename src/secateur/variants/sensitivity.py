"""How much each layer can lose: every layer pruned alone, against the dense network on the same examples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.core.statistics import Interval
from secateur.errors import UsageError
from secateur.variants.evaluate import Score, evaluate_variants, right_or_wrong
from secateur.variants.kinds import LayerSparsity
from secateur.variants.outcome import Cost
from secateur.variants.workbench import Workbench

__all__ = ["LayerStep", "Sensitivity", "sensitivity"]


@dataclass(frozen=True)
class LayerStep:
    """One layer at one sparsity.

    Args:
        sparsity: fraction of the layer's weights removed.
        mean: of the score over the examples.
        difference: mean minus the dense network's, paired by example, with an interval.
    """

    sparsity: float
    mean: float
    difference: Interval


@dataclass(frozen=True)
class Sensitivity:
    """What pruning each layer alone does.

    Args:
        dense: mean score of the network as it is.
        layers: target name -> a step for each sparsity, in the order asked for.
        cost: what the evaluation took.
    """

    dense: float
    layers: dict[str, tuple[LayerStep, ...]]
    cost: Cost

    def rows(self) -> list[dict[str, Any]]:
        """For a table: one row a layer and sparsity."""
        return [
            {
                "layer": name,
                "sparsity": step.sparsity,
                "mean": step.mean,
                "difference": step.difference.mean,
                "low": step.difference.low,
                "high": step.difference.high,
            }
            for name, steps in self.layers.items()
            for step in steps
        ]


def sensitivity(
    bench: Workbench,
    batches: Iterable[Any],
    sparsities: Sequence[float],
    *,
    layers: Sequence[str] | None = None,
    criterion: str = "magnitude",
    score: Score = right_or_wrong,
    **options: Any,
) -> Sensitivity:
    """The score of the network with one layer pruned, for every layer and sparsity.

    Args:
        bench: the network; left as it was found.
        batches: `(inputs, labels)`, read once.
        sparsities: fractions of a layer's weights removed, each in [0, 1).
        layers: names of layers or their weights; default: all targets of the bench.
        criterion: name of the criterion that ranks a layer's weights.
        score: `(outputs, labels)` -> one value an example.
        options: `recalibrate`, `journal`, `hold` and `progress` of `evaluate_variants`.

    Raises: `UsageError` for no sparsities, or none in range; `UnknownNameError` for an unknown layer.

    Cost: a pass over the data for each layer and sparsity, and one for the dense network.

    Intervals are for one comparison each; for a claim about the worst of many, adjust the p-values (`holm`).
    """
    if not len(sparsities):
        raise UsageError("sensitivity: no sparsities given; expected at least one, each in [0, 1)")
    chosen = bench.targets.names if layers is None else layers
    if not chosen:
        raise UsageError("sensitivity: layers is empty; leave it out to try all of them")
    names = list(dict.fromkeys(bench.target(name).name for name in chosen))
    dense = LayerSparsity(names[0], 0.0, criterion)
    steps = {name: [LayerSparsity(name, s, criterion) for s in sparsities] for name in names}
    variants = [dense, *(step for several in steps.values() for step in several)]
    outcome = evaluate_variants(bench, list(dict.fromkeys(variants)), batches, score=score, **options)
    return Sensitivity(
        dense=float(outcome.of(dense).mean(dtype="float64")),
        layers={
            name: tuple(
                LayerStep(v.sparsity, float(outcome.of(v).mean(dtype="float64")), outcome.difference(v, dense))
                for v in several
            )
            for name, several in steps.items()
        },
        cost=outcome.cost,
    )
