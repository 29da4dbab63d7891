"""The mask pool at work: masks by seed, kept ready for every seed of the pool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.targets import Targets
from secateur.regularizers.channel_noise import ChannelNoise
from secateur.regularizers.mask_pool import MaskPoolDropout, check_drop_rate, unit_mask
from secateur.regularizers.stream import NoiseStream

__all__ = ["MaskPoolNoise"]


class MaskPoolNoise(ChannelNoise):
    """Multiplies each layer's units by the mask of one seed a forward pass. `mask_seed` is the last one taken."""

    def __init__(self, spec: MaskPoolDropout, model: nn.Module, targets: Targets | None, seed: int) -> None:
        super().__init__(spec, model, targets, seed, "mask_pool")
        self._expect_units()
        # On the CPU: a device would have to be waited for to know the seed it drew.
        self.stream = NoiseStream(seed)
        self.mask_seed: int | None = None
        self._pool, self._min_keep, self._drop_rate = spec.pool, spec.min_keep, spec.drop_rate
        self._ready: dict[int, dict[str, Tensor]] = {}

    @property
    def drop_rate(self) -> float:
        """Share of units dropped, in [0, 1), from the next forward pass on."""
        return self._drop_rate

    @drop_rate.setter
    def drop_rate(self, rate: float) -> None:
        check_drop_rate(rate)
        self._drop_rate = rate
        self._ready.clear()

    def draw(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seed = sum(bit << i for i, bit in enumerate(self.stream.bernoulli((62,), 0.5).tolist()))
        self.mask_seed = seed if self._pool is None else seed % self._pool
        self._masks.clear()
        if self._drop_rate:
            self._masks.update(self._ready.get(self.mask_seed) or self._make(self.mask_seed))

    def _make(self, seed: int) -> dict[str, Tensor]:
        masks = {}
        for target in self.targets:
            weight = self.parameters[target.name]
            kept = unit_mask(seed, target.name, target.units, self._drop_rate, self._min_keep)
            scaled = kept.to(torch.float64).div_(1.0 - self._drop_rate)
            masks[target.name] = scaled.to(weight.device, weight.dtype).unsqueeze(0)
        if self._pool is not None:
            self._ready[seed] = masks
        return masks

    def state_dict(self) -> dict[str, Tensor]:
        return {**super().state_dict(), "drop_rate": torch.tensor(self._drop_rate, dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.drop_rate = float(state["drop_rate"])
