"""Where the units of a layer can be multiplied so that nothing behind undoes it: after a BatchNorm that follows.

A factor in front of a BatchNorm is lost: the BatchNorm divides by it again, and a unit that is zero there is the
constant beta behind it. So the layer's output is followed, by the identity of tensors in one forward pass, until
something mixes the units.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.core.targets import Target, Targets
from secateur.errors import UsageError
from secateur.regularizers.quiet_pass import quiet_pass, tensors_in

__all__ = ["Site", "find_norms", "find_sites", "over_units", "own_site"]

_BATCH_NORM = nn.modules.batchnorm._BatchNorm
# Each unit of the result depends on the same unit of the input alone, and lies where it lay.
_ALONE = re.compile(
    "relu6?|(leaky_|p|r)relu|[sc]?elu|gelu|silu|mish|tanh|(log|hard)?sigmoid|soft(plus|sign)|hard(swish|tanh)|threshold|"
    "(feature_)?(alpha_)?dropout([123]d)?|(adaptive_)?(avg|max)_pool[123]d|interpolate|clamp(_min)?|neg|abs|square|sqrt|"
    "contiguous|clone|detach|to|type|float|half|bfloat16"
)
# The same numbers elsewhere: a BatchNorm behind these cannot be lined up with the units.
_MOVED = re.compile(
    "flatten|unflatten|reshape|view|view_as|permute|transpose|movedim|swapaxes|squeeze|unsqueeze|expand|repeat|stack|"
    "cat|concat|concatenate|chunk|split|tensor_split|unbind|select|narrow|pad|mean|sum|__getitem__|pixel_shuffle"
)
_UNDOING = frozenset(["batch_norm", "instance_norm", "group_norm"])


class Site(NamedTuple):
    """Multiply the output of submodule `module`, whose units lie along `axis`."""

    module: str
    axis: int


def own_site(target: Target) -> Site:
    """The output of the target's own layer."""
    return Site(target.module, -1 if target.kind == "linear" else 1 - len(target.shape))


def over_units(factor: Tensor, output: Tensor, axis: int) -> Tensor:
    """`factor`, `[1 or samples, units]`, as a view that broadcasts against `output`, whose units lie along `axis`."""
    shape = [1] * output.dim()
    shape[axis] = factor.shape[1]
    if factor.shape[0] != 1:
        shape[0] = factor.shape[0]
    return factor.reshape(shape)


def find_sites(
    method: str, network: nn.Module, targets: Targets, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Site]:
    """The site of every target, by target name: behind the BatchNorm it runs into, else its own layer.

    Runs `network` once in eval mode without gradients on `args` and `kwargs`. Whatever cannot be decided surely (a
    layer that is not called, an output that runs into a BatchNorm and elsewhere, a BatchNorm that is shared or that
    sees the units in another order, a GroupNorm) is a `UsageError` that names the layer.
    """
    if not any(network.children()):
        return {t.name: own_site(t) for t in targets}
    trail = _Trail()
    with _looking(network, targets, trail), trail:
        network.forward(*args, **kwargs)
    return {t.name: _decide(method, network, t, trail) for t in targets}


def find_norms(
    network: nn.Module, targets: Targets, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, str]:
    """The BatchNorm that surely follows each target alone, by target name; targets without one are left out."""
    if not any(network.children()):
        return {}
    trail = _Trail()
    with _looking(network, targets, trail), trail:
        network.forward(*args, **kwargs)
    found: dict[str, str] = {}
    for target in targets:
        with suppress(UsageError):
            site = _decide("", network, target, trail)
            if site.module != target.module:
                found[target.name] = site.module
    return found


def _decide(method: str, network: nn.Module, target: Target, trail: _Trail) -> Site:
    ends = trail.ends.get(target.module)
    if ends is None:
        why = "it was not called as a module in a forward pass"
    elif ends == {""}:
        return own_site(target)
    elif len(ends) > 1:
        why = "a BatchNorm follows it on one way but not on the other"
    else:
        (norm,) = ends
        if norm not in trail.calls:
            why = f"it runs into {norm}"
        elif trail.calls[norm] != {frozenset([target.module])}:
            why = f'BatchNorm "{norm}" normalizes the output of other layers too'
        elif network.get_submodule(norm).num_features != target.units:
            why = f'BatchNorm "{norm}" has another number of channels'
        else:
            return Site(norm, 1)
    raise UsageError(f'{method}: where to multiply the units of layer "{target.module}" is unsure: {why}; exclude it')


class _Followed(NamedTuple):
    # Kept, so that its id stays its own.
    tensor: Tensor
    layers: frozenset[str]
    moved: bool


class _Trail(TorchFunctionMode):
    """Follows layer outputs. `ends`: per layer, what used them: a BatchNorm's path, "" for anything else that is
    harmless, a description of what is not. `calls`: per BatchNorm, the layers whose outputs it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: dict[str, set[str]] = {}
        self.calls: dict[str, set[frozenset[str]]] = {}
        self.norm: str | None = None
        self._followed: dict[int, _Followed] = {}

    def follow(self, layer: str, output: Any) -> None:
        self.ends.setdefault(layer, set())
        if isinstance(output, Tensor):
            self._followed[id(output)] = _Followed(output, frozenset([layer]), False)

    def enter_norm(self, path: str, source: Any) -> None:
        self.norm = path
        found = self._followed.get(id(source))
        self.calls.setdefault(path, set()).add(found.layers if found is not None else frozenset())

    def finish(self) -> None:
        for ends in self.ends.values():
            if not ends:
                ends.add("")

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        used = [self._followed[id(t)] for t in tensors_in([args, kwargs]) if id(t) in self._followed]
        results = list(tensors_in(out))
        if not used or not results:
            return out
        layers = frozenset().union(*(f.layers for f in used))
        moved = any(f.moved for f in used)
        name = getattr(func, "__name__", "").removesuffix("_") if self.norm is None else "batch_norm"
        changes = _MOVED.fullmatch(name) is not None
        if changes or _ALONE.fullmatch(name):
            for result in results:
                self._followed[id(result)] = _Followed(result, layers, moved or changes or len(used) > 1)
            return out
        end = ""
        if name in _UNDOING:
            end = f"a function {name}" if self.norm is None else self.norm
            if self.norm is not None and moved:
                end = f'BatchNorm "{self.norm}" in another order'
        for layer in layers:
            self.ends[layer].add(end)
        return out


@contextmanager
def _looking(network: nn.Module, targets: Targets, trail: _Trail) -> Iterator[None]:
    """Within the block it is a quiet pass, in which layers and BatchNorms report to `trail`."""
    modules = dict(network.named_modules())
    handles = []
    for target in targets:
        layer = target.module
        handles.append(modules[layer].register_forward_hook(lambda m, a, out, layer=layer: trail.follow(layer, out)))
    for path, module in modules.items():
        if isinstance(module, _BATCH_NORM):
            handles.append(
                module.register_forward_pre_hook(lambda m, a, path=path: trail.enter_norm(path, a[0] if a else None))
            )
            handles.append(module.register_forward_hook(lambda *_: setattr(trail, "norm", None), always_call=True))
    try:
        with quiet_pass(network):
            yield
        trail.finish()
    finally:
        for handle in handles:
            handle.remove()
