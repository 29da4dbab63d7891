"""Physical removal: a plan at work on a module, its optimizer and its averaged copy, with a way back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from secateur.core.targets import unwrap
from secateur.errors import UsageError
from secateur.surgery.plan import Cut, Plan, Units, check_fingerprint, fingerprint

__all__ = ["CutReport", "Undo", "apply_plan", "cut_"]


@dataclass(frozen=True)
class CutReport:
    """What a cut did, and how well it was checked; `to_dict` is plain JSON data.

    Args:
        units: group name, units before, units after.
        parameters_before, parameters_after: numbers of parameters, tied ones once.
        max_abs_diff: largest difference between the masked and the cut network's outputs; None = not checked.
        scale: largest absolute output of the masked network.
        tolerance: largest `max_abs_diff / scale` accepted.
        inputs: how many inputs were compared.
    """

    units: tuple[Units, ...]
    parameters_before: int
    parameters_after: int
    max_abs_diff: float | None = None
    scale: float | None = None
    tolerance: float | None = None
    inputs: int = 0

    @property
    def compression(self) -> float:
        """Dense / kept parameters."""
        return self.parameters_before / self.parameters_after

    @property
    def relative_diff(self) -> float | None:
        """`max_abs_diff / scale`."""
        if self.max_abs_diff is None or self.scale is None:
            return None
        return self.max_abs_diff / self.scale

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "units": [list(units) for units in self.units]}


class Undo:
    """Steps to take back, last first."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def add(self, step: Callable[[], None]) -> None:
        self._steps.append(step)

    def restore(self) -> None:
        """Put everything back as it was, the very same tensors included."""
        while self._steps:
            self._steps.pop()()


def cut_(
    model: nn.Module, plan: Plan, *, optimizer: Optimizer | None = None, ema: nn.Module | None = None
) -> CutReport:
    """Remove the entries `plan` does not keep, in place. Unchecked: prefer `cut_verified_` on real inputs.

    Every tensor cut is a new `nn.Parameter` at all its names (tied weights stay tied); gradients are sliced
    along. Works on a network on the `meta` device. Where anything fails, everything is put back.

    Args:
        model: the network the plan was made for.
        plan: what to keep.
        optimizer: its parameter groups get the new parameters, and its state is sliced along (momentum, Adam's
            moments). Remove a `Masks.hold` first, and hold again afterwards.
        ema: an averaged copy (`AveragedModel`, or a plain copy of the network), cut the same way.

    Raises:
        UsageError: another network, an optimizer without any of the cut parameters, or optimizer state that
        cannot be sliced.

    Cost: a copy of what is kept of the touched tensors.
    """
    before = _count(model)
    apply_plan(model, plan, optimizer=optimizer, ema=ema)
    return CutReport(plan.units, before, _count(model))


def apply_plan(
    model: nn.Module, plan: Plan, *, optimizer: Optimizer | None = None, ema: nn.Module | None = None
) -> Undo:
    """As `cut_`, and return the way back."""
    model = unwrap(model)
    check_fingerprint(model, plan)
    averaged = None if ema is None else _averaged(ema, plan)
    undo = Undo()
    try:
        replaced = _cut_module(model, plan, undo)
        if optimizer is not None:
            _cut_optimizer(optimizer, replaced, undo)
        if averaged is not None:
            _cut_module(averaged, plan, undo)
    except BaseException:
        undo.restore()
        raise
    return undo


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in unwrap(model).parameters())


def _averaged(ema: nn.Module, plan: Plan) -> nn.Module:
    inner = unwrap(ema)
    if isinstance(inner, AveragedModel) or (
        fingerprint(inner) != plan.fingerprint and isinstance(getattr(inner, "module", None), nn.Module)
    ):
        inner = unwrap(inner.module)  # type: ignore[arg-type]
    check_fingerprint(inner, plan)
    return inner


