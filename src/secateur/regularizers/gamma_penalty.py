"""Network slimming at work: the penalty, and |gamma| as scores."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.core.targets import Targets
from secateur.errors import UsageError
from secateur.regularizers.attachment import Attachment
from secateur.regularizers.network_slimming import NetworkSlimming

__all__ = ["GammaPenalty"]


class GammaPenalty(Attachment):
    """Adds l1 x sum of |gamma| to the loss and leaves the forward pass alone."""

    def __init__(self, spec: NetworkSlimming, model: nn.Module, targets: Targets | None, seed: int) -> None:
        super().__init__(spec, model, targets, seed)
        self._l1 = spec.l1
        wrong = [t.name for t in self.targets if t.kind != "norm"]
        if wrong:
            raise UsageError(
                f'network_slimming: "{wrong[0]}" is not a BatchNorm scale; pass targets from '
                'find_targets(model, kind="norm")'
            )

    def penalty(self) -> Tensor | float:
        if not self._l1:
            return 0.0
        return self._l1 * torch.cat(list(self.parameters.values())).abs().sum()

    def scores(self) -> dict[str, Tensor]:
        return {name: p.detach().abs() for name, p in self.parameters.items()}
