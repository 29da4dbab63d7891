"""One network by its numbers: made, saved, rebuilt in another process, measured on images held back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.analysis.cost import measure_cost
from secateur.analysis.latency import latency_ratio, measure_latency
from secateur.core.statistics import paired_examples
from secateur.lab.explore.problems import Problem, make_problem
from secateur.lab.explore.session import Session
from secateur.lab.explore.specs import DeliverSpec
from secateur.lab.final import save_and_reload
from secateur.lab.stages import latency_json

__all__ = ["deliver", "run"]


def run(session: Session, spec: DeliverSpec, folder: Path) -> dict[str, Any]:
    """What the numbers are worth, and the network itself."""
    problem = make_problem(session, spec)
    values = problem.values(spec.numbers, ("accuracy", "sparsity", "bytes"))
    return {
        "numbers": dict(spec.numbers),
        "values": values,
        "judged": session.counts[0],
        "delivered": deliver(session, problem, spec.numbers, values, folder),
    }


def deliver(
    session: Session, problem: Problem, numbers: Mapping[str, float], known: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """The file, and the network in it beside the dense one; `known` is what `problem.values` has found."""
    made, dense, context = problem.make(numbers, known), session.network, session.context
    extra = {"data": context.data.name, "recipe": session.recipe.name, "recipe_hash": session.recipe.hash}
    file, reloaded = save_and_reload(context, made.network, made.plans, folder, extra=extra, sparse=made.sparse)
    # Of the network that was read back from the file, not of the one it was made from.
    named = (("dense", dense), ("delivered", reloaded))
    pairs = {name: session.right(network, session.held).numpy() for name, network in named}
    found = paired_examples(pairs["delivered"], pairs["dense"])
    costs = {"dense": measure_cost(dense, context.example(1)), "delivered": measure_cost(reloaded, context.example(1))}
    example = context.example(min(64, session.counts[1]))
    times = measure_latency(
        {"dense": dense, "delivered": reloaded}, example, batch_size=len(example), rounds=15, min_time=0.005
    )
    ratio = latency_ratio(times["dense"], times["delivered"])
    return {
        "what": made.what,
        "cut": not made.sparse,
        "max_abs_diff": made.difference,
        "file": file,
        "held": int(pairs["dense"].size),
        "accuracy": {name: float(right.mean()) for name, right in pairs.items()},
        "difference": {"mean": found.mean, "low": found.low, "high": found.high, "p": found.p, "method": found.method},
        "costs": {n: {k: getattr(c, k) for k in ("params", "nonzero", "macs", "bytes")} for n, c in costs.items()},
        "latency": {
            **{name: latency_json(t) for name, t in times.items()},
            "ratio": {"median": ratio.median, "low": ratio.low, "high": ratio.high, "resolved": ratio.resolved},
        },
    }
