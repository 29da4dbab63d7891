"""One pass over the data gathers what all criteria at hand need; then each scores every target."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.granularity import Granularity, Unit
from secateur.core.targets import Target, Targets, unwrap
from secateur.criteria.base import Criterion, Evidence, Need
from secateur.criteria.observe import Activation, UnitOutputs
from secateur.criteria.statistics import ActivationStatistics, taylor_map
from secateur.errors import DataError, UsageError

__all__ = ["cell_scores", "gather_evidence", "score_targets"]

Batches = Iterable[Any]
Loss = Callable[[Any, Any], Tensor]
_STATISTICS = ("mean_abs", "variance", "zero_fraction")


def score_targets(
    model: nn.Module,
    targets: Targets,
    criteria: Sequence[Criterion],
    *,
    batches: Batches | None = None,
    loss: Loss | None = None,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Scores of every target under every criterion, from one shared pass over `batches`.

    Args:
        model: left as it was found (mode, gradients, hooks, requires_grad); evaluated in eval mode.
        batches: iterable of inputs or `(inputs, labels)`; needed by criteria that need data.
        loss: `loss(outputs, labels) -> scalar mean`; default cross-entropy.
        seed: for criteria that draw numbers.

    Returns: one `{target name: score}` per criterion; higher = keep.
    """
    needs: frozenset[Need] = frozenset().union(*(c.needs for c in criteria))
    evidence = gather_evidence(model, targets, needs, batches=batches, loss=loss, seed=seed)
    return [{t.name: _checked(c, evidence[t.name]) for t in targets} for c in criteria]


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
    seed: int = 0,
) -> dict[str, Evidence]:
    """Everything in `needs` for every target, streamed in one pass (one batch if only `"norm"` is needed)."""
    network = unwrap(model)
    parameters = targets.tensors(network)
    collected: dict[str, dict[str, Tensor]] = {t.name: {} for t in targets}
    if needs - {"weights"}:
        if batches is None:
            raise UsageError(
                f"criteria that need {', '.join(sorted(needs - {'weights'}))} need data; "
                "pass batches=[(inputs, labels), ...]"
            )
        gatherer = _Gatherer(network, parameters, needs, loss or nn.functional.cross_entropy)
        gatherer.run(batches)
        collected = gatherer.results(targets)
    return {
        t.name: Evidence(target=t, weight=parameters[t.name].detach(), seed=seed, **collected[t.name]) for t in targets
    }


class _Gatherer:
    def __init__(
        self, model: nn.Module, parameters: dict[str, nn.Parameter], needs: frozenset[Need], loss: Loss
    ) -> None:
        self.model, self.parameters, self.needs, self.loss = model, parameters, needs, loss
        self.backward = bool(needs & {"gradients", "activation_gradients"})
        wanted = [s for s in _STATISTICS if s in needs]
        self.statistics = {n: ActivationStatistics(wanted) for n in parameters}
        self.taylor: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.samples = 0
        self.seen: set[str] = set()
        self._batch = 0
        self.watch = UnitOutputs({id(p): n for n, p in parameters.items()}, self._on_output)

    def run(self, batches: Batches) -> None:
        with _undisturbed(self.model, self.parameters if self.backward else {}):
            for batch in batches:
                inputs, labels = batch if isinstance(batch, list | tuple) and len(batch) == 2 else (batch, None)
                self._batch = _samples(inputs, labels)
                if not self._batch:
                    continue
                # The caller may be inside no_grad.
                with torch.set_grad_enabled(self.backward):
                    self._one(inputs, labels)
                self.samples += self._batch
                if not self.needs - {"weights", "norm"}:
                    break
        if not self.samples:
            raise DataError("scoring: the batches are empty; expected at least one (inputs, labels)")

    def _one(self, inputs: Any, labels: Any) -> None:
        with self.watch:
            outputs = self.model(inputs)
            self.watch.finish()
        if not self.backward:
            return
        if labels is None:
            raise UsageError("criteria that need gradients need labels: pass batches of (inputs, labels)")
        value = self.loss(outputs, labels)
        if not bool(torch.isfinite(value)):
            raise DataError(
                f"scoring: the loss is {float(value.detach())} after {self.samples} samples; expected a finite number"
            )
        names, tensors = list(self.parameters), list(self.parameters.values())
        for name, gradient in zip(names, torch.autograd.grad(value, tensors, allow_unused=True), strict=True):
            if "gradients" in self.needs and gradient is not None:
                weighted = gradient.detach() * self._batch
                self.gradients[name] = self.gradients[name].add_(weighted) if name in self.gradients else weighted

    def _on_output(self, activation: Activation, clobbered: bool) -> None:
        name, value, axis, nonnegative = activation
        self.seen.add(name)
        self.statistics[name].update(value, axis, nonnegative)
        if "activation_gradients" in self.needs and value.requires_grad:
            kept = value.detach().clone() if clobbered else value.detach()
            samples = self._batch

            def on_gradient(gradient: Tensor) -> None:
                # The loss is a mean over the batch: undo its 1 / batch to speak per sample.
                total = taylor_map(kept, gradient * samples, axis)
                self.taylor[name] = self.taylor[name] + total if name in self.taylor else total

            value.register_hook(on_gradient)

    def results(self, targets: Targets) -> dict[str, dict[str, Tensor]]:
        by_id = {id(p): p for p in self.model.parameters()}
        found: dict[str, dict[str, Tensor]] = {}
        for target in targets:
            name = target.name
            entry: dict[str, Tensor] = {}
            for statistic in _STATISTICS:
                if statistic in self.needs:
                    self._require(name in self.seen, name, "its activation was never seen")
                    entry[statistic] = getattr(self.statistics[name], statistic)
            if "activation_gradients" in self.needs:
                self._require(name in self.taylor, name, "no gradient reached its activation")
                entry["activation_gradient"] = self.taylor[name] / self.samples
            if "gradients" in self.needs:
                self._require(name in self.gradients, name, "no gradient reached it")
                entry["gradient"] = self.gradients[name] / self.samples
            if "norm" in self.needs:
                self._require(name in self.watch.norms, name, "no BatchNorm follows it directly")
                entry["norm_scale"] = by_id[self.watch.norms[name]].detach()
            found[name] = entry
        return found

    def _require(self, met: bool, name: str, why: str) -> None:
        if not met:
            raise UsageError(
                f'layer "{name}" cannot be scored: {why} during the forward pass; '
                "exclude it from the targets or choose another criterion"
            )


def _samples(inputs: Any, labels: Any) -> int:
    """Samples in a batch: the length of its labels, or of the first tensor in its inputs."""
    if isinstance(labels, Tensor) and labels.dim():
        return len(labels)
    while not isinstance(inputs, Tensor):
        values = list(inputs.values()) if isinstance(inputs, dict) else list(inputs)
        if not values:
            raise DataError("scoring: a batch holds no tensor; expected inputs, or (inputs, labels)")
        inputs = values[0]
    return len(inputs)


@contextmanager
def _undisturbed(model: nn.Module, needing_grad: dict[str, nn.Parameter]) -> Any:
    """Eval mode and gradients where needed; every flag put back afterwards."""
    training = [m for m in model.modules() if m.training]
    flags = {p: p.requires_grad for p in needing_grad.values()}
    try:
        if training:
            model.eval()
        for parameter in flags:
            parameter.requires_grad_(True)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