def _slice(tensor: Tensor, cuts: list[Cut]) -> Tensor:
    """The kept entries of `tensor`, as a new contiguous tensor."""
    for cut in cuts:
        kept = torch.tensor(cut.kept, dtype=torch.int64)
        length = tensor.shape[cut.dim] * cut.groups
        if cut.kept[-1] >= length:
            raise UsageError(f'plan: "{cut.path}" has {length} entries along {cut.dim}, entry {cut.kept[-1]} is none')
        if cut.groups == 1:
            tensor = tensor.index_select(cut.dim, kept.to(tensor.device))
            continue
        per_group, groups = tensor.shape[cut.dim], cut.groups
        rows = tensor.reshape(groups, tensor.shape[0] // groups, *tensor.shape[1:])
        columns = (kept % per_group).reshape(groups, -1).to(tensor.device)
        parts = [row.index_select(cut.dim, column) for row, column in zip(rows, columns, strict=True)]
        tensor = torch.cat(parts)
    return tensor


Replaced = dict[Tensor, tuple[nn.Parameter, list[Cut]]]


@torch.no_grad()
def _cut_module(model: nn.Module, plan: Plan, undo: Undo) -> Replaced:
    tensors: dict[int, tuple[Tensor, list[Cut]]] = {}
    for cut in plan.cuts:
        owner, _, attribute = cut.path.rpartition(".")
        tensor = getattr(model.get_submodule(owner), attribute)
        if tensor is None:  # a norm without scale
            continue
        cuts = tensors.setdefault(id(tensor), (tensor, []))[1]
        # A tied tensor is named by the plan once under each of its names.
        if not any((c.dim, c.kept, c.groups) == (cut.dim, cut.kept, cut.groups) for c in cuts):
            cuts.append(cut)
    replaced: Replaced = {}
    new: dict[int, Tensor] = {}
    for tensor, cuts in tensors.values():
        small = _slice(tensor.detach(), cuts)
        if isinstance(tensor, nn.Parameter):
            parameter = nn.Parameter(small, requires_grad=tensor.requires_grad)
            parameter.__dict__.update(tensor.__dict__)
            if tensor.grad is not None:
                parameter.grad = _slice(tensor.grad, cuts)
            replaced[tensor] = (parameter, cuts)
            small = parameter
        new[id(tensor)] = small
    for module in model.modules():
        for slots in (module._parameters, module._buffers):
            for name, old in list(slots.items()):
                if old is not None and id(old) in new:
                    _set_item(slots, name, new[id(old)], undo)
    for edit in plan.edits:
        _set_attribute(model.get_submodule(edit.path), edit.attribute, edit.value, undo)
    return replaced


def _set_item(slots: dict[str, Any], name: str, value: Any, undo: Undo) -> None:
    undo.add(lambda old=slots[name]: slots.__setitem__(name, old))  # type: ignore[misc]
    slots[name] = value


def _set_attribute(module: nn.Module, name: str, value: Any, undo: Undo) -> None:
    undo.add(lambda old=getattr(module, name): setattr(module, name, old))  # type: ignore[misc]
    setattr(module, name, value)


@torch.no_grad()
def _cut_optimizer(optimizer: Optimizer, replaced: Replaced, undo: Undo) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(old) in held for old in replaced):
        raise UsageError(
            f"{type(optimizer).__name__} holds none of the {len(replaced)} parameters that are cut; give the "
            "optimizer of this network, or none and build one afterwards"
        )
    for group in optimizer.param_groups:
        old = group["params"]
        undo.add(lambda group=group, old=old: group.__setitem__("params", old))  # type: ignore[misc]
        group["params"] = [replaced[p][0] if p in replaced else p for p in old]
    state = dict(optimizer.state)
    small = {replaced[p][0] if p in replaced else p: _cut_state(optimizer, p, s, replaced) for p, s in state.items()}

    def put(content: dict[Any, Any]) -> None:
        optimizer.state.clear()
        optimizer.state.update(content)

    undo.add(lambda: put(state))
    put(small)


def _cut_state(optimizer: Optimizer, parameter: Tensor, state: Any, replaced: Replaced) -> Any:
    if parameter not in replaced:
        return state
    cuts = replaced[parameter][1]
    small = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            small[name] = _slice(value, cuts)
        elif isinstance(value, Tensor) and value.numel() > 1:
            raise UsageError(
                f"{type(optimizer).__name__}: state {name!r} of shape {list(value.shape)} cannot be cut along with "
                f'"{cuts[0].path}" {list(parameter.shape)}; cut with optimizer=None and build a new optimizer'
            )
        else:
            small[name] = value
    return small
