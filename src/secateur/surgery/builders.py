"""Build a network from a `"module:function"` name and JSON arguments that come from a file nobody vouches for."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from secateur.errors import CheckpointError, MissingExtraError, SecateurError, UsageError
from secateur.registry import load_attribute, load_python

__all__ = ["build", "check_arguments", "find_builder"]

_OWN = "secateur.lab.models"
# Arguments through which the libraries' builders fetch or unpickle files, or through which ours load code.
_FETCHING = (
    *("weights", "weights_backbone", "pretrained", "pretrained_backbone", "checkpoint_path"),
    *("pretrained_cfg", "pretrained_cfg_overlay", "allow_code"),
)
_REMOTE = ("hf-hub:", "hf_hub:", "local-dir:", "http:", "https:", "python:")


def find_builder(builder: str, allow_code: Collection[str] = ()) -> Callable[..., Any]:
    """The function called `builder`, if it is one of ours, torchvision's or timm's, or in a module allowed.

    Raises `UsageError` otherwise; `MissingExtraError` where timm is not installed.
    """
    module, _, attribute = builder.partition(":")
    if not module or not attribute.isidentifier():
        raise UsageError(f'builder "{builder}": expected module:function')
    if module == _OWN or module.startswith(_OWN + "."):
        return _own_builder(builder)
    if module == "torchvision.models" or module.startswith("torchvision.models."):
        from torchvision import models

        if attribute in models.list_models():
            return models.get_model_builder(attribute)
        raise UsageError(f'builder "{builder}": torchvision has no network of that name')
    if builder == "timm:create_model":
        try:
            return load_attribute(builder)
        except ImportError as error:
            raise MissingExtraError("timm networks", "timm") from error
    return load_python(f"python:{builder}", allow_code)


def _own_builder(builder: str) -> Callable[..., Any]:
    try:
        function = load_attribute(builder)
    except (ImportError, AttributeError) as error:
        raise UsageError(f'builder "{builder}" does not import: {error}') from error
    if not callable(function) or not getattr(function, "__module__", "").startswith(_OWN):
        raise UsageError(f'builder "{builder}" is not a network of secateur; expected one of `secateur models`')
    return function


def check_arguments(kwargs: Mapping[str, Any]) -> None:
    """Raise `UsageError` where arguments would fetch weights, read other files or load code."""
    for key, value in kwargs.items():
        if key in _FETCHING and value:
            raise UsageError(
                f"builder argument {key}={value!r} would fetch files or load code; leave it out, the weights are "
                "in the file itself"
            )
        if isinstance(value, str) and value.lower().startswith(_REMOTE):
            raise UsageError(f"builder argument {key}={value!r} names something outside the file; leave it out")
        if isinstance(value, Mapping):
            check_arguments(value)


def build(builder: str, kwargs: Mapping[str, Any], allow_code: Collection[str] = ()) -> nn.Module:
    """The network, on `meta` where its code allows, else on the CPU; weights and random state untouched.

    Raises `UsageError` where arguments are refused, `CheckpointError` where building fails.
    """
    check_arguments(kwargs)
    function = find_builder(builder, allow_code)
    arguments = {**_without_weights(function), **kwargs}
    try:
        model = _call(function, arguments, "meta")
        if any(_on_meta(module) for module in model.modules()):
            raise NotImplementedError("holds plain tensors that no file fills in")
    except SecateurError:
        raise
    except Exception:
        try:
            model = _call(function, arguments, "cpu")
        except SecateurError:
            raise
        except Exception as error:
            line = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"builder {builder}({json.dumps(dict(kwargs))}) fails with {type(error).__name__}: {line}; "
                "is another version of its library installed?"
            ) from error
    return model


def _without_weights(function: Callable[..., Any]) -> dict[str, Any]:
    """Arguments that keep torchvision's builders from downloading a backbone by default."""
    names = inspect.signature(function).parameters
    module = getattr(function, "__module__", "")
    if not module.startswith("torchvision."):
        return {"pretrained": False} if module.startswith("timm.") and "pretrained" in names else {}
    return {key: None for key in ("weights", "weights_backbone") if key in names}


def _call(function: Callable[..., Any], arguments: Mapping[str, Any], device: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.device(device):
        model = function(**arguments)
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"builder returned {type(model).__name__}, expected a torch.nn.Module")
    return model


def _on_meta(module: nn.Module) -> bool:
    return any(isinstance(value, torch.Tensor) and value.is_meta for value in vars(module).values())
