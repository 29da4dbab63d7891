"""Masks: which weights are kept, by parameter name; and the hold that keeps the others at zero."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.core.targets import unwrap
from secateur.errors import CheckpointError, NoEffectError, StorageError, UnknownNameError, UsageError

__all__ = ["Hold", "Masks"]


class Masks(Mapping[str, Tensor]):
    """Parameter name -> bool tensor of the parameter's shape; True = kept. Treat it as immutable.

    Examples:
        >>> masks = Masks({"w": torch.tensor([True, False, False, True])})
        >>> masks.sparsity, masks.kept, masks.total
        (0.5, 2, 4)
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise UsageError(f'mask "{name}": expected a bool tensor (True = kept), got {mask.dtype}')
        self._masks = dict(masks)

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        return f"Masks({len(self)} tensors, sparsity {self.sparsity:.4f})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        return self.keys() == other.keys() and all(torch.equal(self[n], other[n]) for n in self)

    __hash__ = None  # type: ignore[assignment]

    @property
    def total(self) -> int:
        """Number of weights covered."""
        return sum(m.numel() for m in self.values())

    @property
    def kept(self) -> int:
        """Number of weights kept."""
        return sum(int(m.sum()) for m in self.values())

    @property
    def sparsity(self) -> float:
        """Fraction removed of what the masks cover."""
        return 1.0 - self.kept / self.total if self.total else 0.0

    def layers(self) -> list[tuple[str, int, int]]:
        """(name, kept, total) of every tensor, in order."""
        return [(name, int(mask.sum()), mask.numel()) for name, mask in self.items()]

    def __and__(self, other: Masks) -> Masks:
        """Kept by both; a tensor that only one covers is taken from that one."""
        names = [*self, *(n for n in other if n not in self)]
        return Masks({n: self[n] & other[n] if n in self and n in other else self._either(other, n) for n in names})

    def __or__(self, other: Masks) -> Masks:
        """Kept by either; only tensors that both cover stay masked."""
        return Masks({n: self[n] | other[n] for n in self if n in other})

    def _either(self, other: Masks, name: str) -> Tensor:
        return self[name] if name in self else other[name]

    def overlap(self, other: Masks) -> float:
        """Jaccard similarity of what is kept, over the tensors both cover: 1 = the same, 0 = disjoint."""
        both = [n for n in self if n in other]
        union = sum(int((self[n] | other[n]).sum()) for n in both)
        return sum(int((self[n] & other[n]).sum()) for n in both) / union if union else 1.0

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Set what is not kept to zero, in place, once. Use `hold` to keep it there while training."""
        for parameter, gone in self._resolve(model).values():
            parameter.masked_fill_(gone, 0.0)

    def hold(self, model: nn.Module, optimizer: Optimizer, ema: nn.Module | None = None) -> Hold:
        """Zero now, and again after every optimizer step, until the returned `Hold` is removed."""
        return Hold(self, model, optimizer, ema)

    def _resolve(self, model: nn.Module) -> dict[str, tuple[nn.Parameter, Tensor]]:
        """name -> (parameter, what is gone), checked against the model."""
        model = unwrap(model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        found: dict[str, tuple[nn.Parameter, Tensor]] = {}
        for name, mask in self.items():
            if name not in parameters:
                raise UnknownNameError("masked parameter", name, parameters)
            parameter = parameters[name]
            if parameter.shape != mask.shape:
                raise UsageError(
                    f'mask "{name}": shape {list(mask.shape)} does not fit the parameter {list(parameter.shape)}; '
                    "the masks belong to another network, or the network has been cut since"
                )
            found[name] = (parameter, ~mask.to(parameter.device))
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file (one byte per weight)."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        try:
            save_file({n: m.to(torch.uint8).cpu().contiguous() for n, m in self.items()}, str(path))
        except (OSError, SafetensorError) as error:
            raise StorageError(f"cannot write masks to {path}: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Read what `save` wrote; `CheckpointError` for anything else."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not Path(path).is_file():
            raise CheckpointError(f"no mask file at {path}")
        try:
            tensors = load_file(str(path))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is not a safetensors file of masks: {error}") from error
        if any(t.dtype != torch.uint8 or bool((t > 1).any()) for t in tensors.values()):
            raise CheckpointError(f"{path} holds tensors that are not masks (expected uint8 of 0 and 1)")
        return cls({n: t.bool() for n, t in tensors.items()})


class Hold:
    """Keeps masked weights exactly zero through training, without touching the model's keys, types or hooks.

    After every step of `optimizer` the masked weights are zeroed again, which undoes what momentum, Adam's
    moments and weight decay do to them. An `ema` copy (such as `torch.optim.swa_utils.AveragedModel`) is zeroed
    when the hold begins and when the masks change; averages of zeros stay zero in between.

    Cost: one read of the held weights a step, a byte of memory each.
    """

    def __init__(self, masks: Masks, model: nn.Module, optimizer: Optimizer, ema: nn.Module | None = None) -> None:
        if not masks:
            raise NoEffectError("hold: the masks are empty, so nothing would be held")
        self.masks = masks
        self._model, self._optimizer, self._ema = model, optimizer, ema
        self._resolved = masks._resolve(model)
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in trained for p, _ in self._resolved.values()):
            raise UsageError(
                "hold: the optimizer trains none of the masked parameters; "
                "build it from this model's parameters (after a cut, pass the optimizer to cut_)"
            )
        self._handle = optimizer.register_step_post_hook(lambda *_: self.zero_())
        self.zero_()
        self._zero_ema()

    @torch.no_grad()
    def zero_(self) -> None:
        """Zero the masked weights now. `UsageError` if the network has been cut since the hold began."""
        network = unwrap(self._model)
        for name, (parameter, gone) in self._resolved.items():
            if network.get_parameter(name) is not parameter:
                raise UsageError(
                    f'hold: "{name}" is no longer the parameter that is held (the network was cut); '
                    "remove the hold before a cut, and hold again with masks of the smaller network"
                )
            parameter.masked_fill_(gone, 0.0)

    @torch.no_grad()
    def zero_gradients_(self) -> None:
        """Zero the gradients of masked weights, so that they do not count where all gradients are clipped together."""
        for parameter, gone in self._resolved.values():
            if parameter.grad is not None:
                parameter.grad.masked_fill_(gone, 0.0)

    def _zero_ema(self) -> None:
        if self._ema is not None:
            self.masks.apply_(getattr(self._ema, "module", self._ema))

    @torch.no_grad()
    def update_(self, masks: Masks) -> None:
        """Hold other masks from now on. Weights that come back start with clean (zero) optimizer state."""
        resolved = masks._resolve(self._model)
        for name, (_, was_gone) in self._resolved.items():
            parameter = self._resolved[name][0]
            regrown = was_gone & ~resolved[name][1] if name in resolved else was_gone
            if not bool(regrown.any()):
                continue
            for value in self._optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.masked_fill_(regrown, 0.0)
        self.masks, self._resolved = masks, resolved
        self.zero_()
        self._zero_ema()

    def remove(self) -> None:
        """Stop holding. The weights stay as they are."""
        self._handle.remove()

    def __enter__(self) -> Hold:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
