"""What a search varies: noise and sparsity of single weights, or the units that each dependency group loses."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur.analysis.latency import latency_ratio, measure_latency
from secateur.core.groups import Groups
from secateur.core.targets import find_targets
from secateur.criteria.magnitude import Magnitude
from secateur.errors import NoEffectError, SecateurError, UsageError
from secateur.lab.explore.session import Session
from secateur.lab.explore.specs import PointSpec
from secateur.lab.plugins import make_criterion
from secateur.lab.rows import cut_copy
from secateur.search.objectives import accuracy_and_gain
from secateur.search.space import Float, Space
from secateur.sparsify.ranking import UnitRanking, rank_units
from secateur.surgery.packed import pack
from secateur.surgery.plan import Plan, make_plan
from secateur.variants.evaluate import evaluate_variants
from secateur.variants.kinds import NoisyPrune
from secateur.variants.renew import renew_statistics_, renewed_statistics

__all__ = ["DIRECTIONS", "Made", "Problem", "make_problem", "stored_bytes", "units_of"]

DIRECTIONS: dict[str, Literal["maximize", "minimize"]] = {
    "accuracy": "maximize",
    "sparsity": "maximize",
    "gain": "maximize",
    "latency": "minimize",
    "bytes": "minimize",
}
_ROUNDS = 12


@dataclass(frozen=True)
class Made:
    """One network of a search, as it can be delivered.

    Args:
        network: in eval mode, on the run's device.
        plans: what was cut; empty where nothing was.
        sparse: whether it differs by zeros among its weights, and is worth storing sparse.
        difference: max |masked - cut| on test images; None where nothing was cut, or nothing could be proved.
        what: which network it is, in words.
    """

    network: nn.Module
    plans: tuple[Plan, ...]
    sparse: bool
    difference: float | None
    what: str


class Problem(ABC):
    """Numbers to networks, and networks to values."""

    def __init__(self, session: Session, spec: PointSpec) -> None:
        self.session, self.spec = session, spec
        # What was left out of the search, and why.
        self.notes: list[str] = []

    @abstractmethod
    def space(self, spec: Any) -> Space:
        """What a search section searches over."""

    @abstractmethod
    def values(self, numbers: Mapping[str, float], names: Collection[str]) -> dict[str, Any]:
        """The objectives `names`, and what else is worth keeping, by the images judged by."""

    @abstractmethod
    def make(self, numbers: Mapping[str, float], known: Mapping[str, Any] | None = None) -> Made:
        """The network itself; `known` is what `values` has found about it, if that was kept."""

    def latencies(self, models: Sequence[nn.Module]) -> list[float]:
        """Time of each, as a share of the dense network's; all are measured in turn, so that a busy machine is fair."""
        example = self.session.context.example(64)
        named = {"dense": self.session.network, **{str(number): model for number, model in enumerate(models)}}
        times = measure_latency(named, example, batch_size=len(example), rounds=_ROUNDS, min_time=0.002)
        return [1.0 / latency_ratio(times["dense"], times[str(number)]).median for number in range(len(models))]

    def share(self, model: nn.Module) -> float:
        """Accuracy on the images judged by."""
        right, count = self.session.accuracy(model, self.session.judged)
        return right / count


class WeightProblem(Problem):
    """Stochastic pruning: sigma and sparsity; some networks a point, whose mean counts."""

    def __init__(self, session: Session, spec: PointSpec) -> None:
        super().__init__(session, spec)
        self._criterion = str(spec.criterion["name"])
        self._bench = session.bench({self._criterion: spec.criterion})

    def space(self, spec: Any) -> Space:
        return Space((Float("sigma", *spec.sigma), Float("sparsity", *spec.sparsity)))

    def _variants(self, numbers: Mapping[str, float]) -> list[NoisyPrune]:
        _check_names(numbers, ("sigma", "sparsity"))
        return [
            NoisyPrune(numbers["sigma"], numbers["sparsity"], seed, self._criterion)
            for seed in range(self.spec.variants)
        ]

    def _accuracies(self, variants: list[NoisyPrune]) -> list[float]:
        outcome = evaluate_variants(
            self._bench, variants, self.session.judged, recalibrate=self.session.renewing, progress=self._progress
        )
        return [float(mean) for mean in outcome.means()]

    def _progress(self, done: int, of: int) -> None:
        self.session.listener.check_stop()

    def values(self, numbers: Mapping[str, float], names: Collection[str]) -> dict[str, Any]:
        variants = self._variants(numbers)
        plain = [NoisyPrune(0.0, numbers["sparsity"], 0, self._criterion)] if "gain" in names else []
        found = self._accuracies([*variants, *plain])
        noisy = found[: len(variants)]
        values: dict[str, Any] = {"accuracy": sum(noisy) / len(noisy), "sparsity": numbers["sparsity"]}
        if plain:
            values |= accuracy_and_gain(noisy, found[-1], numbers["sparsity"]) | {"plain": found[-1]}
        if "bytes" in names:
            with self._bench.variant(variants[0]) as model:
                values["bytes"] = _packed_bytes(model)
        return {**values, "accuracies": noisy}

    def make(self, numbers: Mapping[str, float], known: Mapping[str, Any] | None = None) -> Made:
        variants = self._variants(numbers)
        accuracies = (known or {}).get("accuracies") or self._accuracies(variants)
        best = variants[max(range(len(variants)), key=accuracies.__getitem__)]
        with self._bench.variant(best) as model, renewed_statistics(model, self.session.renewing):
            network = copy.deepcopy(model)
        of = f", the best of {len(variants)} by the images judged by" if len(variants) > 1 else ""
        what = f"noise of sigma {best.sigma:.4g} (seed {best.seed}), then {best.sparsity:.1%} of weights removed"
        return Made(network.eval(), (), True, None, f"{what} by {self._criterion}{of}")


