"""Variational dropout at work: noise of a learned size on every weight, made on the layers' outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.core.masks import Masks
from secateur.core.seeds import keyed_seed
from secateur.core.targets import Target, Targets
from secateur.regularizers.attachment import Attachment, Hook
from secateur.regularizers.layers import layer_output, layers_of, only_input, refuse_unsupported
from secateur.regularizers.parallel import data_rank
from secateur.regularizers.seeded import draw_seeds, normal_like
from secateur.regularizers.stream import NoiseStream
from secateur.regularizers.variational_dropout import VariationalDropout

__all__ = ["VariationalNoise", "divergence", "log_alpha_of"]

_LEAF = "variational_dropout_log_sigma2"
_EPSILON, _LIMIT = 1e-8, 8.0
_K1, _K2, _K3 = 0.63576, 1.8732, 1.48695


def log_alpha_of(weight: Tensor, log_sigma2: Tensor) -> Tensor:
    """ln(sigma^2 / w^2): how large the noise is beside the weight; not limited yet."""
    return log_sigma2 - torch.log(weight.square() + _EPSILON)


def divergence(log_alpha: Tensor) -> Tensor:
    """KL divergence from the log-uniform prior, entry by entry, up to a constant that makes it end at 0.

    Examples:
        >>> divergence(torch.tensor([-8.0, 0.0, 3.0]))
        tensor([4.6359, 0.4312, 0.0254])
    """
    return _K1 - _K1 * torch.sigmoid(_K2 + _K3 * log_alpha) + 0.5 * F.softplus(-log_alpha)


class VariationalNoise(Attachment):
    """Adds the noise that noisy weights would cause to each target layer's output (local reparametrization)."""

    def __init__(self, spec: VariationalDropout, model: nn.Module, targets: Targets | None, seed: int) -> None:
        super().__init__(spec, model, targets, seed)
        self._dropout = spec
        self._seeds: dict[str, Tensor] = {}
        # It draws seeds, whatever device the noise is for.
        self.stream = NoiseStream(seed)
        refuse_unsupported("VariationalDropout", self.network, self.targets)
        for target in self.targets:
            initial = torch.full_like(self.parameters[target.name].detach(), spec.log_sigma2_init)
            self.learn(target.module, _LEAF, initial)
        for target in self.targets:
            for layer in layers_of(self.network, target):
                # First, or a recomputed output would undo what other hooks have made of the layer's own.
                hook = Hook(self._output_hook(target))
                self._handles.append(layer.register_forward_hook(hook, with_kwargs=True, prepend=True))

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Every sample has noise of its own, wherever its part of the batch is.
        rank, _ = data_rank()
        for target, seed in zip(self.targets, draw_seeds(self.stream, len(self.targets)), strict=True):
            self._seeds[target.name] = torch.tensor(keyed_seed(seed, "rank", rank) if rank else seed)

    def end(self) -> None:
        self._seeds.clear()

    def _log_alpha(self, target: Target) -> Tensor:
        log_sigma2 = getattr(self.network.get_submodule(target.module), _LEAF)
        return log_alpha_of(self.parameters[target.name], log_sigma2)

    def _kept(self, target: Target) -> Tensor:
        return self._log_alpha(target).detach().clamp(-_LIMIT, _LIMIT) < self._dropout.threshold

    def _output_hook(self, target: Target) -> Any:
        def act(layer: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            x = only_input(args, kwargs)
            # Without a seed it is a pass without gradients.
            if not (layer.training or self.is_sampling) or target.name not in self._seeds:
                return layer_output(layer, x, layer.weight * self._kept(target), layer.bias, output.shape)
            noise_of_weights = self._log_alpha(target).clamp(-_LIMIT, _LIMIT).exp() * layer.weight.square()
            variance = layer_output(layer, x.square(), noise_of_weights, None, output.shape)
            # Fast convolutions may fall below zero by rounding.
            scale = (variance.clamp_min(0.0) + _EPSILON).sqrt()
            return output + scale * normal_like(output, self._seeds[target.name])

        return act

    def penalty(self) -> Tensor | float:
        spec = self._dropout
        warm = min(1.0, self.progress.fraction / spec.warmup) if spec.warmup else 1.0
        if not spec.factor:
            return 0.0
        each = [divergence(self._log_alpha(t).clamp(-_LIMIT, _LIMIT)).sum() for t in self.targets]
        return spec.factor * warm * torch.stack(each).sum()

    @torch.no_grad()
    def scores(self) -> dict[str, Tensor]:
        return {t.name: -self._log_alpha(t) for t in self.targets}

    @torch.no_grad()
    def finalize(self) -> Masks:
        """Zero the weights that are mostly noise, and remove the noise; kept is what is below the threshold."""
        masks = {t.name: self._kept(t) for t in self.targets}
        for name, kept in masks.items():
            self.parameters[name].mul_(kept)
        self.remove()
        return Masks(masks)
