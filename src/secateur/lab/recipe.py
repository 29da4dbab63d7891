"""Recipes: what to train, prune and measure, as one validated, frozen record. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from secateur.lab.train_spec import (
    DataSpec,
    LearningRateSpec,
    ModelSpec,
    OptimizerSpec,
    Plugin,
    Sparsity,
    Spec,
    TrainSpec,
    check_absolute,
    check_duration,
)

__all__ = [
    "DataSpec",
    "FinalSpec",
    "LearningRateSpec",
    "LoopSpec",
    "MethodSpec",
    "ModelSpec",
    "OptimizerSpec",
    "PruneSpec",
    "Recipe",
    "TrainSpec",
    "canonical_hash",
]


class LoopSpec(Spec):
    """Train again after pruning, with the pruned weights held at zero; once for each sparsity, or in rounds.

    In rounds (`fraction` given): train, score, remove a fraction of what remains, restart, train, until too little
    is left (DropNet's algorithm 1, lottery tickets). Otherwise every sparsity of a prune entry is reached at once.
    """

    score_at: Literal["trained", "init"] = Field("trained", description="which network is scored; init: untrained")
    restart: str = Field("init", description="init, reinitialize, trained, or a duration (1ep, 500it) to rewind to")
    fraction: float | None = Field(None, gt=0.0, lt=1.0, description="share of what remains that a round removes")
    fraction_last: float | None = Field(
        None, gt=0.0, lt=1.0, description="of the last layer pruned, instead (lottery tickets: half of fraction)"
    )
    round_up: bool = Field(False, description="a round removes ceil (lottery tickets), not floor (DropNet)")
    until: float = Field(0.1, ge=0.0, lt=1.0, description="rounds end when this share or less is left")
    kappa: float | None = Field(None, gt=0.0, le=1.0, description="rounds end below this share of the first accuracy")
    rescore: int = Field(1, ge=1, description="weights: score again in so many steps on the way (SynFlow: 100)")
    shuffle_masks: bool = Field(False, description="control: the masks' entries in random order inside each layer")
    small: bool = Field(False, description="control: cut the units before training and start the small network anew")

    train: TrainSpec | None = Field(None, description="how to train again; default: as the first time")

    @model_validator(mode="after")
    def _consistent(self) -> LoopSpec:
        rounds = self.fraction is not None
        if self.restart not in ("init", "reinitialize", "trained"):
            check_absolute(check_duration(self.restart))
            if self.train is not None:
                raise ValueError("a loop that rewinds goes on in the first training: it takes no train of its own")
        if not rounds and self._changed("until", "kappa", "round_up", "fraction_last"):
            raise ValueError("until, kappa, round_up and fraction_last belong to rounds: give fraction too")
        if rounds and (self.shuffle_masks or self.rescore > 1):
            raise ValueError("shuffle_masks and rescore go to a sparsity at once: they take no fraction")
        if self.score_at == "init" and (rounds or self.restart == "trained"):
            raise ValueError("score_at init prunes before training: it takes no fraction and no restart trained")
        if self.small and (self.score_at != "init" or self.restart != "reinitialize"):
            raise ValueError("small is a network trained from scratch: it takes score_at init and restart reinitialize")
        return self

    def check_way(self, way: PruneSpec) -> None:
        """Raise `ValueError` for a prune entry that this loop cannot follow."""
        if way.granularity not in ("weight", "unit"):
            raise ValueError(f"a loop prunes by granularity weight or unit, not {way.granularity}")
        if self.small and way.granularity != "unit":
            raise ValueError("loop.small needs granularity unit: weights cannot be cut")
        if self.rescore > 1 and way.granularity != "weight":
            raise ValueError("loop.rescore needs granularity weight")
        if self.fraction is not None and (way.scope == "column" or way.allocation != "uniform" or way.min_keep < 1):
            raise ValueError(
                "rounds count over tensors: scope tensor or global, allocation uniform, min_keep 1 or more"
            )
        if self.fraction_last is not None and (way.granularity != "weight" or way.scope != "tensor"):
            raise ValueError("loop.fraction_last needs granularity weight and scope tensor")
        if self.score_at == "init" and way.criterion.get("name") == "learned":
            raise ValueError("criterion learned knows a trained network: it takes no score_at init")


class MethodSpec(Spec):
    """One column of the comparison: a regularizer to train under, and whether to train again after pruning."""

    label: str = Field(description="its name in tables and plots")
    regularizer: Plugin = Field({"name": "none"}, description="what to train under, with its parameters")
    include: tuple[str, ...] = Field(("*",), description="layers it acts on: shell patterns, @first, @last")
    exclude: tuple[str, ...] = Field((), description="layers it leaves alone")
    criterion: Plugin | None = Field(None, description="rank its networks by this, whatever the prune entry says")
    prune: tuple[int, ...] | None = Field(None, description="only these entries of prune, counted from 0; default: all")
    loop: LoopSpec | None = Field(None, description="train again after pruning")

    def way(self, spec: PruneSpec) -> PruneSpec:
        """A prune entry as it holds for this method: by its own criterion, if it has one."""
        return spec if self.criterion is None else spec.model_copy(update={"criterion": self.criterion, "label": None})


class PruneSpec(Spec):
    """One way of pruning every trained network, at several sparsities."""

    granularity: str = Field("weight", description="weight, unit, block:ROWSxCOLUMNS or N:M")
    criterion: Plugin = Field({"name": "magnitude"}, description="what to rank by, with its parameters")
    label: str | None = Field(None, description="its name in tables and plots; default: the criterion's")
    scope: Literal["tensor", "global", "column"] = Field(
        "tensor", description="rank inside each tensor, all together, or inside each unit's weights"
    )
    control: bool = Field(False, description="the others of the same method are compared with this one")
    ties: Literal["index", "random"] = Field("index", description="which of equal scores goes first")
    allocation: Literal["uniform", "erk"] = Field("uniform", description="how tensors share the sparsity")
    rounding: Literal["prune_floor", "keep_floor", "nearest"] = Field("prune_floor", description="of counts")
    sparsities: tuple[Sparsity, ...] = Field((0.0, 0.5, 0.9), min_length=1, description="fractions to remove")
    include: tuple[str, ...] = Field(("*",), description="layers to prune: shell patterns, @first, @last")
    exclude: tuple[str, ...] = Field(("@last",), description="layers to leave whole")
    groups: Literal["all", "inner"] = Field("all", description="unit only: inner leaves residual sums alone")
    min_keep: int = Field(1, ge=0, description="cells that every tensor keeps at least")
    latency: bool = Field(False, description="unit only: cut and time the first seed's network at each sparsity")
    recalibrate: bool = Field(False, description="re-estimate BatchNorm statistics on training data after pruning")

    @property
    def title(self) -> str:
        """What tables call its criterion."""
        return self.label or str(self.criterion.get("name"))

    @model_validator(mode="after")
    def _consistent(self) -> PruneSpec:
        from secateur.core.names import check_granularity

        check_granularity(self.granularity)
        if self.granularity != "unit" and (self.latency or self.groups != "all"):
            raise ValueError('latency and groups belong to granularity "unit": only whole units can be cut')
        if self.granularity == "unit" and self.scope == "column":
            raise ValueError('scope "column" ranks weights inside a unit; granularity "unit" takes tensor or global')
        if self.granularity == "unit" and self.allocation != "uniform":
            raise ValueError('granularity "unit" takes allocation "uniform"; use scope "global" for uneven widths')
        if self.granularity == "unit" and self.min_keep < 1:
            raise ValueError('granularity "unit" needs min_keep of at least 1: a layer without units cannot be cut')
        if self.scope == "global" and self.allocation != "uniform":
            raise ValueError('scope "global" ranks all tensors together and takes no allocation')
        if match := re.fullmatch(r"(\d+):(\d+)", self.granularity):
            kept, of = int(match[1]), int(match[2])
            if kept >= of:
                raise ValueError(f"granularity {self.granularity} keeps {kept} of {of} weights: give fewer, as 2:4")
            only = 1.0 - kept / of
            if self.scope != "tensor" or self.allocation != "uniform":
                raise ValueError(f"granularity {self.granularity} takes scope tensor and allocation uniform")
            if any(abs(s - only) > 1e-9 for s in self.sparsities):
                raise ValueError(f"granularity {self.granularity} always removes {only:g}: sparsities [{only:g}]")
        if len(set(self.sparsities)) != len(self.sparsities):
            raise ValueError("sparsities repeat a value")
        return self


class FinalSpec(Spec):
    """The network to deliver: cut, prove, fine-tune, save, reload elsewhere, export, measure."""

    method: str = Field("best", description="a method's label, or best: highest mean accuracy at this sparsity")
    prune: int = Field(0, ge=0, description="which entry of prune (it must have granularity unit)")
    sparsity: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    align: int = Field(16, ge=1, description="round kept units up to a multiple of this; 1 = exactly as asked")
    fine_tune: TrainSpec | None = None
    exports: tuple[Literal["onnx", "torch_export"], ...] = ()
    batch_size: int = Field(64, ge=1, description="for latency")


class Recipe(Spec):
    """One experiment: every seed under every method, pruned every way; then one network delivered."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=100)
    description: str = ""
    seeds: tuple[int, ...] = (0,)
    data: DataSpec = DataSpec()
    model: ModelSpec = ModelSpec()
    train: TrainSpec = TrainSpec()
    methods: tuple[MethodSpec, ...] = (MethodSpec(label="magnitude alone"),)
    prune: tuple[PruneSpec, ...] = Field((PruneSpec(),), min_length=1)
    final: FinalSpec | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        labels = [m.label for m in self.methods]
        if not labels or len(set(labels)) != len(labels):
            raise ValueError(f"methods need distinct labels, got {labels}")
        for method in self.methods:
            try:
                self._check_ways(method)
            except ValueError as error:
                raise ValueError(f'method "{method.label}": {error}') from error
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must be distinct and at least one, got {list(self.seeds)}")
        ways = [(p.granularity, p.title, p.scope) for p in self.prune]
        if len(set(ways)) != len(ways):
            raise ValueError(
                "prune entries must differ in granularity, scope or label (by default the criterion): tables tell "
                "them apart by these"
            )
        if self.final is not None:
            if self.final.prune >= len(self.prune) or self.prune[self.final.prune].granularity != "unit":
                raise ValueError("final.prune must be the number of a prune entry with granularity unit")
            once = [m.label for m in self.methods if m.loop is None and self.final.prune in dict(self.ways(m))]
            if not once or self.final.method not in ("best", *once):
                known = ", ".join(["best", *once])
                raise ValueError(
                    f'final.method "{self.final.method}" is not pruned that way without a loop; known: {known}'
                )
            tuned = self.final.fine_tune
            if tuned is not None and tuned.precision != self.train.precision:
                raise ValueError(
                    f'final.fine_tune.precision "{tuned.precision}" differs from train.precision '
                    f'"{self.train.precision}"; a run computes in one'
                )
        return self

    def _check_ways(self, method: MethodSpec) -> None:
        if method.prune is not None and not (method.prune and set(method.prune) <= set(range(len(self.prune)))):
            raise ValueError(
                f"prune {list(method.prune)} must name some of the {len(self.prune)} prune entries, counted from 0"
            )
        ways = [method.way(p) for _, p in self.ways(method)]
        titles = [(w.granularity, w.title, w.scope) for w in ways]
        if len(set(titles)) != len(titles):
            raise ValueError("its own criterion makes two of its prune entries the same; take one of them (prune: [0])")
        for way in ways:
            if method.loop is not None:
                method.loop.check_way(way)
            if way.criterion.get("name") == "learned" and method.regularizer.get("name") == "none":
                raise ValueError("criterion learned needs a regularizer that learns scores")

    def ways(self, method: MethodSpec) -> list[tuple[int, PruneSpec]]:
        """The prune entries that hold for a method, with their numbers."""
        return [(i, p) for i, p in enumerate(self.prune) if method.prune is None or i in method.prune]

    def counts(self) -> tuple[int, int]:
        """Trainings, and pruned networks; rounds are counted by their shares, before rounding to whole cells."""
        trainings = networks = 0
        for method in self.methods:
            loop, levels = method.loop, 0
            for _, way in self.ways(method):
                if loop is not None and loop.fraction is not None:
                    rounds = math.ceil(math.log(max(loop.until, 1e-3)) / math.log(1.0 - loop.fraction) - 1e-9)
                    levels, networks = levels + rounds, networks + rounds + 1
                else:
                    levels += sum(s > 0 for s in way.sparsities) if loop is not None else 0
                    networks += len(way.sparsities)
            trainings += 1 + levels
        return trainings * len(self.seeds), networks * len(self.seeds)

    def resolved(self) -> dict[str, Any]:
        """Everything, defaults filled in, as plain JSON data."""
        return self.model_dump(mode="json")

    @property
    def hash(self) -> str:
        """Eight hex digits that change when anything that affects the numbers does."""
        return canonical_hash({k: v for k, v in self.resolved().items() if k not in ("name", "description")})[:8]


def canonical_hash(data: Any) -> str:
    """SHA-256 of JSON data with sorted keys, as hex."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
