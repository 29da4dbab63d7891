"""How much each layer can lose: pruned alone, judged against the whole network on the same images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.core.statistics import holm
from secateur.lab.explore.sensitivity_spec import SensitivitySpec
from secateur.lab.explore.session import Session
from secateur.variants.sensitivity import sensitivity

__all__ = ["run"]


def run(session: Session, spec: SensitivitySpec, folder: Path) -> dict[str, Any]:
    """One row a layer; p-values are corrected over all comparisons of the section."""
    name, listener = str(spec.criterion["name"]), session.listener

    def progress(done: int, of: int) -> None:
        listener.advanced(done, f"{done} of {of} evaluations")
        listener.check_stop()

    bench = session.bench({name: spec.criterion})
    found = sensitivity(
        bench,
        session.judged,
        sorted(spec.sparsities),
        criterion=name,
        recalibrate=session.renewing,
        journal=folder / "layers.jsonl",
        progress=progress,
    )
    layers: list[dict[str, Any]] = [
        {
            "layer": bench.target(layer).module,
            "weights": bench.target(layer).numel,
            "steps": [
                {
                    "sparsity": step.sparsity,
                    "accuracy": step.mean,
                    "change": step.difference.mean,
                    "low": step.difference.low,
                    "high": step.difference.high,
                    "p": step.difference.p,
                }
                for step in steps
            ],
        }
        for layer, steps in found.layers.items()
    ]
    every = [step for layer in layers for step in layer["steps"]]
    tested = [step for step in every if step["p"] is not None]
    for step, p in zip(tested, holm([step["p"] for step in tested]), strict=True):
        step["p_holm"] = p
    methods = dict.fromkeys(step.difference.method for steps in found.layers.values() for step in steps)
    return {
        "criterion": name,
        "count": session.counts[0],
        "dense": found.dense,
        "layers": layers,
        "intervals": list(methods),
        "examples": found.cost.examples,
    }
