"""What callers hand over, looked at first: one clear line instead of a Python error from far below."""

from __future__ import annotations

from numbers import Real

from secateur.core.targets import Targets
from secateur.criteria import CRITERIA
from secateur.criteria.base import Criterion
from secateur.errors import UsageError, nearest
from secateur.registry import Registry
from secateur.regularizers import REGULARIZERS
from secateur.regularizers.base import Regularizer

__all__ = ["expect_criterion", "expect_regularizer", "expect_sparsity", "expect_targets"]


def expect_criterion(call: str, value: object) -> None:
    """`UsageError` unless it is an instance of a `Criterion`."""
    _expect_plugin(call, "criterion", value, Criterion, CRITERIA)


def expect_regularizer(call: str, value: object) -> None:
    """`UsageError` unless it is an instance of a `Regularizer`."""
    _expect_plugin(call, "regularizer", value, Regularizer, REGULARIZERS)


def expect_targets(call: str, value: object) -> None:
    """`UsageError` unless they are `Targets`, or None for the default."""
    if value is not None and not isinstance(value, Targets):
        raise UsageError(
            f"{call}: targets is {_named(value)}, expected Targets; make them with find_targets(model, include=[...])"
        )


def expect_sparsity(call: str, value: object) -> None:
    """`UsageError` unless it is a number; whether it lies in [0, 1) is checked where it is used."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise UsageError(f"{call}: sparsity is {_named(value)}, expected a number in [0, 1), the fraction to remove")


def _expect_plugin(call: str, what: str, value: object, kind: type, registry: Registry) -> None:
    if isinstance(value, kind):
        return
    hint = f"see secateur methods for all {what}s"
    if isinstance(value, type) and issubclass(value, kind):
        hint = f"{value.__name__}(...)"
    elif isinstance(value, str):
        close = [registry.builtin[name].partition(":")[2] for name in nearest(value, registry.builtin)]
        hint = "nearest: " + ", ".join(f"{name}()" for name in close) if close else hint
    raise UsageError(f"{call}: {what} is {_named(value)}, expected an instance of a {kind.__name__}; {hint}")


def _named(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f'the text "{value}"' if isinstance(value, str) else f"of type {type(value).__name__}"
