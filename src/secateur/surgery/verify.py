"""The proof of a cut: on real inputs, the cut network computes what its masked self computes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from secateur.core.targets import unwrap
from secateur.errors import EquivalenceError, UsageError, VacuousProofError
from secateur.surgery.cut import CutReport, _count, apply_plan
from secateur.surgery.plan import Plan, check_fingerprint
from secateur.surgery.values import tensors_in

__all__ = ["cut_verified_", "masked_outputs", "max_difference", "outputs_in_eval"]

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}

Inputs = Tensor | tuple[Any, ...]


def cut_verified_(
    model: nn.Module,
    plan: Plan,
    inputs: Inputs,
    *,
    optimizer: Optimizer | None = None,
    ema: nn.Module | None = None,
    tolerance: float | None = None,
) -> CutReport:
    """`cut_`, then compare with the masked network in eval mode; where they differ, put everything back.

    The reference is the same network with the removed weights at zero. LayerNorm and GroupNorm compute their
    statistics over the entries they are given, so where such entries go the reference computes them over the
    kept ones only.

    Args:
        model, plan, optimizer, ema: as in `cut_`.
        inputs: what `forward` takes: one tensor, or a tuple of positional arguments. Give real data, at least
            two different samples.
        tolerance: largest difference accepted, relative to the largest absolute output; by default 1e-4 for
            float32, 1e-10 for float64, 2e-2 for float16, 5e-2 for bfloat16.

    Returns:
        The report of the cut, with the difference measured.

    Raises:
        EquivalenceError: the outputs differ or are not finite, or the cut network's forward fails. Nothing is
        changed then. VacuousProofError: the masked network answers the same to every input, which proves
        nothing; nothing is changed then either.
        UsageError: as in `cut_`.

    Cost: two forward passes, and a copy of the touched tensors while the reference runs.
    """
    network = unwrap(model)
    name = type(network).__name__
    check_fingerprint(network, plan)
    with _evaluation(network):
        reference = masked_outputs(network, plan, inputs)
        _check_reference(name, reference)
        before = _count(network)
        undo = apply_plan(network, plan, optimizer=optimizer, ema=ema)
        try:
            outputs = _try_cut(name, network, inputs)
            difference, scale, limit = _compare(name, reference, outputs, tolerance)
        except BaseException:
            undo.restore()
            raise
    report = CutReport(plan.units, before, _count(network))
    return replace(report, max_abs_diff=difference, scale=scale, tolerance=limit, inputs=_samples(inputs))


def max_difference(model_a: nn.Module, model_b: nn.Module, inputs: Inputs) -> float:
    """Largest absolute difference between the outputs of two networks in eval mode; infinite if not finite.

    Raises `UsageError` where their outputs differ in number or shape.
    """
    outputs = [outputs_in_eval(model, inputs) for model in (model_a, model_b)]
    _check_shapes("max_difference", outputs[0], outputs[1], UsageError)
    difference = max((_distance(a, b) for a, b in zip(*outputs, strict=True)), default=0.0)
    return difference if math.isfinite(difference) else math.inf


def outputs_in_eval(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Every tensor `model` returns for `inputs` in eval mode; its flags and all random states are left alone."""
    model = unwrap(model)
    with _evaluation(model):
        return _forward(model, inputs)


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients or reduced-precision products; flags and random state come back after."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(), _exact_products():
            yield
    finally:
        for module, flag in training:
            module.training = flag


@contextmanager
def _exact_products() -> Iterator[None]:
    # A smaller matrix may take another TF32 kernel: a difference of 1e-3 that is no error of the cut.
    if not torch.cuda.is_available():
        yield
        return
    matmul, conv = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, conv


def _forward(model: nn.Module, inputs: Inputs, state: dict[str, Tensor] | None = None) -> list[Tensor]:
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    torch.manual_seed(0)  # inside fork_rng: noise that stays on in eval mode is the same in both passes
    output = model(*arguments) if state is None else functional_call(model, state, arguments)
    return [tensor.detach() for tensor in tensors_in(output)]


def masked_outputs(model: nn.Module, plan: Plan, inputs: Inputs) -> list[Tensor]:
    """Outputs of the masked self, in the network's present mode; `model` is left as it is."""
    masks = plan.masks(model)
    parameters = dict(model.named_parameters())
    state = {name: parameters[name].detach() * mask for name, mask in masks.items()}
    with ExitStack() as hooks, torch.no_grad():
        for layer, kept, edits in _cut_norms(model, plan):
            handle = layer.register_forward_hook(_kept_statistics(layer, kept, edits))
            hooks.callback(handle.remove)
        return _forward(model, inputs, state)


