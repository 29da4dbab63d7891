"""What a variant can be: a few numbers that say how it differs from the network."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from secateur.errors import UnknownNameError, UsageError
from secateur.variants.checks import finite, known_name, stored_integers, text, unit_pairs

if TYPE_CHECKING:
    from secateur.core.select import Scope
    from secateur.variants.workbench import Workbench

__all__ = ["DropLayer", "DropUnit", "DropUnits", "LayerSparsity", "NoisyPrune", "UnitMasks", "Variant", "variant_from"]

Source = Literal["noisy", "dense"]


class Variant(ABC):
    """A frozen dataclass of numbers and names; with the network it determines the variant's weights.

    To the bit, on any machine, are the noise and the masks that depend on seeds or on the magnitude of single weights.
    Criteria that add up or differentiate (GraSP, SNIP, norms of whole units) may differ in the last place from one
    machine to the next, and so may a mask where two scores are that close.
    """

    kind: ClassVar[str]

    @abstractmethod
    def apply(self, bench: Workbench) -> None:
        """Write the variant's weights, through `bench.edit`, `bench.replace` and `bench.multiply_units`."""

    def record(self) -> dict[str, Any]:
        """For JSON; `variant_from` is its inverse."""
        return {"kind": self.kind, **asdict(self)}  # type: ignore[call-overload]

    def __str__(self) -> str:
        values = [f"{f.name}={getattr(self, f.name)!s}" for f in fields(self)]  # type: ignore[arg-type]
        return f"{self.kind}({', '.join(values)})"


@dataclass(frozen=True, repr=False)
class NoisyPrune(Variant):
    """Gaussian noise on every target's weights, then pruning: m(w + sigma z) * (w + sigma z), z ~ N(0, 1).

    Args:
        sigma: deviation of the noise, the same in every layer, at least 0. At 0 it is the deterministic network, to
            the bit, whatever the seed.
        sparsity: fraction of the targets' weights removed, in [0, 1).
        seed: of the noise; one stream a target.
        criterion: name of the criterion that ranks the weights.
        scope: `"global"` ranks all weights together, `"tensor"` each layer's own.
        weights: `"noisy"`: what is kept keeps its noise; `"dense"`: it has the network's own values.
        mask: `"noisy"`: the criterion sees the noisy weights; `"dense"`: the network's own.

    (weights, mask) = (noisy, noisy) is stochastic pruning; (dense, noisy) and (noisy, dense) transfer the mask from the
    stochastic to the deterministic network and back.

    Reference: stochastic pruning, section III; mask transfer, section IV-D.
    """

    sigma: float
    sparsity: float
    seed: int = 0
    criterion: str = "magnitude"
    scope: Scope = "global"
    weights: Source = "noisy"
    mask: Source = "noisy"
    kind: ClassVar[str] = "noisy_prune"

    def __post_init__(self) -> None:
        finite("sigma", self.sigma, 0.0, math.inf)
        finite("sparsity", self.sparsity, 0.0, 1.0)
        stored_integers(self, "seed")
        text("criterion", self.criterion)
        known_name("scope", self.scope, ["tensor", "global", "column"])
        known_name("weights", self.weights, ["noisy", "dense"])
        known_name("mask", self.mask, ["noisy", "dense"])

    def apply(self, bench: Workbench) -> None:
        from secateur.sparsify.ranking import SelectionRule
        from secateur.variants.noise import add_noise

        rule = SelectionRule(scope=self.scope, seed=self.seed)
        dense = self.mask == "dense" and self.sparsity > 0.0
        masks = bench.masks(self.criterion, self.sparsity, rule) if dense else None
        for target in bench.targets:
            add_noise(bench.clean(target.name), self.sigma, self.seed, target.name, out=bench.replace(target.name))
        if masks is None and self.sparsity > 0.0:
            masks = bench.masks(self.criterion, self.sparsity, rule)
        for target in bench.targets:
            weight = bench.edit(target.name)
            if self.weights == "dense":
                weight.copy_(bench.clean(target.name))
            if masks is not None:
                # Not multiplied: a negative weight times zero is -0.0, which is stored like any other number.
                weight.masked_fill_(~masks[target.name], 0.0)


@dataclass(frozen=True, repr=False)
class UnitMasks(Variant):
    """Units dropped by the mask of one seed, the rest multiplied by 1 / (1 - drop_rate): what mask-pool dropout trains.

    Args:
        drop_rate: in [0, 1). The masks of one seed are nested in it.
        seed: of the masks, one a layer; 0 to pool - 1 for the members of a pool.
        min_keep: units of each layer that are kept in any case.
        scaled: multiply what is kept by 1 / (1 - drop_rate).

    Reference: mask-guided structured pruning (thesis), equations 12-16.
    """

    drop_rate: float
    seed: int = 0
    min_keep: int = 1
    scaled: bool = True
    kind: ClassVar[str] = "unit_masks"

    def __post_init__(self) -> None:
        finite("drop_rate", self.drop_rate, 0.0, 1.0)
        stored_integers(self, "seed", "min_keep")
        if not isinstance(self.scaled, bool):
            raise UsageError(f"variant: scaled is True or False, got {self.scaled!r}")

    def apply(self, bench: Workbench) -> None:
        from secateur.regularizers.mask_pool import unit_mask

        for target in bench.targets if self.drop_rate else ():
            factor = unit_mask(self.seed, target.name, target.units, self.drop_rate, self.min_keep).double()
            if self.scaled:
                factor /= 1.0 - self.drop_rate
            bench.multiply_units(target, factor)


