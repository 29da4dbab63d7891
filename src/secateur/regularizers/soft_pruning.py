"""Units zeroed or shrunk between epochs, at work: SFP, ASFP and PGMPF."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.duration import Progress
from secateur.core.masks import Masks
from secateur.core.select import prune_count
from secateur.core.targets import Target, Targets
from secateur.errors import CheckpointError
from secateur.regularizers.attachment import Attachment
from secateur.regularizers.candidates import all_but_lowest
from secateur.regularizers.gradient_hooks import GradientHooks
from secateur.regularizers.pgmpf import PGMPF
from secateur.regularizers.soft_filter_pruning import SoftFilterPruning
from secateur.regularizers.unit_sites import find_norms

__all__ = ["ProgressivePruner", "SoftPruner", "kept_units"]


def unit_norms(target: Target, weight: Tensor) -> Tensor:
    """L2 norm of every unit, `[units]`, in single precision at least."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(target.rows(weight), dim=1, dtype=dtype)


def kept_units(target: Target, weight: Tensor, sparsity: float) -> Tensor:
    """Bool `[units]`, False at the units of smallest L2 norm: exactly floor(sparsity n) of the n units of each block,
    but one is always kept. Among equal norms the lowest index goes first.
    """
    per_block = target.units // target.blocks
    count = min(prune_count(per_block, sparsity), per_block - 1)
    return all_but_lowest(unit_norms(target, weight).reshape(target.blocks, per_block), count).reshape(-1)


class _EpochPruner(Attachment):
    """Does something to the units of smallest norm after every epoch, and zeroes them in the end."""

    def _trained(self) -> list[Target]:
        return [t for t in self.targets if self.parameters[t.name].requires_grad]

    def after_step(self, progress: Progress) -> None:
        finished = progress.epoch != self.progress.epoch or progress.step >= progress.steps
        super().after_step(progress)
        if finished:
            self._refuse_replaced()
            self.end_epoch()

    @abstractmethod
    def end_epoch(self) -> None:
        """The epoch that `self.progress` ends is over."""

    def scores(self) -> dict[str, Tensor]:
        return {t.name: unit_norms(t, self.parameters[t.name].detach()) for t in self.targets}


class SoftPruner(_EpochPruner):
    """Zeroes the units of smallest norm after every epoch."""

    def __init__(self, spec: SoftFilterPruning, model: nn.Module, targets: Targets | None, seed: int) -> None:
        super().__init__(spec, model, targets, seed)
        self._soft = spec

    def end_epoch(self) -> None:
        self._zero(self._soft.sparsity_at(self.progress.fraction))

    @torch.no_grad()
    def _zero(self, sparsity: float) -> Masks:
        masks: dict[str, Tensor] = {}
        for target in self._trained():
            weight = self.parameters[target.name]
            kept = target.spread(kept_units(target, weight.detach(), sparsity))
            weight.masked_fill_(~kept, 0.0)
            masks[target.name] = kept.expand(target.shape).contiguous()
        return Masks(masks)

    def finalize(self) -> Masks:
        self._refuse_replaced()
        masks = self._zero(self._soft.sparsity)
        self.remove()
        return masks


class ProgressivePruner(_EpochPruner):
    """Shrinks the units of smallest norm after every epoch, and masks their gradients in the next."""

    def __init__(self, spec: PGMPF, model: nn.Module, targets: Targets | None, seed: int) -> None:
        super().__init__(spec, model, targets, seed)
        self._pgmpf = spec
        self._kept = {t.name: torch.ones(t.units, dtype=torch.bool, device=self.stream.device) for t in self.targets}
        self._biases = {t.bias: self.network.get_parameter(t.bias) for t in self.targets if t.bias is not None}
        # What gradients are multiplied by in this step, by target; empty before the draw, and where nothing is pruned.
        self._passing: dict[str, Tensor] = {}
        self._drawn = False
        # The BatchNorm behind each target, found in the first forward pass: it would undo any scale in front of it.
        self._norms: dict[str, nn.Module] | None = None
        self._hooks = GradientHooks(self.parameters, self._mask)

    def _mask(self, name: str, gradient: Tensor) -> Tensor:
        return gradient * self._passing[name] if name in self._passing else gradient

    def _epoch(self) -> tuple[int, int]:
        """The last epoch that is over, from 0, and how many there are; a cut-off last one counts."""
        per_epoch = max(1, self.progress.steps_per_epoch)
        return -(-self.progress.step // per_epoch) - 1, max(1, -(-self.progress.steps // per_epoch))

    @torch.no_grad()
    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._drawn:
            return
        self._drawn = True
        self._hooks.attach()
        if self._norms is None:
            paths = find_norms(self.network, self.targets, args, kwargs)
            self._norms = {name: self.network.get_submodule(path) for name, path in paths.items()}
        over = self.progress.epoch - 1
        if over < 0:
            return
        passed = 1.0 - self._pgmpf.blocked_at(over, self._epoch()[1])
        coins = self.stream.bernoulli((sum(t.units for t in self.targets),), 0.5)
        for target, coin in zip(self.targets, coins.split([t.units for t in self.targets]), strict=True):
            dtype = self.parameters[target.name].dtype
            through = torch.where(self._kept[target.name], 1.0, passed * coin.to(dtype)).to(dtype)
            self._passing[target.name] = target.spread(through)

    def end(self) -> None:
        self._passing.clear()
        self._drawn = False

    def pause(self) -> None:
        # The weights are plain; a backward pass may still be to come.
        return

    @torch.no_grad()
    def end_epoch(self) -> None:
        epoch, epochs = self._epoch()
        self._shrink(self._pgmpf.sparsity_at(epoch, epochs), self._pgmpf.shrink_at(epoch, epochs))

    @torch.no_grad()
    def _shrink(self, sparsity: float, by: float) -> None:
        for target in self._trained():
            weight = self.parameters[target.name]
            kept = self._kept[target.name] = kept_units(target, weight.detach(), sparsity)
            weight.copy_(torch.where(target.spread(kept), weight, by * weight if by else 0.0))
            for per_unit in self._per_unit(target):
                if per_unit.requires_grad:
                    per_unit.copy_(torch.where(kept, per_unit, by * per_unit if by else 0.0))

    def _per_unit(self, target: Target) -> list[nn.Parameter]:
        """What else a unit has beside its weights: its bias, and scale and shift of the BatchNorm behind it."""
        norm = (self._norms or {}).get(target.name)
        found = [] if target.bias is None else [self._biases[target.bias]]
        return found + ([] if norm is None else [p for p in (norm.weight, norm.bias) if isinstance(p, nn.Parameter)])

    def finalize(self) -> Masks:
        self._refuse_replaced()
        self._shrink(self._pgmpf.sparsity, 0.0)
        kept = {t.name: t.spread(self._kept[t.name]).expand(t.shape).contiguous() for t in self._trained()}
        self.remove()
        return Masks(kept)

    def state_dict(self) -> dict[str, Tensor]:
        return {**super().state_dict(), **{f"kept.{name}": kept.clone() for name, kept in self._kept.items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        for name, kept in self._kept.items():
            saved = state[f"kept.{name}"]
            if saved.shape != kept.shape:
                raise CheckpointError(
                    f'pgmpf: saved state of "{name}" is for {saved.numel()} units, expected {kept.numel()}; '
                    "it belongs to another network"
                )
            kept.copy_(saved)

    def remove(self) -> None:
        super().remove()
        self._hooks.remove()
