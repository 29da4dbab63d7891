"""DDROP at work: one draw a step for all BatchNorms, outside the graph; one multiplication inside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.schedule import keep_prob_at
from secateur.core.targets import Target, Targets
from secateur.errors import UsageError
from secateur.regularizers.attachment import Attachment, Hook
from secateur.regularizers.ddrop import DDrop, keep_probabilities

__all__ = ["RankedChannelDropout"]


class RankedChannelDropout(Attachment):
    """Multiplies the output of every target BatchNorm by a random channel mask in training mode."""

    def __init__(self, spec: DDrop, model: nn.Module, targets: Targets | None, seed: int) -> None:
        super().__init__(spec, model, targets, seed)
        self._ddrop = spec
        wrong = [t.name for t in self.targets if t.kind != "norm"]
        if wrong:
            raise UsageError(
                f'ddrop: "{wrong[0]}" is not a BatchNorm scale; pass targets from find_targets(model, kind="norm")'
            )
        self._masks: dict[str, Tensor] = {}
        for target in self.targets:
            norm = self.network.get_submodule(target.module)
            self._handles.append(norm.register_forward_hook(Hook(self._output_hook(target))))

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if not inputs:
            raise UsageError("ddrop: the model is called without a tensor, so the batch size is unknown")
        self._draw(inputs[0].shape[0] if self._ddrop.per_sample else 1)

    @torch.no_grad()
    def _draw(self, samples: int) -> None:
        keep = torch.cat([self._keep(t) for t in self.targets])
        mask = self.stream.bernoulli((samples, keep.numel()), keep).to(keep.dtype)
        if self._ddrop.rescale:
            mask /= keep.clamp_min(1e-6)
        for target, piece in zip(self.targets, mask.split([t.units for t in self.targets], dim=1), strict=True):
            self._masks[target.name] = piece

    def _keep(self, target: Target) -> Tensor:
        spec, t = self._ddrop, self.progress.epoch_fraction
        low = keep_prob_at(spec.keep_min, spec.schedule, t)
        high = keep_prob_at(spec.keep_max, spec.schedule, t)
        return keep_probabilities(self.parameters[target.name].detach().abs(), low, high)

    def _output_hook(self, target: Target) -> Any:
        name = target.name

        def drop(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            # A missing mask means an evaluation or a pass without gradients.
            if not module.training or name not in self._masks:
                return None
            mask = self._masks[name]
            if len(mask) not in (1, len(output)):
                raise UsageError(
                    f'ddrop: layer "{target.module}" sees {len(output)} samples where the batch has {len(mask)}; '
                    "where a network folds other dimensions into its batch, use per_sample=False"
                )
            # In place: a BatchNorm's backward pass needs its input only, and a second copy would cost time and memory.
            return output.mul_(mask.reshape(mask.shape[0], mask.shape[1], *([1] * (output.dim() - 2))))

        return drop

    def end(self) -> None:
        self._masks.clear()

    def penalty(self) -> Tensor | float:
        if not self._ddrop.l1:
            return 0.0
        return self._ddrop.l1 * torch.cat(list(self.parameters.values())).abs().sum()

    def scores(self) -> dict[str, Tensor]:
        return {name: p.detach().abs() for name, p in self.parameters.items()}
