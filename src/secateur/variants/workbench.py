"""One network whose weights stand for any of its variants in turn; its own are never written to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.core.masks import Masks
from secateur.core.targets import Target, Targets, find_targets, unwrap
from secateur.criteria import CRITERIA
from secateur.criteria.gathering.batches import read
from secateur.errors import UnknownNameError, UsageError
from secateur.regularizers.unit_sites import Site, find_sites
from secateur.sparsify.ranking import SelectionRule, rank

if TYPE_CHECKING:
    from secateur.criteria.base import Criterion
    from secateur.criteria.driver import Loss
    from secateur.variants.kinds import Variant

__all__ = ["Workbench"]


class Workbench:
    """Makes variants of a network, one at a time, in place.

    Args:
        model: the network; its parameters point to other storages while a variant is in place, and to their own
            afterwards.
        targets: what variants may change; default: every prunable weight. Exclusions are the caller's, explicit.
        batches: `(inputs, labels)` for criteria that need data, and to see which BatchNorm follows which layer; read
            anew whenever they are needed.
        loss: for criteria that need gradients; see `score_targets`.
        criteria: criteria by the names variants use; other names are those of registered ones, as they are by default.

    Memory: one copy of the changed parameters, made at the first variant and used for all, however many there are; and
        while a variant is made, its noise, its masks and what ranking the weights needs.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Targets | None = None,
        *,
        batches: Iterable[Any] | None = None,
        loss: Loss | None = None,
        criteria: Mapping[str, Criterion] | None = None,
    ) -> None:
        self.model, self.network = model, unwrap(model)
        self.targets = find_targets(self.network) if targets is None else targets
        self.batches, self.loss, self.criteria = batches, loss, dict(criteria or {})
        self._parameters = dict(self.network.named_parameters(remove_duplicate=False))
        self._copies: dict[str, Tensor] = {}
        self._own: dict[str, Tensor] = {}
        self._inside = False

    @contextmanager
    def variant(self, variant: Variant) -> Iterator[nn.Module]:
        """The network as `variant`, within the block."""
        if self._inside:
            raise UsageError(f"variants: {variant} inside another variant of the same network; leave that block first")
        self._inside = True
        try:
            with torch.no_grad():
                variant.apply(self)
            yield self.model
        finally:
            for name, own in self._own.items():
                self._parameters[name].data = own
            self._own.clear()
            self._inside = False

    def edit(self, name: str) -> Tensor:
        """The values of a parameter in this variant, to be written to; those of the network at first."""
        if name not in self._own:
            return self.replace(name).copy_(self.clean(name))
        return self._parameters[name].data

    def replace(self, name: str) -> Tensor:
        """The same, with values that are still to be set, all of them."""
        if not self._inside:
            raise UsageError("variants: weights are changed only by a variant's apply(); use workbench.variant(...)")
        parameter = self._parameters[name]
        if name not in self._own:
            own = parameter.data
            copy = self._copies.get(name)
            if copy is None or copy.shape != own.shape or copy.device != own.device or copy.dtype != own.dtype:
                copy = self._copies[name] = torch.empty_like(own)
            self._own[name] = own
            parameter.data = copy
        return parameter.data

    def clean(self, name: str) -> Tensor:
        """The network's own values of a parameter, not to be written to."""
        own = self._own.get(name)
        return self._parameters[name].data if own is None else own

    def target(self, layer: str) -> Target:
        """The target of a layer, by the layer's name or its weight's.

        Raises: `UnknownNameError` naming the nearest.
        """
        for target in self.targets:
            if layer in (target.name, target.module):
                return target
        raise UnknownNameError("layer", layer, [t.module for t in self.targets])

    def masks(self, criterion: str, sparsity: float, rule: SelectionRule, targets: Targets | None = None) -> Masks:
        """Of single weights, by the values they have now."""
        found = self.criteria.get(criterion)
        ranking = rank(
            self.network,
            CRITERIA.load(criterion)() if found is None else found,
            rule=rule,
            targets=targets or self.targets,
            batches=self.batches,
            loss=self.loss,
        )
        return ranking.masks(sparsity)

    @cached_property
    def sites(self) -> dict[str, Site]:
        """Where each target's units are multiplied, by its name: behind a BatchNorm that follows, else in its layer."""
        if not any(self.network.children()):
            return find_sites("variants", self.network, self.targets, (), {})
        if self.batches is None:
            raise UsageError("variants: unit masks need batches, to see which BatchNorm follows a layer; pass batches=")
        inputs, _, _ = next(read(self.batches))
        # One sample shows it.
        one = inputs[:1] if isinstance(inputs, Tensor) else inputs
        return find_sites("variants", self.network, self.targets, (one,), {})

    def multiply_units(self, target: Target, factor: Tensor) -> None:
        """Multiply what the target's units put out by `factor`, `[units]`."""
        site = self.sites[target.name]
        module: Any = self.network.get_submodule(site.module)
        prefix = f"{site.module}." if site.module else ""
        if module.weight is None:
            raise UsageError(
                f'variants: BatchNorm "{site.module}" behind "{target.name}" has no scale that a unit could be '
                "multiplied by; leave the layer out of the targets"
            )
        own = site.module == target.module
        weight = self.edit(target.name if own else f"{prefix}weight")
        factor = factor.to(weight.device, weight.dtype)
        # Adding zero turns -0.0 into 0.0.
        weight.mul_(target.spread(factor) if own else factor).add_(0.0)
        if module.bias is not None:
            self.edit(f"{prefix}bias").mul_(factor).add_(0.0)

    def fingerprint(self) -> str:
        """SHA-256 of the network's own parameters and buffers and of the targets: what all variants depend on."""
        digest = hashlib.sha256(repr([t.name for t in self.targets]).encode())
        for name, tensor in self.network.state_dict().items():
            digest.update(name.encode())
            digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