@dataclass(frozen=True, repr=False)
class DropUnit(Variant):
    """One unit put out as zero, nothing else changed.

    Args:
        layer: name of the layer.
        unit: its index, from 0.
    """

    layer: str
    unit: int
    kind: ClassVar[str] = "drop_unit"

    def __post_init__(self) -> None:
        text("layer", self.layer)
        stored_integers(self, "unit")

    def apply(self, bench: Workbench) -> None:
        import torch

        target = bench.target(self.layer)
        if not 0 <= self.unit < target.units:
            raise UsageError(f"{self}: layer has units 0 to {target.units - 1}, got {self.unit}")
        factor = torch.ones(target.units)
        factor[self.unit] = 0.0
        bench.multiply_units(target, factor)


@dataclass(frozen=True, repr=False)
class DropUnits(Variant):
    """Several units put out as zero, nothing else changed.

    Args:
        units: (name of the layer, index from 0) of each, all different; equal whatever their order. None at all is the
            network itself.
    """

    units: tuple[tuple[str, int], ...]
    kind: ClassVar[str] = "drop_units"

    def __post_init__(self) -> None:
        units = tuple(sorted(unit_pairs("units", self.units)))
        if len(set(units)) < len(units):
            raise UsageError(f"variant: units repeat {next(u for u in units if units.count(u) > 1)}; give each once")
        object.__setattr__(self, "units", units)

    def apply(self, bench: Workbench) -> None:
        import torch

        factors: dict[str, tuple[Any, Any]] = {}
        for layer, index in self.units:
            target = bench.target(layer)
            if index >= target.units:
                raise UsageError(f'drop_units: layer "{layer}" has units 0 to {target.units - 1}, got {index}')
            factors.setdefault(target.name, (target, torch.ones(target.units)))[1][index] = 0.0
        for target, factor in factors.values():
            bench.multiply_units(target, factor)


@dataclass(frozen=True, repr=False)
class DropLayer(Variant):
    """A layer that puts out zero: what is left of a network with a way around it.

    Args:
        layer: name of the layer.
    """

    layer: str
    kind: ClassVar[str] = "drop_layer"

    def __post_init__(self) -> None:
        text("layer", self.layer)

    def apply(self, bench: Workbench) -> None:
        import torch

        target = bench.target(self.layer)
        bench.multiply_units(target, torch.zeros(target.units))


@dataclass(frozen=True, repr=False)
class LayerSparsity(Variant):
    """Single weights of one layer pruned, all others left: a step of its sensitivity.

    Args:
        layer: name of the layer.
        sparsity: fraction of its weights removed, in [0, 1).
        criterion: name of the criterion that ranks them.
    """

    layer: str
    sparsity: float
    criterion: str = "magnitude"
    kind: ClassVar[str] = "layer_sparsity"

    def __post_init__(self) -> None:
        text("layer", self.layer)
        text("criterion", self.criterion)
        finite("sparsity", self.sparsity, 0.0, 1.0)

    def apply(self, bench: Workbench) -> None:
        from secateur.core.targets import Targets
        from secateur.sparsify.ranking import SelectionRule

        target = bench.target(self.layer)
        if self.sparsity:
            masks = bench.masks(self.criterion, self.sparsity, SelectionRule(), Targets([target]))
            bench.edit(target.name).masked_fill_(~masks[target.name], 0.0)


_KINDS: dict[str, type[Variant]] = {
    kind.kind: kind for kind in (NoisyPrune, UnitMasks, DropUnit, DropUnits, DropLayer, LayerSparsity)
}


def variant_from(record: Mapping[str, Any]) -> Variant:
    """The variant a `record()` describes.

    Raises: `UsageError` for an unknown kind, a missing or unknown number, a value out of range.

    Examples:
        >>> variant = NoisyPrune(sigma=0.005, sparsity=0.9, seed=3)
        >>> variant_from(variant.record()) == variant
        True
    """
    from secateur.variants.unit_choice import UnitsByCriterion

    if not isinstance(record, Mapping):
        raise UsageError(f"variant: a record is a mapping with a kind, got {record!r}")
    kind = record.get("kind")
    kinds: dict[str, type[Variant]] = {**_KINDS, UnitsByCriterion.kind: UnitsByCriterion}
    if not isinstance(kind, str) or kind not in kinds:
        raise UnknownNameError("variant", str(kind), list(kinds))
    cls = kinds[kind]
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(str(name) for name in record.keys() - known - {"kind"})
    if unknown:
        raise UsageError(f'variant {kind}: unknown "{unknown[0]}"; expected {", ".join(sorted(known))}')
    try:
        return cls(**{name: value for name, value in record.items() if name != "kind"})
    except TypeError as error:
        raise UsageError(f"variant {kind}: {error}; expected {', '.join(sorted(known))}") from error
