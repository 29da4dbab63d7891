"""Gradual magnitude pruning at work: masks that only ever shrink, applied after every step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from secateur.core.duration import Progress
from secateur.core.masks import Masks
from secateur.core.select import select
from secateur.core.targets import Target, Targets
from secateur.errors import CheckpointError
from secateur.regularizers.attachment import Attachment
from secateur.regularizers.gradual_pruning import GradualPruning

__all__ = ["GradualPruner"]


class GradualPruner(Attachment):
    """Zeroes the smallest weights or units, more of them at each update of the schedule."""

    def __init__(self, spec: GradualPruning, model: nn.Module, targets: Targets | None, seed: int) -> None:
        super().__init__(spec, model, targets, seed)
        self._gradual = spec
        self._gone: dict[str, Tensor] = {}
        self._reached = 0.0

    def _trained(self) -> list[Target]:
        return [t for t in self.targets if self.parameters[t.name].requires_grad]

    def after_step(self, progress: Progress) -> None:
        super().after_step(progress)
        sparsity = self._gradual.sparsity_at(progress.fraction)
        if sparsity > self._reached:
            self._refuse_replaced()
            self._prune(sparsity)
        self._zero()

    @torch.no_grad()
    def _prune(self, sparsity: float) -> None:
        # What is gone has magnitude zero, the smallest there is, so that masks are nested.
        self._zero()
        self._reached = sparsity
        unit = self._gradual.granularity == "unit"
        cells = {
            t.name: t.rows(self.parameters[t.name].detach()).norm(dim=1) if unit else self.parameters[t.name].detach()
            for t in self._trained()
        }
        keep = select(cells, sparsity, scope=self._gradual.scope, absolute=True)
        for target in self._trained():
            kept = target.spread(keep[target.name]) if unit else keep[target.name]
            self._gone[target.name] = ~kept.expand(target.shape)

    @torch.no_grad()
    def _zero(self) -> None:
        for name, gone in self._gone.items():
            self.parameters[name].masked_fill_(gone, 0.0)

    def finalize(self) -> Masks:
        if self._reached < self._gradual.sparsity:
            self._prune(self._gradual.sparsity)
        # Weights of an earlier step may have been put back.
        self._zero()
        masks = Masks({name: ~gone for name, gone in self._gone.items()})
        self.remove()
        return masks

    def state_dict(self) -> dict[str, Tensor]:
        gone = {f"gone.{t.name}": self._gone.get(t.name, torch.zeros(t.shape, dtype=torch.bool)) for t in self.targets}
        reached = torch.tensor(self._reached, dtype=torch.float64)
        return {
            **super().state_dict(),
            "reached": reached,
            **{name: g.contiguous().clone() for name, g in gone.items()},
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._reached = float(state["reached"])
        for target in self._trained():
            gone = state[f"gone.{target.name}"]
            if tuple(gone.shape) != target.shape:
                raise CheckpointError(
                    f'gradual_pruning: saved mask of "{target.name}" has shape {list(gone.shape)}, expected '
                    f"{list(target.shape)}; it belongs to another network"
                )
            if bool(gone.any()):
                self._gone[target.name] = gone.to(self.parameters[target.name].device).bool()