class UnitProblem(Problem):
    """The share of units that each dependency group loses, those of lowest score first; cut for real in every trial."""

    def __init__(self, session: Session, spec: PointSpec) -> None:
        super().__init__(session, spec)
        context = session.context
        ranking = rank_units(
            session.network,
            make_criterion(spec.criterion, context.options.allow_code),
            context.groups,
            targets=session.targets,
            batches=session.scored,
        )
        self._ranking, notes = _cuttable(session, session.network, ranking)
        self.notes += notes

    def space(self, spec: Any) -> Space:
        return Space(tuple(Float(name, *spec.sparsity) for name in self._ranking.groups.names))

    def _kept(self, numbers: Mapping[str, float]) -> dict[str, Tensor]:
        _check_names(numbers, self._ranking.groups.names)
        return self._ranking.kept(dict(numbers))

    def values(self, numbers: Mapping[str, float], names: Collection[str]) -> dict[str, Any]:
        self.session.listener.check_stop()
        made, kept = self.make(numbers), self._kept(numbers)
        units = sum(k.numel() for k in kept.values())
        values: dict[str, Any] = {
            "accuracy": self.share(made.network),
            "sparsity": sum(int((~k).sum()) for k in kept.values()) / units,
            "bytes": stored_bytes(made.network),
            "max_abs_diff": made.difference,
        }
        if "latency" in names:
            (values["latency"],) = self.latencies([made.network])
        return values

    def make(self, numbers: Mapping[str, float], known: Mapping[str, Any] | None = None) -> Made:
        kept = self._kept(numbers)
        groups = self._ranking.groups
        smaller, difference = cut_copy(self.session.context, self.session.network, groups, kept)
        removed = sum(int((~k).sum()) for k in kept.values())
        plans = (make_plan(self.session.network, groups, kept),) if removed else ()
        if self.session.renewing is not None:
            renew_statistics_(smaller, self.session.renewing)
        what = f"{removed} of {sum(k.numel() for k in kept.values())} units cut"
        return Made(smaller.eval(), plans, False, difference, what)


def make_problem(session: Session, spec: PointSpec) -> Problem:
    """What `spec.vary` says."""
    return (WeightProblem if spec.vary == "weights" else UnitProblem)(session, spec)


def units_of(session: Session) -> Sequence[str]:
    """The groups whose units a search may vary: they depend on the network's shape, not on its weights.

    Some may turn out not to be cut alone; that is tried on the trained network only, since one that is not trained
    may have parts that do nothing yet, which prove nothing.

    Raises: `NoEffectError` if there are none.
    """
    network, recipe = session.context.model(session.recipe.seed), session.recipe
    targets = find_targets(network, recipe.include, recipe.excluded)
    return rank_units(network, Magnitude(), session.context.groups, targets=targets).groups.names


def _cuttable(session: Session, network: nn.Module, ranking: UnitRanking) -> tuple[UnitRanking, list[str]]:
    """Without the groups that cannot be cut whatever the others lose, as where sizes are written into the code."""
    good, notes = [], []
    for group in ranking.groups:
        session.listener.check_stop()
        kept = ranking.kept({g.name: 0.5 if g is group else 0.0 for g in ranking.groups})
        try:
            cut_copy(session.context, network, ranking.groups, kept)
            good.append(group)
        except SecateurError as error:
            notes.append(f'the units of "{group.name}" stay: {str(error).partition(";")[0]}')
    if not good:
        raise NoEffectError(f"no group of units can be cut: {'; '.join(notes[:2]) or 'no layer has one of its own'}")
    scores = {group.name: ranking.scores[group.name] for group in good}
    return replace(ranking, groups=Groups(good, ranking.groups.untraced), scores=scores), notes


def _check_names(numbers: Mapping[str, float], expected: Collection[str]) -> None:
    missing, unknown = sorted(set(expected) - numbers.keys()), sorted(numbers.keys() - set(expected))
    if missing or unknown:
        said = f"lack {missing[0]}" if missing else f"have {unknown[0]} besides"
        raise UsageError(f"numbers {said}; expected {', '.join(expected)}")


@torch.no_grad()
def _packed_bytes(model: nn.Module) -> int:
    """Bytes of the network as it is stored sparse: a bit a weight and the weights that are not zero, or dense."""
    total = 0
    for parameter in model.parameters():
        bits, kept = pack(parameter.cpu())
        total += min(bits.nbytes + kept.nbytes, parameter.nbytes)
    return total + sum(buffer.nbytes for buffer in model.buffers())


def stored_bytes(model: nn.Module) -> int:
    """Bytes of its tensors as they are stored dense."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())
