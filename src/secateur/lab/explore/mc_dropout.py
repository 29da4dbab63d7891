"""What a network does not know: mean predictions of noisy passes, by dropout or by masks over its units."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secateur.analysis.mc_dropout import mc_predict
from secateur.core.targets import find_targets
from secateur.errors import NoEffectError
from secateur.lab.explore.analyses_spec import AnalysesSpec
from secateur.lab.explore.session import Session
from secateur.variants.kinds import UnitMasks
from secateur.variants.workbench import Workbench

__all__ = ["mc_dropout"]


def mc_dropout(session: Session, spec: AnalysesSpec) -> dict[str, Any]:
    """Accuracy and mean predictive entropy (nats) against the number of passes, on the images judged by.

    Noise is the network's own dropout; where it has none, every pass has a unit mask of a seed of its own, the same
    for all images, and the last layer's units stay. Entropy is that of the mean of the softmax outputs.
    """
    labels = torch.cat([labels for _, labels in session.judged])
    with torch.no_grad():
        single = torch.cat([_softmax(session.network(inputs)) for inputs, _ in session.judged])
    passes = sorted(spec.passes)
    try:
        noise, means = "dropout", _by_dropout(session, spec, passes)
    except NoEffectError:
        noise, means = "unit masks", _by_masks(session, spec, passes)
    rows = [{"passes": count, **_judged(means[count], labels)} for count in passes]
    return {"noise": noise, "drop_rate": spec.drop_rate, "single": _judged(single, labels), "rows": rows}


def _by_dropout(session: Session, spec: AnalysesSpec, passes: list[int]) -> dict[int, Tensor]:
    found = {}
    for count in passes:
        session.listener.check_stop()
        prediction = mc_predict(session.network, session.judged, passes=count, seed=spec.seed, transform=_softmax)
        found[count] = prediction.mean
    return found


def _by_masks(session: Session, spec: AnalysesSpec, passes: list[int]) -> dict[int, Tensor]:
    # A mask over the last layer would drop classes.
    targets = find_targets(session.network, session.recipe.include, (*session.recipe.excluded, "@last"))
    bench = Workbench(session.network, targets, batches=session.scored)
    found, total = {}, torch.zeros(())
    for number in range(passes[-1]):
        session.listener.check_stop()
        mask = UnitMasks(spec.drop_rate, seed=spec.seed + number)
        with bench.variant(mask) as model, torch.no_grad():
            drawn = torch.cat([_softmax(model(inputs)) for inputs, _ in session.judged])
        total = total.to(drawn.device) + drawn.double()
        if number + 1 in passes:
            found[number + 1] = total / (number + 1)
    return found


def _softmax(outputs: Tensor) -> Tensor:
    return outputs.float().softmax(dim=1)


def _judged(shares: Tensor, labels: Tensor) -> dict[str, Any]:
    right = shares.argmax(dim=1) == labels
    entropy = torch.special.entr(shares.double()).sum(dim=1)
    of = {"right": entropy[right], "wrong": entropy[~right]}
    return {
        "right": int(right.sum()),
        "count": len(labels),
        "entropy": float(entropy.mean()),
        # None where there are none of them.
        **{f"entropy_{name}": float(values.mean()) if len(values) else None for name, values in of.items()},
    }
