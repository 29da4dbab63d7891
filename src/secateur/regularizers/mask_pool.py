"""Dropout of units with masks from a fixed pool: the training of mask-guided pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from secateur.errors import UsageError
from secateur.regularizers.base import Regularizer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from secateur.core.targets import Targets
    from secateur.regularizers.attachment import Attachment

__all__ = ["MaskPoolDropout", "unit_mask"]


@dataclass(frozen=True)
class MaskPoolDropout(Regularizer):
    """Each training forward pass takes one of `pool` mask seeds; unit i of a layer is kept where
    u_i >= drop_rate, u ~ U(0, 1) drawn from that seed and the layer's name, and multiplied by 1 / (1 - drop_rate).

    The whole batch shares the masks: `(1, N)` for linear layers, `(1, C, 1, 1)` for convolutions. They multiply the
    layer's output, behind a BatchNorm if one follows (in front of it the scale would be undone). A network trained so
    can be cut along any mask of the pool, `unit_mask(seed, layer, units, drop_rate)`.

    Args:
        drop_rate: probability of dropping, in [0, 1). It can be changed while attached: `attachment.drop_rate = 0.3`.
            Masks of one seed are nested: what is dropped at a lower rate is dropped at a higher one.
        pool: number of mask seeds, 0 to pool - 1; None: a seed never used before for every pass.
        min_keep: units of a layer that are kept in any case, those of highest u; at least 1.

    Differs from the thesis, whose pseudo-code seeds the global generator anew in every layer: there all layers get the
    beginning of one mask, and the order of the data repeats.

    Randomness: which seed is taken comes from the attachment's own stream; the masks from their seeds alone, on every
        device the same. Cost: one multiplication per parameter of the BatchNorm, or of the layer where none follows
        (then with a copy of it until the backward pass; per output where these are fewer), and one forward pass at
        the start that finds out where a BatchNorm follows.

    Reference: mask-guided structured pruning (thesis), equations 12-14 with p = drop_rate, section 3.2 (pool).
    """

    drop_rate: float = 0.5
    pool: int | None = 10
    min_keep: int = 1
    granularities: ClassVar[tuple[str, ...]] = ("unit",)
    state: ClassVar[str] = "noise stream, drop rate"
    summary: ClassVar[str] = "drops units by masks from a pool of seeds"
    paper: ClassVar[str] = "mask-guided pruning (thesis)"
    cost: ClassVar[str] = "a mask of the BatchNorm or layer weights each step"

    def __post_init__(self) -> None:
        check_drop_rate(self.drop_rate)
        if self.pool is not None and self.pool < 1:
            raise UsageError(f"mask_pool: pool is a number of seeds, at least 1, or None, got {self.pool}")
        if self.min_keep < 1:
            raise UsageError(f"mask_pool: min_keep is at least 1, got {self.min_keep}")

    def attach(self, model: nn.Module, targets: Targets | None = None, *, seed: int = 0) -> Attachment:
        from secateur.regularizers.mask_noise import MaskPoolNoise

        return MaskPoolNoise(self, model, targets, seed)


def check_drop_rate(drop_rate: float) -> None:
    if not 0.0 <= drop_rate < 1.0:
        raise UsageError(f"mask_pool: drop_rate lies in [0, 1), got {drop_rate}")


def unit_mask(seed: int, layer: str, units: int, drop_rate: float, min_keep: int = 1) -> Tensor:
    """Which units of a layer mask `seed` keeps: bool, `[units]`, True = kept; unit i where u_i >= drop_rate.

    Args:
        seed: mask seed, for instance one of the pool (0 to pool - 1).
        layer: name of the layer's weight, as in `Target.name` (`"conv1.weight"`).
        units: number of units.
        drop_rate: in [0, 1). For one seed and layer, masks are nested in it.
        min_keep: where fewer are kept, the units of highest u are kept instead.

    Randomness: the stream of (seed, layer); nothing else, and the global generators are left alone.

    Examples:
        >>> low, high = (unit_mask(8, "conv1.weight", 64, rate) for rate in (0.3, 0.5))
        >>> bool((low | ~high).all()), bool(unit_mask(8, "conv1.weight", 64, 0.0).all())
        (True, True)
    """
    import torch

    from secateur.core.seeds import keyed_generator

    check_drop_rate(drop_rate)
    u = torch.rand(units, generator=keyed_generator(seed, "unit mask", layer), dtype=torch.float64)
    kept = u >= drop_rate
    if int(kept.sum()) < min_keep:
        kept[u.topk(min(min_keep, units)).indices] = True
    return kept
