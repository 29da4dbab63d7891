"""Variational dropout at work: noise of a learned size on every weight, made on the layers' outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from secateur.core.masks import Masks
from secateur.core.seeds import keyed_seed
from secateur.core.targets import Target, Targets
from secateur.regularizers.attachment import Attachment, Hook
from secateur.regularizers.layers import layer_output, layers_of, only_input, refuse_unsupported
from secateur.regularizers.parallel import data_rank
from secateur.regularizers.pieces import pieces, total
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
    # The last term is half the softplus of -log_alpha, which as an operator of its own takes six times as long.
    return _K1 - _K1 * torch.sigmoid(_K2 + _K3 * log_alpha) - 0.5 * torch.log(torch.sigmoid(log_alpha))


@torch.no_grad()
def divergence_of(weight: Tensor, log_sigma2: Tensor) -> Tensor:
    """The sum of `divergence` over the weights of a layer, a number without derivatives."""
    each = (divergence(log_alpha_of(w, s).clamp_(-_LIMIT, _LIMIT)) for w, s in pieces(weight, log_sigma2))
    return total(each, weight.dtype)


class _DivergenceSlope(torch.autograd.Function):
    """0 with the derivatives of `divergence_of`, to add to it. It keeps nothing: what autograd keeps of the formula
    would be ten copies of the weights."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, log_sigma2: Tensor) -> Tensor:
        ctx.save_for_backward(weight, log_sigma2)
        return weight.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        weight, log_sigma2 = ctx.saved_tensors
        of_weight, of_sigma = torch.empty_like(weight), torch.empty_like(weight)
        for w, s, dw, ds in pieces(weight, log_sigma2, of_weight, of_sigma):
            log_alpha = log_alpha_of(w, s)
            limited = log_alpha.clamp(-_LIMIT, _LIMIT)
            near, own = torch.sigmoid(_K2 + _K3 * limited), torch.sigmoid(limited)
            slope = -_K1 * _K3 * near * (1.0 - near) - 0.5 * (1.0 - own)
            ds.copy_(slope.mul_(limited == log_alpha).mul_(gradient))
            torch.mul(slope, -2.0 * w / (w.square() + _EPSILON), out=dw)
        return of_weight, of_sigma


class _NoiseOfWeights(torch.autograd.Function):
    """The noise's variance, `exp(log_alpha) * weight^2` with log_alpha within its limits. It keeps nothing."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, log_sigma2: Tensor) -> Tensor:
        ctx.save_for_backward(weight, log_sigma2)
        variance = torch.empty_like(weight)
        for w, s, out in pieces(weight, log_sigma2, variance):
            torch.mul(log_alpha_of(w, s).clamp_(-_LIMIT, _LIMIT).exp_(), w.square(), out=out)
        return variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        weight, log_sigma2 = ctx.saved_tensors
        of_weight, of_sigma = torch.empty_like(weight), torch.empty_like(weight)
        for w, s, g, dw, ds in pieces(weight, log_sigma2, gradient, of_weight, of_sigma):
            log_alpha = log_alpha_of(w, s)
            limited = log_alpha.clamp(-_LIMIT, _LIMIT)
            inside = limited == log_alpha
            alpha, square = limited.exp_().mul_(g), w.square()
            torch.mul(alpha, square, out=ds).mul_(inside)
            # Within the limits alpha falls as the weight grows, so that little is left of 2 w alpha.
            share = torch.where(inside, _EPSILON / (square + _EPSILON), 1.0)
            torch.mul(alpha, w, out=dw).mul_(share).mul_(2.0)
        return of_weight, of_sigma


class _Square(torch.autograd.Function):
    """`x * x`, whose own backward pass in torch makes two copies more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        slope = torch.empty_like(gradient)
        for g, part, out in pieces(gradient, x, slope):
            torch.mul(g, part, out=out).mul_(2.0)
        return slope


class _Noisy(torch.autograd.Function):
    """`mean + sqrt(variance + 1e-8) * noise`; the variance is overwritten.

    The outputs are what this method costs, so they are read and written no more than is necessary.
    """

    @staticmethod
    def forward(ctx: Any, mean: Tensor, variance: Tensor, seed: Tensor) -> Tensor:
        noise = normal_like(mean, seed)
        for m, v, n in pieces(mean, variance, noise):
            # Fast convolutions may fall below zero by rounding.
            scale = v.clamp_min_(0.0).add_(_EPSILON).sqrt_()
            deviation = scale * n
            torch.div(n, scale, out=v).mul_(0.5)
            torch.add(m, deviation, out=n)
        ctx.save_for_backward(variance)
        return noise

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (slope,) = ctx.saved_tensors
        return gradient, gradient * slope, None


class VariationalNoise(Attachment):
    """Adds the noise that noisy weights would cause to each target layer's output (local reparametrization)."""

    def __init__(self, spec: VariationalDropout, model: nn.Module, targets: Targets | None, seed: int) -> None:
        super().__init__(spec, model, targets, seed)
        self._dropout = spec
        self._seeds: dict[str, Tensor] = {}
        self._slopes: dict[str, tuple[Any, Tensor]] = {}
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
        self._slopes.clear()

    def _log_alpha(self, target: Target) -> Tensor:
        return log_alpha_of(self.parameters[target.name], self._log_sigma2(target))

    def _log_sigma2(self, target: Target) -> nn.Parameter:
        learned: nn.Parameter = getattr(self.network.get_submodule(target.module), _LEAF)
        return learned

    def _kept(self, target: Target) -> Tensor:
        return self._log_alpha(target).detach().clamp(-_LIMIT, _LIMIT) < self._dropout.threshold

    def _output_hook(self, target: Target) -> Any:
        def act(layer: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            x = only_input(args, kwargs)
            # Without a seed it is a pass without gradients.
            if not (layer.training or self.is_sampling) or target.name not in self._seeds:
                return layer_output(layer, x, layer.weight * self._kept(target), layer.bias, output.shape)
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self._slopes[target.name] = self._state(target), self._slope(target)
            noise_of_weights = _NoiseOfWeights.apply(layer.weight, self._log_sigma2(target))
            variance = layer_output(layer, _Square.apply(x), noise_of_weights, None, output.shape)
            noisy: Tensor = _Noisy.apply(output, variance, self._seeds[target.name])
            return noisy

        return act

    def penalty(self) -> Tensor | float:
        spec = self._dropout
        warm = min(1.0, self.progress.fraction / spec.warmup) if spec.warmup else 1.0
        if not spec.factor:
            return 0.0
        each = [divergence_of(self.parameters[t.name], self._log_sigma2(t)) + self._taken(t) for t in self.targets]
        return spec.factor * warm * torch.stack(each).sum()

    def _slope(self, target: Target) -> Tensor:
        slope: Tensor = _DivergenceSlope.apply(self.parameters[target.name], self._log_sigma2(target))
        return slope

    def _taken(self, target: Target) -> Tensor:
        """The slope of one target; once that of the forward pass, if nothing has changed since.

        A backward pass goes from the latest to the earliest. Were it made here, the gradients of all penalties would
        come first, and lie beside all that the loss still needs.
        """
        state, slope = self._slopes.pop(target.name, (None, None))
        return slope if slope is not None and state == self._state(target) else self._slope(target)

    def _state(self, target: Target) -> tuple[tuple[int, bool], ...]:
        return tuple((p._version, p.requires_grad) for p in (self.parameters[target.name], self._log_sigma2(target)))

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
