"""Random masks of units at work: one draw a step for all layers, outside the graph; one multiplication inside it."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.core.duration import Progress
from secateur.core.schedule import keep_prob_at
from secateur.core.targets import Target, Targets
from secateur.errors import NoEffectError, UsageError
from secateur.regularizers.attachment import Attachment, Hook
from secateur.regularizers.base import Regularizer
from secateur.regularizers.ddrop import DDrop, keep_probabilities
from secateur.regularizers.parallel import data_rank
from secateur.regularizers.relu_readers import ReluReaders
from secateur.regularizers.substitute import multiply_units
from secateur.regularizers.unit_sites import Site, find_sites, over_units
from secateur.regularizers.watch import can_watch

if TYPE_CHECKING:
    from secateur.regularizers.ddrop_scale import DDropScale

__all__ = ["ChannelNoise", "RankedChannelDropout", "ScaledChannelDropout"]


class ChannelNoise(Attachment):
    """Multiplies what each target's units put out by a mask `[1 or samples, units]` in training mode.

    `sites` says where; it is found in the first forward pass unless a subclass knows better. `per_sample`: masks have
    a row for every sample. `zero_one`: masks hold nothing but zeros and ones.

    A ReLU sends back no gradient where its output is zero. So units that ReLUs alone read need not be multiplied a
    second time in the backward pass, if masks are zeros and ones: gradients are the same to the bit. Who reads them
    is found out in the first training pass of every epoch. A network in which something else begins to read them in the
    middle of an epoch gets a gradient of that part as if nothing had been dropped, until the next epoch.
    """

    per_sample = False
    zero_one = False

    def __init__(self, spec: Regularizer, model: nn.Module, targets: Targets | None, seed: int, method: str) -> None:
        super().__init__(spec, model, targets, seed)
        self._method = method
        self.sites: dict[str, Site] = {}
        self._masks: dict[str, Tensor] = {}
        self._acted = False
        self._readers: ReluReaders | None = None
        # Targets whose units ReLUs alone read: as found last, and as the present pass takes it.
        self._found: frozenset[str] = frozenset()
        self._before_relu: frozenset[str] = frozenset()
        self._looked = False

    def _expect_units(self) -> None:
        """Refuse targets whose units are no output of a layer."""
        for target in self.targets:
            if target.kind in ("attention", "norm"):
                self._refuse(
                    f'"{target.name}" is of kind {target.kind}, whose units are no output of a layer of their own; '
                    "expected linear or convolution layers, exclude it"
                )

    def _refuse(self, message: str) -> NoReturn:
        raise UsageError(f"{self._method}: {message}")

    def locate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the sites and put the hooks there, if that is not done."""
        if not self.sites:
            self.place(find_sites(self._method, self.network, self.targets, args, kwargs))

    def place(self, sites: dict[str, Site]) -> None:
        self.sites = sites
        for name, site in sites.items():
            self._handles += self.act_at(self.network.get_submodule(site.module), name, site)

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.locate(args, kwargs)
        self.draw(args, kwargs)
        # What the last pass has shown holds from this one on: a pass may be computed again in its backward pass.
        self._before_relu = frozenset() if self.is_sampling or not self._looked else self._found
        if not self._looked and self.per_sample and self.zero_one and not self.is_sampling:
            self._looked, self._found = True, frozenset()
            if can_watch(self.model):
                self._readers = ReluReaders()
                self._readers.start()

    def resume(self) -> None:
        if self._readers is not None:
            self._found = self._readers.found()
            self._stop_looking()
        super().resume()

    def _stop_looking(self) -> None:
        if self._readers is not None:
            self._readers.stop()
            self._readers = None

    @abstractmethod
    def draw(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Fill `_masks` for one forward pass."""

    def end(self) -> None:
        self._stop_looking()
        self._masks.clear()

    def act_at(self, module: nn.Module, name: str, site: Site) -> list[RemovableHandle]:
        """The hooks that multiply one target's units there."""

        def drop(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            mask = self._mask_for(module, name, output)
            if mask is None:
                return None
            mask = over_units(mask, output, site.axis)
            # In place: no layer here needs its output to go backward, and a second copy would cost time and memory.
            if name in self._before_relu:
                output.detach().mul_(mask)
                return None
            output = output.mul_(mask)
            if self._readers is not None:
                self._readers.follow(name, output)
            return output

        def shared(module: nn.Module) -> Tensor | None:
            mask = self._mask(module, name)
            return None if mask is None else mask[0]

        if self.per_sample:
            return [module.register_forward_hook(Hook(drop))]
        return multiply_units(module, self.targets[name], site.axis, shared)

    def _mask(self, module: nn.Module, name: str) -> Tensor | None:
        # A missing mask means an evaluation or a pass without gradients.
        if not (module.training or self.is_sampling) or name not in self._masks:
            return None
        self._acted = True
        return self._masks[name]

    def _mask_for(self, module: nn.Module, name: str, output: Tensor) -> Tensor | None:
        mask = self._mask(module, name)
        if mask is not None and len(mask) not in (1, len(output)):
            raise UsageError(
                f'{self._method}: layer "{name.rpartition(".")[0]}" sees {len(output)} samples where the batch has '
                f"{len(mask)}; where a network folds other dimensions into its batch, use per_sample=False"
            )
        return mask

    def after_step(self, progress: Progress) -> None:
        if self._masks and not self._acted:
            raise NoEffectError(
                f"{type(self.spec).__name__}: no target layer was masked in the last forward pass; put the targets in "
                "train() mode; a compiled model ignores hooks where it, or another of its class, has run without them: "
                "call torch.compiler.reset() after attaching"
            )
        self._acted = False
        if progress.epoch != self.progress.epoch:
            self._looked = False
        super().after_step(progress)


class RankedChannelDropout(ChannelNoise):
    """DDROP: keep probabilities by the rank of |gamma|, or of the squared L2 norm of a unit's weights."""

    def __init__(
        self, spec: DDrop | DDropScale, model: nn.Module, targets: Targets | None, seed: int, method: str = "ddrop"
    ) -> None:
        super().__init__(spec, model, targets, seed, method)
        self._ddrop, self.per_sample, self.zero_one = spec, spec.per_sample, not spec.rescale
        self._gamma = spec.acts_on == "norm"
        if not self._gamma:
            self._expect_units()
            return
        wrong = [t.name for t in self.targets if t.kind != "norm"]
        if wrong:
            self._refuse(f'"{wrong[0]}" is not a BatchNorm scale; pass targets from find_targets(model, kind="norm")')
        self.place({t.name: Site(t.module, 1) for t in self.targets})

    def draw(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if not inputs:
            raise UsageError(f"{self._method}: the model is called without a tensor, so the batch size is unknown")
        self._draw(inputs[0].shape[0] if self.per_sample else 1)

    @torch.no_grad()
    def _draw(self, samples: int) -> None:
        keep = torch.cat(list(self._keep().values()))
        # All processes draw the whole batch, and each takes its own samples: so their streams stay equal.
        rank, ranks = data_rank() if self.per_sample else (0, 1)
        drawn = self.stream.bernoulli((ranks * samples, keep.numel()), keep)
        mask = drawn[rank * samples : (rank + 1) * samples].to(keep.dtype)
        if self._ddrop.rescale:
            mask /= keep.clamp_min(1e-6)
        for target, piece in zip(self.targets, mask.split([t.units for t in self.targets], dim=1), strict=True):
            self._masks[target.name] = piece

    def _keep(self) -> dict[str, Tensor]:
        """Keep probability of every unit, by target name."""
        spec, t = self._ddrop, self.progress.epoch_fraction
        low = keep_prob_at(spec.keep_min, spec.schedule, t)
        high = keep_prob_at(spec.keep_max, spec.schedule, t)
        # Layers of one width are ranked in one go.
        widths: dict[int, dict[str, Tensor]] = {}
        for target in self.targets:
            widths.setdefault(target.units, {})[target.name] = self._score(target)
        keep: dict[str, Tensor] = {}
        for scores in widths.values():
            rows = keep_probabilities(torch.stack(list(scores.values())), low, high)
            keep.update(zip(scores, rows.unbind(), strict=True))
        return {t.name: keep[t.name] for t in self.targets}

    def _score(self, target: Target) -> Tensor:
        parameter = self.parameters[target.name].detach()
        return parameter.abs() if self._gamma else target.rows(parameter).square().sum(dim=1)

    def penalty(self) -> Tensor | float:
        if not self._ddrop.l1:
            return 0.0
        return self._ddrop.l1 * torch.cat(list(self.parameters.values())).abs().sum()

    def scores(self) -> dict[str, Tensor]:
        return {t.name: self._score(t) for t in self.targets}


class ScaledChannelDropout(RankedChannelDropout):
    """DDROP for layers without a scale: it adds one, ranks by it, and folds it into the weights at the end."""

    def __init__(self, spec: DDropScale, model: nn.Module, targets: Targets | None, seed: int) -> None:
        super().__init__(spec, model, targets, seed, "ddrop_scale")
        self.zero_one = False  # times a scale
        tied = [t for t in self.targets if t.aliases]
        if tied:
            self._refuse(
                f'"{tied[0].name}" is tied to {", ".join(tied[0].aliases)}, so a scale cannot be folded '
                "into one of them; exclude it"
            )
        self._scales = {}
        for t in self.targets:
            weight = self.parameters[t.name]
            ones = torch.ones(t.units, device=weight.device, dtype=weight.dtype)
            self._scales[t.name] = self.learn(t.module, "ddrop_scale", ones)

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The scales act in eval mode too.
        self.locate(args, kwargs)
        super()._before_forward(module, args, kwargs)

    def place(self, sites: dict[str, Site]) -> None:
        for name, site in sites.items():
            if self.network.get_submodule(site.module).weight is None:
                raise UsageError(
                    f'ddrop_scale: BatchNorm "{site.module}" behind "{name}" has no scale of its own, so none can be '
                    "folded into it; exclude the layer"
                )
        super().place(sites)

    def _score(self, target: Target) -> Tensor:
        return self._scales[target.name].detach().abs()

    def act_at(self, module: nn.Module, name: str, site: Site) -> list[RemovableHandle]:
        scale = self._scales[name]

        def drop(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            factor, mask = scale.unsqueeze(0), self._mask_for(module, name, output)
            if mask is not None:
                factor = factor * mask
            return output * over_units(factor, output, site.axis).to(output.dtype)

        return [module.register_forward_hook(Hook(drop))]

    def penalty(self) -> Tensor | float:
        if not self._ddrop.l1:
            return 0.0
        return self._ddrop.l1 * torch.cat(list(self._scales.values())).abs().sum()

    def finalize(self) -> None:
        """Fold the scales into the weights and biases in front of them; eval mode computes what it did before."""
        if not self.sites and any(bool((s != 1).any()) for s in self._scales.values()):
            raise UsageError("ddrop_scale: no forward pass has been made, so where the scales act is unknown; make one")
        self._fold()
        self.remove()

    @torch.no_grad()
    def _fold(self) -> None:
        for name, site in self.sites.items():
            target, scale = self.targets[name], self._scales[name]
            module: Any = self.network.get_submodule(site.module)
            module.weight.mul_(target.spread(scale) if site.module == target.module else scale)
            if module.bias is not None:
                module.bias.mul_(scale)
