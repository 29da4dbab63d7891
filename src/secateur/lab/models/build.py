"""From a name to a network: resolve it to a builder and JSON arguments, then build it with seeded weights."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from secateur.errors import UnknownNameError, UsageError, nearest
from secateur.lab.models.catalog import MODELS
from secateur.registry import load_attribute, load_python

if TYPE_CHECKING:
    from torch import nn

__all__ = ["build_model", "resolve_builder"]

_FAMILIES = {
    "torchvision": "secateur.lab.models.external:torchvision_model",
    "timm": "secateur.lab.models.external:timm_model",
}
_OTHER_NAMES = "or torchvision:NAME, timm:NAME, python:module:function"


def build_model(
    name: str,
    *,
    num_classes: int,
    in_shape: tuple[int, int, int],
    kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    allow_code: Collection[str] = (),
) -> nn.Module:
    """Build the network `name` with freshly drawn weights; nothing is ever downloaded.

    Args:
        name: a name in `MODELS`, `torchvision:NAME`, `timm:NAME` or `python:module:function`.
        num_classes: outputs of the classifier, at least 1.
        in_shape: (channels, height, width) of one image.
        kwargs: the network's own arguments (`{"hidden": [300, 100]}`).
        seed: root seed of the run; the weights come from its stream "init".
        allow_code: modules that `python:` names may load.

    Raises:
        UnknownNameError: no such network; the message lists the nearest three.
        UsageError: an argument the builder does not take, or one it refuses.
        MissingExtraError: `timm:` without timm.

    Randomness: the global CPU generator of torch is seeded for the builder and put back as it was.

    Examples:
        >>> net = build_model("mlp", num_classes=10, in_shape=(1, 28, 28), kwargs={"hidden": [40, 40]})
        >>> sum(p.numel() for p in net.parameters())
        33450
    """
    import torch

    from secateur.core.seeds import keyed_seed

    builder, arguments = resolve_builder(name, num_classes, in_shape, kwargs, allow_code=allow_code)
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed every accelerator, which fork_rng does not put back here.
        torch.default_generator.manual_seed(keyed_seed(seed, "init"))
        model = load_attribute(builder)(**arguments)
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f'model "{name}": {builder} returned {type(model).__name__}, expected a torch.nn.Module')
    return model


def resolve_builder(
    name: str,
    num_classes: int,
    in_shape: Sequence[int],
    kwargs: Mapping[str, Any] | None = None,
    *,
    allow_code: Collection[str] = (),
) -> tuple[str, dict[str, Any]]:
    """What builds `name`: `"module:function"` and every argument it gets, as plain JSON values.

    Defaults are written out, so that a file saved today is rebuilt alike when a default changes.

    Returns:
        builder, arguments: `load_attribute(builder)(**arguments)` is the network, with unseeded weights.

    Raises: as `build_model`.
    """
    _check_task(num_classes, in_shape)
    family, _, member = name.partition(":")
    given = dict(kwargs or {})
    task: dict[str, Any] = {"num_classes": num_classes, "in_shape": list(in_shape)}
    if family in _FAMILIES:
        from secateur.lab.models.external import external_arguments

        arguments = {"name": member, **task, "kwargs": external_arguments(family, member, task, given)}
        return _FAMILIES[family], _as_json(name, arguments)
    if family == "python":
        builder, function = name.partition(":")[2], load_python(name, allow_code)
    else:
        if name not in MODELS.names():
            raise UnknownNameError("model", name, MODELS.names(), _OTHER_NAMES)
        function = MODELS.load(name)
        builder = MODELS.builtin.get(name) or f"{function.__module__}:{function.__qualname__}"
    return builder, _as_json(name, _arguments(name, function, task, given))


def _check_task(num_classes: int, in_shape: Sequence[int]) -> None:
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise UsageError(f"num_classes: got {num_classes!r}, expected an integer of at least 1")
    shape = list(in_shape)
    if len(shape) != 3 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in shape):
        raise UsageError(f"in_shape: got {shape}, expected (channels, height, width), integers of at least 1")


def _arguments(
    name: str, function: Callable[..., Any], task: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything `function` is called with: the task where it takes it, its defaults, and what was given."""
    parameters = inspect.signature(function).parameters.values()
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    own = [p.name for p in named if p.name not in task]
    for key in given:
        if key not in own and (key in task or not open_ended):
            raise unknown_argument(name, key, own)
    defaults = {p.name: p.default for p in named if p.name not in task and _is_json(p.default)}
    arguments = {key: value for key, value in task.items() if key in {p.name for p in named}}
    arguments |= defaults | dict(given)
    missing = [p.name for p in named if p.default is p.empty and p.name not in arguments]
    if missing:
        raise UsageError(f'model "{name}" needs {", ".join(missing)}; give a value in its arguments')
    return arguments


def unknown_argument(name: str, key: str, valid: Sequence[str]) -> UsageError:
    """The error for an argument that the builder of `name` does not take."""
    close = nearest(key, valid)
    return UsageError(
        f'model "{name}" takes no argument "{key}"; valid: {", ".join(valid) or "none"}'
        + (f"; nearest: {', '.join(close)}" if close else "")
    )


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _as_json(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """`arguments` as JSON would give them back, so that rebuilding from a file is the same call."""
    try:
        return dict(json.loads(json.dumps(arguments, allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f'model "{name}": arguments must be plain JSON values ({error}), so that it can be built again; '
            "wrap other objects in your own builder and name it python:module:function"
        ) from error
