"""One pass over the data gathers what all criteria at hand need; then each scores every target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.granularity import Granularity, Unit
from secateur.core.targets import Target, Targets, unwrap
from secateur.criteria.base import Criterion, Evidence, Need
from secateur.criteria.gathering.ablation_loss import ablation_loss
from secateur.criteria.gathering.batches import Batches, Loss, finite, labelled, read, undisturbed
from secateur.criteria.gathering.hessian_gradient import hessian_gradient
from secateur.criteria.gathering.input_norm import InputNorm
from secateur.criteria.gathering.synaptic_flow import synaptic_flow
from secateur.criteria.gathering.zero_maps import ZeroMaps
from secateur.criteria.observe import Activation, UnitOutputs
from secateur.criteria.statistics import ActivationStatistics, taylor_map
from secateur.errors import UsageError

__all__ = ["Batches", "Loss", "cell_scores", "gather_evidence", "score_targets"]

_STATISTICS = ("mean_abs", "variance", "zero_fraction")
_NO_DATA = frozenset({"weights", "learned"})
# How often each of these reads the batches by itself; all other kinds share one pass.
_OWN_PASSES = {"hessian_gradient": 2, "synaptic_flow": 1, "ablation_loss": 1}


def score_targets(
    model: nn.Module,
    targets: Targets,
    criteria: Sequence[Criterion],
    *,
    batches: Batches | None = None,
    loss: Loss | None = None,
    learned: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Scores of every target under every criterion, from one shared pass over `batches`.

    Score between optimizer steps: in the middle of one the weights may hold an attached regularizer's noise.

    Args:
        model: left as it was found (mode, gradients, hooks, requires_grad); evaluated in eval mode.
        batches: iterable of inputs or `(inputs, labels)`; needed by criteria that need data. Evidence that takes
            passes of its own (Hessian, synaptic flow, ablation) reads it again, so an iterator is then kept in memory.
        loss: `loss(outputs, labels) -> scalar mean`; default cross-entropy.
        learned: target name -> `[units]` or parameter-shaped scores of a regularizer (`attachment.scores()`).
        seed: for criteria that draw numbers.

    Returns: one `{target name: score}` per criterion; higher = keep.
    """
    needs: frozenset[Need] = frozenset().union(*(c.wanted() for c in criteria))
    temperatures = {c.temperature for c in criteria if "hessian_gradient" in c.wanted()} or {1.0}
    if len(temperatures) > 1:
        raise UsageError(f"one pass divides outputs by one temperature, got {sorted(temperatures)}; score one by one")
    evidence = gather_evidence(
        model, targets, needs, batches=batches, loss=loss, learned=learned, seed=seed, temperature=temperatures.pop()
    )
    return [c.jointly({t.name: _checked(c, evidence[t.name]) for t in targets}) for c in criteria]


