"""The result of a run as the report reads it: checked once here, trusted everywhere below."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from secateur.errors import CheckpointError
from secateur.lab.report.panels import Panel, group

__all__ = ["Final", "Latency", "Method", "Result", "Row", "Training", "read_result"]

SCHEMA = 1
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class _Part(BaseModel):
    # Strict, because "0.9" or true where a number belongs is a damaged file, not a number.
    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="ignore")


class Method(_Part):
    """One way of training; `regularizer` "none" is the control that is pruned by its score alone."""

    label: str
    regularizer: str
    control: bool = False


class Layer(_Part):
    """Kept and total weights (or units) of one target."""

    name: str
    kept: Count
    total: Annotated[int, Field(ge=1)]


class Latency(_Part):
    """Median and 95 % interval of one forward pass, in milliseconds, and what it was measured on."""

    median_ms: Positive
    low_ms: float | None = None
    high_ms: float | None = None
    batch_size: int | None = None
    threads: int | None = None
    device: str | None = None

    @property
    def where(self) -> str:
        """Device, threads and batch size in words."""
        threads = "" if self.threads is None else f", {self.threads} thread{'s' if self.threads != 1 else ''}"
        batch = "" if self.batch_size is None else f", batch {self.batch_size}"
        return (self.device or "device not recorded") + threads + batch


class Row(_Part):
    """One network, pruned once and evaluated."""

    method: str
    seed: int
    granularity: str
    criterion: str
    scope: str
    sparsity_asked: Annotated[float, Field(ge=0, lt=1)]
    sparsity_got: Share | None = None
    params_total: Count | None = None
    params_kept: Count | None = None
    macs: Count | None = None
    top1: Share
    correct: Count | None = None
    count: Annotated[int, Field(ge=1)] | None = None
    top5: Share | None = None
    layers: list[Layer] | None = None
    latency: Latency | None = None
    retrained: bool = False
    control: bool = False

    @model_validator(mode="after")
    def _counts_agree(self) -> Row:
        if self.correct is not None and self.count is not None:
            share = self.correct / self.count
            if self.correct > self.count or abs(share - self.top1) > 1e-3:
                raise ValueError(f"top1 is {self.top1:g}, but correct / count is {self.correct} / {self.count}")
        return self


class Epoch(_Part):
    """One line of a training history."""

    epoch: int
    loss: float | None = None
    top1: Share | None = None


class Training(_Part):
    """One training run, before pruning."""

    method: str
    seed: int
    steps: Count | None = None
    seconds: Annotated[float, Field(ge=0)] | None = None
    final_loss: float | None = None
    top1: Share | None = None
    history: list[Epoch] | None = None


class Change(_Part):
    """One cost before and after the cut."""

    dense: float | None = None
    cut: float | None = None


class Achieved(_Part):
    """What was asked of the cut and what came of it."""

    sparsity_asked: Share | None = None
    sparsity_got: Share | None = None
    params: Change | None = None
    macs: Change | None = None
    bytes: Change | None = None


class Proof(_Part):
    """How far the cut network is from its masked self."""

    max_abs_diff: float | None = None
    tolerance: float | None = None
    scale: float | None = None
    inputs: int | None = None


class Accuracy(_Part):
    """Top-1 of the final network at each stage of its life."""

    dense: Share | None = None
    masked: Share | None = None
    cut: Share | None = None
    fine_tuned: Share | None = None
    reloaded: Share | None = None


class Ratio(_Part):
    """Dense latency over cut latency: above one, the cut network is faster."""

    median: float | None = None
    low: float | None = None
    high: float | None = None
    resolved: bool | None = None


class LatencyChange(_Part):
    """Latency of both networks, measured in turns in one run."""

    dense: Latency | None = None
    cut: Latency | None = None
    ratio: Ratio | None = None


class Memory(_Part):
    """Peak memory of a forward pass."""

    dense_peak_bytes: float | None = None
    cut_peak_bytes: float | None = None


class Export(_Part):
    """One exported file and its distance from the source."""

    format: str
    path: str | None = None
    bytes: Count | None = None
    max_abs_diff: float | None = None
    tolerance: float | None = None


class SavedFile(_Part):
    """The saved network, and how far it was after loading it in a fresh process."""

    path: str | None = None
    bytes: Count | None = None
    reload_max_abs_diff: float | None = None


class Final(_Part):
    """The network that was cut for real."""

    method: str
    seed: int | None = None
    granularity: str | None = None
    sparsity: Share | None = None
    asked_vs_achieved: Achieved | None = None
    verify: Proof | None = None
    accuracy: Accuracy | None = None
    latency: LatencyChange | None = None
    memory: Memory | None = None
    exports: list[Export] | None = None
    file: SavedFile | None = None


class Result(_Part):
    """One run."""

    name: str
    recipe_hash: str | None = None
    recipe: dict[str, Any] | None = None
    provenance: dict[str, Any] | None = None
    created: str | None = None
    wall_seconds: Annotated[float, Field(ge=0)] | None = None
    classes: Annotated[int, Field(ge=2)] | None = None
    methods: Annotated[list[Method], Field(min_length=1)]
    rows: Annotated[list[Row], Field(min_length=1)]
    trainings: list[Training] | None = None
    final: Final | None = None

    @property
    def baseline(self) -> Method | None:
        """The method trained without a regularizer: pruned by its score alone."""
        plain = [method for method in self.methods if method.regularizer == "none"]
        return next((method for method in plain if method.control), plain[0] if plain else None)

    @cached_property
    def panels(self) -> tuple[Panel, ...]:
        """The rows by granularity, as they are plotted and compared."""
        return group(self.rows)

    def chance(self) -> float | None:
        """Accuracy of guessing, where the number of classes is known."""
        found = self.classes
        for part in ("data", "model"):
            section = (self.recipe or {}).get(part)
            for key in ("classes", "num_classes"):
                value = section.get(key) if isinstance(section, dict) else None
                if found is None and type(value) is int and value > 1:
                    found = value
        return None if found is None else 1 / found

    def unpruned(self, method: str) -> dict[int, float]:
        """Accuracy by seed before pruning: rows at sparsity 0, else what training reported."""
        rows = [row for row in self.rows if row.sparsity_asked == 0 and not row.retrained]
        zero = {row.seed: row.top1 for row in rows if row.method == method}
        trained = [item for item in self.trainings or [] if item.method == method and item.top1 is not None]
        return zero or {item.seed: item.top1 for item in trained if item.top1 is not None}


def read_result(raw: Mapping[str, Any]) -> Result:
    """Check one run's result and give it types.

    Raises:
        CheckpointError: one line with the run, the key path, what was got and what was expected.
    """
    if not isinstance(raw, Mapping):
        got = "null" if raw is None else type(raw).__name__
        raise CheckpointError(f"result: got {got}, expected a JSON object; run the recipe again")
    name = raw.get("name", "?")
    if raw.get("schema") != SCHEMA:
        raise CheckpointError(
            f'result "{name}": schema: got {raw.get("schema")!r}, expected {SCHEMA}; '
            "it was written by another version, run the recipe again"
        )
    try:
        result = Result.model_validate(dict(raw))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in first["loc"]).lstrip(".")
        got = "" if first["type"] in ("missing", "value_error") else f"got {_short(first['input'])}, "
        raise CheckpointError(
            f'result "{name}": {path}: {got}{first["msg"][0].lower()}{first["msg"][1:]}; '
            "the file is damaged or foreign, run the recipe again"
        ) from error
    _check_names(result)
    return result


def _check_names(result: Result) -> None:
    labels = {method.label for method in result.methods}
    seen: dict[tuple[object, ...], int] = {}
    for index, row in enumerate(result.rows):
        where = f'result "{result.name}": rows[{index}]'
        if row.method not in labels:
            raise CheckpointError(
                f'{where}.method: got "{row.method}", expected one of {", ".join(sorted(labels))}; '
                "the file is damaged or foreign, run the recipe again"
            )
        sparsity = round(row.sparsity_asked, 6)
        key = (row.method, row.seed, row.granularity, row.criterion, row.scope, sparsity, row.retrained)
        if key in seen:
            raise CheckpointError(
                f"{where}: same method, seed, granularity, criterion, scope and sparsity as "
                f"rows[{seen[key]}]; two measurements of one thing cannot be paired, keep one"
            )
        seen[key] = index


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
