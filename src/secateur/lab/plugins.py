"""From `{name: ..., parameter: ...}` to a criterion or regularizer; code of others fails in one line that names it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, cast, get_args

from pydantic import TypeAdapter, ValidationError

from secateur.criteria import CRITERIA
from secateur.criteria.base import Criterion, Need
from secateur.errors import PluginError, SecateurError, UnknownNameError, UsageError
from secateur.registry import Registry, raised_at
from secateur.regularizers import REGULARIZERS
from secateur.regularizers.base import Regularizer

__all__ = ["broken_entries", "make_criterion", "make_regularizer", "method_class", "running"]


def make_criterion(spec: Mapping[str, Any], allow_code: Collection[str] = ()) -> Criterion:
    """The criterion a recipe describes.

    Examples:
        >>> make_criterion({"name": "magnitude", "order": 1})
        Magnitude(order=1)
    """
    criterion = cast(Criterion, _make(CRITERIA, spec, allow_code))
    name = spec["name"]
    if name not in CRITERIA.builtin:
        with running("asked what it needs", (CRITERIA, name), allow_code=allow_code):
            _check_names(f'criterion "{name}"', "need", criterion.wanted(), get_args(Need))
    return criterion


def make_regularizer(spec: Mapping[str, Any], allow_code: Collection[str] = ()) -> Regularizer:
    """The regularizer a recipe describes."""
    return cast(Regularizer, _make(REGULARIZERS, spec, allow_code))


def method_class(registry: Registry, name: str, allow_code: Collection[str] = ()) -> Any:
    """The class of a criterion or regularizer; one that does not ship with secateur is checked first.

    Raises: `UsageError` if it does not import, is no frozen dataclass of the right base, leaves a method unwritten, or
        declares something that does not exist.
    """
    kind = registry.load(name, allow_code)
    if name in registry.builtin:
        return kind
    base: type = Criterion if registry is CRITERIA else Regularizer
    what = f'{registry.kind} "{name}"'
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise UsageError(f"{what} is not a subclass of {base.__name__}")
    options = getattr(kind, "__dataclass_params__", None)
    if options is None or not options.frozen:
        raise UsageError(f"{what} is not a frozen dataclass; write @dataclass(frozen=True) above class {kind.__name__}")
    if unwritten := sorted(getattr(kind, "__abstractmethods__", ())):
        raise UsageError(f"{what} does not define {', '.join(unwritten)}; write it in class {kind.__name__}")
    if issubclass(kind, Criterion):
        _check_names(what, "granularity", kind.granularities, ("weight", "unit"))
        _check_names(what, "need", kind.needs, get_args(Need))
    elif issubclass(kind, Regularizer):
        _check_names(what, "granularity", kind.granularities)
        _check_names(what, "acts_on", [kind.acts_on], ("weight", "norm"))
    return kind


def broken_entries(*registries: Registry) -> list[dict[str, str]]:
    """What installed packages register and cannot be used, each with the reason: kind, name, entry, reason."""
    found = []
    for registry in registries:
        seen: set[str] = set()
        for entry in registry.entries():
            reason = None
            if entry.name in registry.builtin:
                reason = f"ignored: {registry.kind} {entry.name} ships with secateur; register it by another name"
            elif entry.name in seen:
                reason = "ignored: another installed package registers that name; uninstall one of them"
            else:
                try:
                    (method_class if registry in (CRITERIA, REGULARIZERS) else Registry.load)(registry, entry.name)
                except UsageError as error:
                    reason = str(error).removeprefix(f'{registry.kind} "{entry.name}"').lstrip(": ")
            seen.add(entry.name)
            if reason is not None:
                found.append({"kind": registry.kind, "name": entry.name, "entry": entry.value, "reason": reason})
    return found


@contextmanager
def running(doing: str, *used: tuple[Registry, str], allow_code: Collection[str] = ()) -> Iterator[None]:
    """Around work that calls what is registered as `used`, of which some may not ship with secateur.

    Raises: `PluginError`, from what that code raised; errors of secateur's own pass as they are.
    """
    try:
        yield
    except SecateurError:
        raise
    except Exception as error:
        foreign = [(r, n, packages) for r, n in used if (packages := r.packages(n, allow_code))]
        said = [(r, n, raised_at(error, packages)) for r, n, packages in foreign]
        if not said:
            raise
        plain = raised_at(error, ())
        # The one whose code it passed through; of the others it is only known that they took part.
        registry, name, text = next((s for s in said if s[2] != plain), said[0])
        raise PluginError(
            f'{registry.kind} "{name}" failed when {doing}: {text}; repair it ("secateur --debug" shows the traceback)'
        ) from error


def _make(registry: Registry, spec: Mapping[str, Any], allow_code: Collection[str]) -> Any:
    parameters = dict(spec)
    name = parameters.pop("name", None)
    if not isinstance(name, str):
        raise UsageError(f"{registry.kind}: expected a name, got {spec!r}; known: {', '.join(registry.names())}")
    kind = method_class(registry, name, allow_code)
    known = [f.name for f in fields(kind) if f.init]
    for key in parameters:
        if key not in known:
            raise UnknownNameError(f"parameter of {registry.kind} {name}", key, known)
    with running("made", (registry, name), allow_code=allow_code):
        try:
            return TypeAdapter(kind).validate_python(parameters)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            # Our classes begin with their own name, which the line has already.
            message = first["msg"].removeprefix("Value error, ").removeprefix(f"{name}: ")
            if where:
                message = f"{where}: {message[:1].lower()}{message[1:]}, got {first.get('input')!r}"
            raise UsageError(f"{registry.kind} {name}: {message}") from error


def _check_names(what: str, kind: str, names: Any, known: Collection[str] | None = None) -> None:
    if isinstance(names, str) or not isinstance(names, Collection):
        raise UsageError(f"{what}: {kind}: got {names!r}, expected a set or tuple of names")
    for name in sorted(map(str, names)):
        if known is not None and name not in known:
            raise UsageError(f"{what}: {UnknownNameError(kind, name, known)}")