def _cut_norms(model: nn.Module, plan: Plan) -> Iterator[tuple[nn.Module, Tensor, dict[str, Any]]]:
    edits: dict[str, dict[str, Any]] = {}
    for edit in plan.edits:
        edits.setdefault(edit.path, {})[edit.attribute] = edit.value
    seen: set[int] = set()
    for cut in plan.cuts:
        path, _, attribute = cut.path.rpartition(".")
        layer = model.get_submodule(path)
        norm = isinstance(layer, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm)
        if norm and attribute == "weight" and path in edits and id(layer) not in seen:
            seen.add(id(layer))
            yield layer, torch.tensor(cut.kept, dtype=torch.int64), edits[path]


def _kept_statistics(layer: nn.Module, kept: Tensor, edits: dict[str, Any]) -> Any:
    """A forward hook that runs a norm over its kept entries only, and leaves zeros elsewhere."""
    size = layer.num_channels if isinstance(layer, nn.GroupNorm) else layer.normalized_shape[0]  # type: ignore[index]
    small = copy.copy(layer)
    small._parameters = {
        name: None if p is None else nn.Parameter(p.detach()[kept.to(p.device)], requires_grad=False)
        for name, p in layer._parameters.items()
    }
    for attribute, value in edits.items():
        setattr(small, attribute, value)

    def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = args[0]
        # Image networks subclass LayerNorm to normalize over dimension 1 of [batch, channels, height, width].
        first = isinstance(layer, nn.GroupNorm) or (
            type(layer) is not nn.LayerNorm and x.ndim == 4 and x.shape[1] == size
        )
        dim, entries = (1 if first else -1), kept.to(x.device)
        return torch.zeros_like(output).index_copy_(dim, entries, small.forward(x.index_select(dim, entries)))

    return hook


def _check_reference(name: str, reference: list[Tensor]) -> None:
    values = [tensor for tensor in reference if tensor.is_floating_point() or tensor.is_complex()]
    if not values or all(tensor.numel() == 0 for tensor in values):
        raise EquivalenceError(f"cut of {name} not proven: it returns no floating-point tensor to compare")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in values):
        raise EquivalenceError(
            f"cut of {name} not proven: the masked network already returns values that are not finite; "
            "check weights and inputs"
        )
    if all(_says_nothing(tensor) for tensor in values):
        raise VacuousProofError(
            f"cut of {name} not proven: the masked network gives the same output for every input (a head of "
            "zeros, or too little kept), so comparing proves nothing; give different real inputs, or use cut_"
        )


def _says_nothing(tensor: Tensor) -> bool:
    if tensor.ndim > 1 and tensor.shape[0] > 1:
        return bool((tensor == tensor[:1]).all())
    return tensor.numel() == 0 or bool((tensor == tensor.reshape(-1)[0]).all())


def _try_cut(name: str, model: nn.Module, inputs: Inputs) -> list[Tensor]:
    try:
        return _forward(model, inputs)
    except Exception as error:
        line = " ".join(str(error).split())[:200]
        raise EquivalenceError(
            f"cut of {name} undone: its forward fails with {type(error).__name__}: {line}; a size is written into "
            "its code (view, reshape, heads), so leave out the groups it concerns"
        ) from error


def _compare(
    name: str, reference: list[Tensor], outputs: list[Tensor], tolerance: float | None
) -> tuple[float, float, float]:
    _check_shapes(f"cut of {name} undone", reference, outputs, EquivalenceError)
    worst = (0.0, 0.0, 0.0)
    for expected, got in zip(reference, outputs, strict=True):
        if not (expected.is_floating_point() or expected.is_complex()) or expected.numel() == 0:
            continue
        limit = _TOLERANCE.get(expected.dtype, 1e-4) if tolerance is None else tolerance
        difference, scale = _distance(expected, got), float(expected.abs().max())
        if not difference <= limit * scale:
            raise EquivalenceError(
                f"cut of {name} undone: max |masked - cut| = {difference:.3g} where outputs reach {scale:.3g}, "
                f"expected at most {limit:g} of that; the tracer misread the network, so leave out some groups"
            )
        worst = max(worst, (difference, scale, limit), key=lambda w: w[0] / w[1] if w[1] else -1.0)
    return worst


def _check_shapes(what: str, a: list[Tensor], b: list[Tensor], error: type[Exception]) -> None:
    shapes = [[list(t.shape) for t in outputs] for outputs in (a, b)]
    if shapes[0] != shapes[1]:
        raise error(f"{what}: outputs of shapes {shapes[0]} and {shapes[1]}, expected the same")


def _distance(a: Tensor, b: Tensor) -> float:
    if a.numel() == 0:
        return 0.0
    kind = torch.float64 if not a.is_complex() else torch.complex128
    return float((a.to("cpu", kind) - b.to("cpu", kind)).abs().max())


def _samples(inputs: Inputs) -> int:
    first = next(tensors_in(inputs), None)
    return int(first.shape[0]) if first is not None and first.ndim else 1
