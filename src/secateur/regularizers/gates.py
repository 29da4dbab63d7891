"""Learned gates on units or weights, multiplied in inside the graph: what L0 and Smallify share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.core.duration import Progress
from secateur.core.masks import Masks
from secateur.core.seeds import keyed_generator
from secateur.core.targets import Target, Targets
from secateur.errors import CheckpointError
from secateur.regularizers.attachment import Attachment
from secateur.regularizers.hard_concrete import expected_open, gated_weight, hard_concrete, keep_probability
from secateur.regularizers.l0 import L0
from secateur.regularizers.layers import layers_of, refuse_unsupported
from secateur.regularizers.seeded import draw_seeds, logistic_like
from secateur.regularizers.smallify import Smallify
from secateur.regularizers.stream import NoiseStream
from secateur.regularizers.substitute import multiply_units, substitute
from secateur.regularizers.unit_sites import own_site

__all__ = ["Gates", "HardConcreteGates", "SignGates", "sign_statistics"]

_LIMIT = math.log(100.0)


def sign_statistics(sign: Tensor, mean: Tensor, variance: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """One step of the moving mean and variance of a sign; the variance uses the mean before the step."""
    new_variance = decay * variance + (1.0 - decay) * (sign - mean).square()
    return decay * mean + (1.0 - decay) * sign, new_variance


class Gates(Attachment):
    """Multiplies every target's units (output and bias alike) or weights by gates with a learned parameter.

    The layer computes with the gated weights in place of its own.
    """

    leaf: ClassVar[str]

    def __init__(self, spec: L0 | Smallify, model: nn.Module, targets: Targets | None, seed: int) -> None:
        super().__init__(spec, model, targets, seed)
        self._by_unit = spec.granularity == "unit"
        refuse_unsupported(type(spec).__name__, self.network, self.targets)
        for target in self.targets:
            weight = self.parameters[target.name]
            shape = (target.units,) if self._by_unit else target.shape
            initial = self.initial(shape, keyed_generator(seed, self.leaf, target.name))
            self.learn(target.module, self.leaf, initial.to(weight.device, weight.dtype))
        for target in self.targets:
            for layer in layers_of(self.network, target):
                self._handles += self._gate(layer, target)

    @abstractmethod
    def initial(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """What the learned parameters of one target start from."""

    @abstractmethod
    def gate(self, target: Target, training: bool) -> Tensor:
        """The gates of one target, in the graph."""

    def gated(self, weight: Tensor, target: Target, training: bool) -> Tensor:
        """The weight of one target times its gates, one each weight, in the graph."""
        return weight * self.gate(target, training)

    def parameter(self, target: Target) -> nn.Parameter:
        """The learned parameter of one target."""
        found: nn.Parameter = getattr(self.network.get_submodule(target.module), self.leaf)
        return found

    def _gate(self, layer: nn.Module, target: Target) -> list[RemovableHandle]:
        def gated(module: Any, x: Tensor) -> dict[str, Tensor]:
            return {"weight": self.gated(module.weight, target, module.training)}

        if not self._by_unit:
            return substitute(layer, gated)
        return multiply_units(layer, target, own_site(target).axis, lambda module: self.gate(target, module.training))

    @torch.no_grad()
    def finalize(self) -> Masks:
        """Multiply the gates into weights and biases and remove them; kept is what has a gate other than zero."""
        masks: dict[str, Tensor] = {}
        for target in self.targets:
            gate, weight = self.gate(target, training=False), self.parameters[target.name]
            if self._by_unit:
                biases = {id(layer.bias): layer.bias for layer in layers_of(self.network, target)}
                for bias in biases.values():
                    if isinstance(bias, Tensor):
                        bias.mul_(gate)
                gate = target.spread(gate)
            weight.mul_(gate)
            masks[target.name] = (gate != 0).expand(target.shape).clone()
        self.remove()
        return Masks(masks)


class HardConcreteGates(Gates):
    """L0: gates that are exactly 0 or 1 with some probability, and whose expected number is penalized."""

    leaf = "l0_log_alpha"

    def __init__(self, spec: L0, model: nn.Module, targets: Targets | None, seed: int) -> None:
        self._l0 = spec
        # Of the present draw: a seed for each target's noise, or all gates where they are few.
        self._seeds: dict[str, Tensor] = {}
        self._gates: dict[str, Tensor] = {}
        super().__init__(spec, model, targets, seed)
        # Unit gates are few numbers in many layers, so all are worked on as one: calls are what they cost.
        self._sizes = [t.units for t in self.targets]
        self._fan_in = torch.tensor([float(t.fan_in) for t in self.targets])
        # It draws seeds, whatever device the noise is for.
        self.stream = NoiseStream(seed)

    def initial(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        drop = self._l0.drop_rate_init
        start = torch.empty(shape).normal_(math.log((1.0 - drop) / drop), 0.01, generator=generator)
        return start.clamp_(-_LIMIT, _LIMIT)

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for target, seed in zip(self.targets, draw_seeds(self.stream, len(self.targets)), strict=True):
            self._seeds[target.name] = torch.tensor(seed)
        if self._by_unit:
            noise = [logistic_like(self.parameter(t), self._seeds[t.name]) for t in self.targets]
            gates = hard_concrete(self._log_alphas(), torch.cat(noise))
            self._gates = dict(zip(self._seeds, gates.split(self._sizes), strict=True))

    def _log_alphas(self) -> Tensor:
        return torch.cat([self.parameter(t) for t in self.targets])

    def end(self) -> None:
        self._seeds.clear()
        self._gates.clear()

    def _is_drawn(self, target: Target, training: bool) -> bool:
        # Without a seed it is a pass without gradients.
        return (training or self.is_sampling) and target.name in self._seeds

    def gate(self, target: Target, training: bool) -> Tensor:
        if self._by_unit and self._is_drawn(target, training):
            return self._gates[target.name]
        return hard_concrete(self.parameter(target))

    def gated(self, weight: Tensor, target: Target, training: bool) -> Tensor:
        if not self._is_drawn(target, training):
            return super().gated(weight, target, training)
        return gated_weight(weight, self.parameter(target), self._seeds[target.name])

    def penalty(self) -> Tensor | float:
        if not self._l0.factor:
            return 0.0
        if self._by_unit:
            kept = keep_probability(self._log_alphas())
            weights = self._fan_in.repeat_interleave(torch.tensor(self._sizes)).to(kept.device, kept.dtype)
            return self._l0.factor * (kept * weights).sum()
        return self._l0.factor * torch.stack([expected_open(self.parameter(t)) for t in self.targets]).sum()

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        super().after_step(progress)
        for target in self.targets:
            self.parameter(target).clamp_(-_LIMIT, _LIMIT)

    def scores(self) -> dict[str, Tensor]:
        return {t.name: keep_probability(self.parameter(t).detach()) for t in self.targets}


class SignGates(Gates):
    """Smallify: gates under an L1 penalty that are zero for good once their sign has begun to change."""

    leaf = "smallify_gate"

    def __init__(self, spec: Smallify, model: nn.Module, targets: Targets | None, seed: int) -> None:
        self._smallify = spec
        super().__init__(spec, model, targets, seed)
        gates = {t.name: self.parameter(t).detach() for t in self.targets}
        self._mean = {name: gate.sign() for name, gate in gates.items()}
        self._variance = {name: torch.zeros_like(gate) for name, gate in gates.items()}
        self._killed = {name: torch.zeros_like(gate, dtype=torch.bool) for name, gate in gates.items()}

    def initial(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return 1.0 - torch.rand(shape, generator=generator)

    def gate(self, target: Target, training: bool) -> Tensor:
        return self.parameter(target)

    def penalty(self) -> Tensor | float:
        if not self._smallify.factor:
            return 0.0
        return self._smallify.factor * torch.stack([self.parameter(t).abs().sum() for t in self.targets]).sum()

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        super().after_step(progress)
        spec = self._smallify
        for target in self.targets:
            name, gate = target.name, self.parameter(target)
            self._mean[name], self._variance[name] = sign_statistics(
                gate.sign(), self._mean[name], self._variance[name], spec.decay
            )
            self._killed[name] |= self._variance[name] > spec.threshold
            # Every step, because momentum goes on moving what is killed.
            gate.masked_fill_(self._killed[name], 0.0)

    def scores(self) -> dict[str, Tensor]:
        found = {}
        for target in self.targets:
            gate = self.parameter(target).detach().abs()
            found[target.name] = gate if self._by_unit else gate * self.parameters[target.name].detach().abs()
        return found

    def _statistics(self) -> dict[str, Tensor]:
        kinds = {"mean": self._mean, "variance": self._variance, "killed": self._killed}
        return {f"{kind}/{name}": tensor for kind, by_name in kinds.items() for name, tensor in by_name.items()}

    def state_dict(self) -> dict[str, Tensor]:
        return {**super().state_dict(), **{key: tensor.clone() for key, tensor in self._statistics().items()}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        for key, tensor in self._statistics().items():
            if state[key].shape != tensor.shape:
                raise CheckpointError(
                    f"Smallify: saved {key} has shape {list(state[key].shape)}, expected {list(tensor.shape)}"
                )
            tensor.copy_(state[key])
