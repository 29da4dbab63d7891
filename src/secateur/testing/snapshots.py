"""What a network, a spec and the global generators look like, and how two looks differ."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import optimizer as optimizers

__all__ = [
    "check_spec",
    "expect_step",
    "generators",
    "gradients",
    "same_structure",
    "same_values",
    "structure",
    "that",
    "values",
]


def that(met: bool, message: str) -> None:
    # Not the assert statement: the checks must hold under python -O too.
    if not met:
        raise AssertionError(message)


def check_spec(spec: Any) -> str:
    name = type(spec).__name__
    frozen = dataclasses.is_dataclass(spec) and getattr(type(spec), "__dataclass_params__").frozen  # noqa: B009
    that(frozen, f"{name}: expected a frozen dataclass (@dataclass(frozen=True))")
    fields = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.init}
    try:
        again = type(spec)(**json.loads(json.dumps(fields)))
    except (TypeError, ValueError) as error:
        raise AssertionError(f"{name}: its fields do not go through JSON and back: {error}") from error
    that(again == spec, f"{name}: rebuilt from its fields as JSON it is {again}, expected {spec}")
    that(bool(spec.summary), f"{name}: summary is empty; tables and cards need one line")
    return name


def expect_step(message: str, network: nn.Module, before: dict[str, Tensor], without: Collection[str] = ()) -> None:
    for n, parameter in network.named_parameters():
        if n in without:
            continue
        expected = before[n] if parameter.grad is None else before[n].add(parameter.grad, alpha=-0.1)
        that(torch.allclose(parameter, expected, rtol=0, atol=1e-7), f"{message}: {n} is not w - lr * gradient")


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


def values(network: nn.Module) -> dict[str, Tensor]:
    """Every parameter, buffer and gradient, with the mode and hooks as numbers."""
    found = {n: t.detach().clone() for n, t in network.state_dict().items()}
    found |= {f"gradient of {n}": g for n, g in gradients(network).items()}
    for path, module in network.named_modules():
        found[f'mode of "{path}"'] = torch.tensor(module.training)
        found[f'hooks of "{path}"'] = torch.tensor(_hook_count(module))
    found |= {f"requires_grad of {n}": torch.tensor(p.requires_grad) for n, p in network.named_parameters()}
    return found


def same_values(what: str, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    for name in sorted(before.keys() ^ after.keys()):
        raise AssertionError(f"{what}: {name} is on one side only")
    for name, tensor in before.items():
        that(torch.equal(tensor, after[name]), f"{what}: {name} differs")


def structure(network: nn.Module, without: Collection[str] = ()) -> dict[str, Any]:
    """Everything but values; parameters named in `without` are left out."""
    named = [(n, p) for n, p in network.named_parameters(remove_duplicate=False) if n not in without]
    return {
        "state_dict keys": [key for key in network.state_dict() if key not in without],
        "parameters": [(n, id(p)) for n, p in named],
        "types": [(n, type(m)) for n, m in network.named_modules()] + [type(p) for _, p in named],
        "flags": [p.requires_grad for _, p in named] + [m.training for m in network.modules()],
        "hooks": [(n, _hook_count(m)) for n, m in network.named_modules()],
        "attributes": [(n, sorted(vars(m))) for n, m in network.named_modules()],
        "parameter hooks": [(n, p._backward_hooks is None) for n, p in network.named_parameters()],
        "global optimizer hooks": len(optimizers._global_optimizer_pre_hooks)
        + len(optimizers._global_optimizer_post_hooks),
    }


def same_structure(what: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    for key, value in before.items():
        that(value == after[key], f"{what}: {key} differ: {_first_difference(value, after[key])}")


def _first_difference(before: Any, after: Any) -> str:
    if isinstance(before, list) and isinstance(after, list):
        for one, other in zip(before, after, strict=False):
            if one != other:
                return f"{one} became {other}"
    return f"{before} became {after}"[:300]


def _hook_count(module: nn.Module) -> int:
    return sum(len(value) for key, value in vars(module).items() if "hooks" in key and isinstance(value, dict))


def generators() -> tuple[bytes, bytes]:
    _, keys, *rest = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), repr((np.asarray(keys).tolist(), rest)).encode()