def cell_scores(
    criterion: Criterion, granularity: Granularity, targets: Targets, scores: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Scores as `score_targets` gives them, pooled to the cells of a granularity."""
    return {t.name: _cells(criterion, granularity, t, scores[t.name]) for t in targets}


def _cells(criterion: Criterion, granularity: Granularity, target: Target, score: Tensor) -> Tensor:
    if tuple(score.shape) == target.shape and "weight" in criterion.granularities:
        return granularity.pool(target, score, criterion.pool)
    if not isinstance(granularity, Unit):
        raise UsageError(
            f"{type(criterion).__name__} gives one score per unit, but the granularity is "
            f"{granularity}; use granularity unit"
        )
    return score


def _checked(criterion: Criterion, evidence: Evidence) -> Tensor:
    score = criterion.score(evidence)
    target = evidence.target
    if tuple(score.shape) not in (target.shape, (target.units,)):
        raise UsageError(
            f"{type(criterion).__name__}.score returned shape {list(score.shape)} for {target.name}; "
            f"expected the parameter's {list(target.shape)} or one per unit [{target.units}]"
        )
    return score.detach()


def gather_evidence(
    model: nn.Module,
    targets: Targets,
    needs: frozenset[Need],
    *,
    batches: Batches | None = None,
    loss: Loss | None = None,
    learned: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    temperature: float = 1.0,
) -> dict[str, Evidence]:
    """Everything in `needs` for every target, streamed in one pass (one batch if only `"norm"` is needed)."""
    network = unwrap(model)
    parameters = targets.tensors(network)
    collected: dict[str, dict[str, Tensor]] = {t.name: {} for t in targets}
    if "learned" in needs:
        collected = {t.name: {"learned": _learned(t, parameters[t.name], learned)} for t in targets}
    if needs - _NO_DATA:
        if batches is None:
            raise UsageError(
                f"criteria that need {', '.join(sorted(needs - _NO_DATA))} need data; "
                "pass batches=[(inputs, labels), ...]"
            )
        shared: frozenset[Need] = frozenset(needs - _NO_DATA - _OWN_PASSES.keys())
        if bool(shared) + sum(n for need, n in _OWN_PASSES.items() if need in needs) > 1 and iter(batches) is batches:
            batches = list(batches)
        loss = loss or nn.functional.cross_entropy
        if shared:
            gatherer = _Gatherer(network, targets, shared, loss)
            gatherer.run(batches)
            for name, entry in gatherer.results().items():
                collected[name] |= entry
        for need in _OWN_PASSES.keys() & needs:
            found = _own_pass(need, network, targets, batches, loss, temperature)
            for name in parameters:
                _require(name in found, name, "no gradient reached it")
                collected[name][need] = found[name]
    return {
        t.name: Evidence(target=t, weight=parameters[t.name].detach(), seed=seed, **collected[t.name]) for t in targets
    }


def _own_pass(
    need: str, network: nn.Module, targets: Targets, batches: Batches, loss: Loss, temperature: float
) -> dict[str, Tensor]:
    if need == "hessian_gradient":
        return hessian_gradient(network, targets.tensors(network), batches, loss, temperature)
    if need == "synaptic_flow":
        inputs, _, _ = next(read(batches))
        return synaptic_flow(network, targets, inputs)
    return ablation_loss(network, targets, batches, loss)


def _learned(target: Target, weight: Tensor, learned: Mapping[str, Tensor] | None) -> Tensor:
    if not learned:
        raise UsageError(
            "criteria that need learned need the scores of a regularizer that learns some; "
            "pass learned=attachment.scores()"
        )
    name = next((n for n in (target.name, *target.aliases) if n in learned), None)
    if name is None:
        raise UsageError(
            f'learned: no score of "{target.name}"; got {", ".join(list(learned)[:3])}, ...: exclude it from the '
            "targets, or attach the regularizer to it"
        )
    if tuple(learned[name].shape) not in (target.shape, (target.units,)):
        raise UsageError(
            f'learned: the score of "{name}" has shape {list(learned[name].shape)}; expected the parameter\'s '
            f"{list(target.shape)} or one per unit [{target.units}]: the scores belong to another network"
        )
    return learned[name].detach().to(weight.device)


def _require(met: bool, name: str, why: str) -> None:
    if not met:
        raise UsageError(
            f'layer "{name}" cannot be scored: {why} during the forward pass; '
            "exclude it from the targets or choose another criterion"
        )


class _Gatherer:
    """The pass that activations, gradients, norms and inputs share."""

    def __init__(self, model: nn.Module, targets: Targets, needs: frozenset[Need], loss: Loss) -> None:
        self.model, self.targets, self.needs, self.loss = model, targets, needs, loss
        self.parameters = parameters = targets.tensors(model)
        self.backward = bool(needs & {"gradients", "activation_gradients"})
        wanted = [s for s in _STATISTICS if s in needs]
        self.statistics = {n: ActivationStatistics(wanted) for n in parameters}
        self.zero_maps: dict[str, ZeroMaps] = {}
        self.inputs: dict[str, InputNorm] = {}
        self.taylor: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.samples = 0
        self.seen: set[str] = set()
        self._batch = 0
        on_call = self._on_call if "input_norm" in needs else None
        self.watch = UnitOutputs({id(p): n for n, p in parameters.items()}, self._on_output, on_call)

    def run(self, batches: Batches) -> None:
        with undisturbed(self.model, self.parameters.values() if self.backward else ()):
            for inputs, labels, count in labelled(batches) if self.backward else read(batches):
                self._batch = count
                # The caller may be inside no_grad.
                with torch.set_grad_enabled(self.backward):
                    self._one(inputs, labels)
                self.samples += count
                if not self.needs - {"norm"}:
                    break

    def _one(self, inputs: Any, labels: Any) -> None:
        with self.watch:
            outputs = self.model(inputs)
            self.watch.finish()
        if not self.backward:
            return
        value = finite(self.loss(outputs, labels), self.samples)
        names, tensors = list(self.parameters), list(self.parameters.values())
        for name, gradient in zip(names, torch.autograd.grad(value, tensors, allow_unused=True), strict=True):
            if "gradients" in self.needs and gradient is not None:
                weighted = gradient.detach() * self._batch
                self.gradients[name] = self.gradients[name].add_(weighted) if name in self.gradients else weighted

    def _on_call(self, name: str, call: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if name not in self.inputs:
            self.inputs[name] = InputNorm(self.targets[name])
        self.inputs[name].update(call, args, kwargs, output)

    def _on_output(self, activation: Activation, clobbered: bool) -> None:
        name, value, axis, nonnegative = activation
        self.seen.add(name)
        self.statistics[name].update(value, axis, nonnegative)
        if "zero_map_fraction" in self.needs:
            self.zero_maps.setdefault(name, ZeroMaps()).update(value, axis)
        if "activation_gradients" in self.needs and value.requires_grad:
            kept = value.detach().clone() if clobbered else value.detach()
            samples = self._batch

            def on_gradient(gradient: Tensor) -> None:
                # The loss is a mean over the batch: undo its 1 / batch to speak per sample.
                total = taylor_map(kept, gradient * samples, axis)
                self.taylor[name] = self.taylor[name] + total if name in self.taylor else total

            value.register_hook(on_gradient)

    def results(self) -> dict[str, dict[str, Tensor]]:
        by_id = {id(p): p for p in self.model.parameters()}
        found: dict[str, dict[str, Tensor]] = {}
        for name in self.parameters:
            entry: dict[str, Tensor] = {}
            for statistic in _STATISTICS:
                if statistic in self.needs:
                    _require(name in self.seen, name, "its activation was never seen")
                    entry[statistic] = getattr(self.statistics[name], statistic)
            if "zero_map_fraction" in self.needs:
                _require(name in self.seen, name, "its activation was never seen")
                entry["zero_map_fraction"] = self.zero_maps[name].fraction
            if "input_norm" in self.needs:
                _require(name in self.inputs, name, "its input was never seen")
                entry["input_norm"] = self.inputs[name].norm
            if "activation_gradients" in self.needs:
                _require(name in self.taylor, name, "no gradient reached its activation")
                entry["activation_gradient"] = self.taylor[name] / self.samples
            if "gradients" in self.needs:
                _require(name in self.gradients, name, "no gradient reached it")
                entry["gradient"] = self.gradients[name] / self.samples
            if "norm" in self.needs:
                _require(name in self.watch.norms, name, "no BatchNorm follows it directly")
                entry["norm_scale"] = by_id[self.watch.norms[name]].detach()
            found[name] = entry
        return found
