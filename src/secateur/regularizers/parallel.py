"""Where a process stands among those that share each batch, and what their wrapper does not see."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from secateur.core.targets import unwrap

__all__ = ["data_rank", "is_wrapped", "not_averaged"]


def data_rank() -> tuple[int, int]:
    """The rank of this process and how many processes share each batch: (0, 1) without `torch.distributed`.

    Every process of the default group counts as one that trains the same network on its own part of each batch.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def is_wrapped(model: nn.Module) -> bool:
    """Whether `DistributedDataParallel` lies between `model` and its network."""
    network = unwrap(model)
    while model is not network:
        if isinstance(model, DistributedDataParallel):
            return True
        model = getattr(model, "_orig_mod", None) or model.module  # type: ignore[assignment]
    return False


def not_averaged(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether the `DistributedDataParallel` that runs forward right now was built before one of `parameters`."""
    if torch.compiler.is_compiling():
        return False
    wrapper = getattr(DistributedDataParallel, "_active_ddp_module", None)
    known = {id(p) for p in getattr(wrapper, "_module_parameters", ())}
    return bool(known) and not all(id(p) in known for p in parameters)
