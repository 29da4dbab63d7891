"""Networks of torchvision and timm by name, always without pretrained weights: nothing is downloaded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from secateur.errors import MissingExtraError, UnknownNameError, UsageError
from secateur.lab.models.build import unknown_argument

__all__ = ["external_arguments", "timm_model", "torchvision_model"]

# Set here, never by the caller: any other value could start a download.
_OURS = ("weights", "weights_backbone", "progress", "pretrained", "pretrained_backbone", "pretrained_cfg")


def external_arguments(family: str, name: str, task: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that `torchvision:name` or `timm:name` is called with: checked, and fitted to the images.

    Raises:
        UnknownNameError: the library has no such network.
        UsageError: an argument it does not take, or channels it cannot take.
    """
    full = f"{family}:{name}"
    channels, height, width = task["in_shape"]
    if family == "timm":
        timm = _timm()
        if name not in timm.list_models():
            raise UnknownNameError("timm model", full, [f"timm:{n}" for n in timm.list_models()])
        for key in given:
            if key in _OURS:
                raise unknown_argument(full, key, ["drop_rate", "the arguments of the timm network"])
        config = timm.get_pretrained_cfg(name)
        sized = config is not None and config.fixed_input_size and "img_size" not in given
        return {**({"img_size": [height, width]} if sized else {}), **given}
    valid = _torchvision_arguments(name)
    own = [key for key in valid if key not in _OURS and key != "num_classes"]
    for key in given:
        if key not in own:
            raise unknown_argument(full, key, own)
    if channels != 3:
        raise UsageError(f'model "{full}": got {channels} channels, expected 3 (RGB); repeat the channel')
    fitted: dict[str, Any] = {"num_classes": task["num_classes"]} if "num_classes" in valid else {}
    if "image_size" in valid and "image_size" not in given:
        if height != width:
            raise UsageError(f'model "{full}": got {height}x{width} images, expected square ones; resize them')
        fitted["image_size"] = height
    return {**fitted, **given}


def torchvision_model(name: str, num_classes: int, in_shape: Sequence[int], kwargs: Mapping[str, Any]) -> nn.Module:
    """torchvision's network `name`, called with `kwargs` as `external_arguments` gave them."""
    from torchvision import models

    builder = models.get_model_builder(name)
    untrained = {key: None for key in ("weights", "weights_backbone") if key in inspect.signature(builder).parameters}
    valid = [key for key in _torchvision_arguments(name) if key not in _OURS]
    return _call(f"torchvision:{name}", builder, {**untrained, **kwargs}, valid)


def timm_model(name: str, num_classes: int, in_shape: Sequence[int], kwargs: Mapping[str, Any]) -> nn.Module:
    """timm's network `name`, called with `kwargs` as `external_arguments` gave them."""
    arguments = {"model_name": name, "pretrained": False, "num_classes": num_classes, "in_chans": in_shape[0]}
    timm = _timm()
    valid = [key for key in _class_arguments(timm.model_entrypoint(name)) if key not in (*_OURS, "in_chans")]
    return _call(f"timm:{name}", timm.create_model, {**arguments, **kwargs}, valid)


def _call(full: str, builder: Any, arguments: Mapping[str, Any], valid: Sequence[str]) -> nn.Module:
    try:
        return builder(**arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise UsageError(
            f'model "{full}" cannot be built: {error}; its arguments: {", ".join(valid) or "see the library"}'
        ) from error


def _torchvision_arguments(name: str) -> list[str]:
    """Every argument `torchvision:name` takes: its function's own and those of the class behind it."""
    from torchvision import models

    known = models.list_models()
    if name not in known:
        raise UnknownNameError("torchvision model", f"torchvision:{name}", [f"torchvision:{n}" for n in known])
    builder = models.get_model_builder(name)
    own = [p.name for p in inspect.signature(builder).parameters.values() if p.kind is not p.VAR_KEYWORD]
    return list(dict.fromkeys([*own, *_class_arguments(builder)]))


def _class_arguments(builder: Any) -> list[str]:
    """What the class that `builder` returns can be told: arguments with a default, and the image size."""
    returned = inspect.signature(builder, eval_str=True).return_annotation
    if not inspect.isclass(returned) or not issubclass(returned, nn.Module):
        return []
    named = [p for p in inspect.signature(returned).parameters.values() if p.kind is not p.VAR_KEYWORD]
    # Arguments without a default (block, layers) are what the builder itself fills in.
    return [p.name for p in named if p.default is not p.empty or p.name == "image_size"]


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError("timm networks", "timm") from error
    return timm
