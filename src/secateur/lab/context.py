"""What all stages of one run share: recipe, data, device, store, and networks by seed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur.core.granularity import parse_granularity
from secateur.core.groups import Groups
from secateur.core.targets import find_targets
from secateur.errors import UsageError
from secateur.lab.data import Dataset, Loader, evaluation_batches, load_data
from secateur.lab.evaluate import Evaluation, evaluate
from secateur.lab.listener import Listener
from secateur.lab.models import MODELS, build_model, resolve_builder
from secateur.lab.plugins import make_regularizer, running
from secateur.lab.precheck import check_held_out
from secateur.lab.recipe import Recipe, TrainSpec
from secateur.lab.runtime import Runtime
from secateur.lab.store import Store
from secateur.registry import Registry
from secateur.regularizers.attachment import targets_of
from secateur.surgery.engine import trace_groups

__all__ = ["Context", "Options", "check_targets", "make_model"]

_EVALUATION_BATCH = 512


@dataclass(frozen=True)
class Options:
    """How a recipe is run; nothing here changes its numbers on one machine.

    Args:
        out: output folder; runs and stages live below it.
        data_dir: data folder; None: the environment variable `SECATEUR_DATA_DIR`.
        download: let data sets download themselves.
        device: `"auto"`, `"cpu"`, `"cuda"`.
        resume: use finished stages and checkpoints; otherwise do this recipe's stages again.
        allow_code: modules that `python:` names in the recipe may run code from.
    """

    out: Path = Path("runs")
    data_dir: Path | None = None
    download: bool = False
    device: str = "auto"
    resume: bool = True
    allow_code: tuple[str, ...] = ()


@dataclass
class Context:
    """Caches what several stages need; holds no results."""

    recipe: Recipe
    options: Options
    listener: Listener = field(default_factory=Listener)

    @cached_property
    def store(self) -> Store:
        return Store(self.options.out / "stages")

    @cached_property
    def data(self) -> Dataset:
        spec = self.recipe.data
        return load_data(
            spec.name,
            data_dir=self.options.data_dir,
            download=self.options.download,
            validation=spec.validation,
            subset=spec.subset,
            image_size=spec.image_size,
        )

    @cached_property
    def runtime(self) -> Runtime:
        return Runtime(self.options.device, self.recipe.train.precision)

    @cached_property
    def builder(self) -> tuple[str, dict[str, Any]]:
        """What rebuilds the network: `"module:function"` and its arguments."""
        data, spec = self.data, self.recipe.model
        return resolve_builder(
            spec.name, data.num_classes, data.in_shape, spec.kwargs, allow_code=self.options.allow_code
        )

    @cached_property
    def _hashes(self) -> dict[tuple[str, str], str | None]:
        return {}

    def code_hash(self, registry: Registry, name: str) -> str | None:
        """`Registry.code_hash`, once a run: later edits of files are no part of what this process has loaded."""
        key = (registry.kind, name)
        if key not in self._hashes:
            self._hashes[key] = registry.code_hash(name, self.options.allow_code)
        return self._hashes[key]

    def model(self, seed: int, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
        """A network on the run's device: freshly initialized from `seed`, or with the given weights."""
        model = make_model(self.recipe, self.data.num_classes, self.data.in_shape, seed, self.options.allow_code)
        if weights is not None:
            model.load_state_dict(weights)
        return model.to(self.runtime.device)

    def check_model(self) -> None:
        """Raise `UsageError` unless the recipe's network takes these images and gives one number a class."""
        name, classes, shape = self.recipe.model.name, self.data.num_classes, list(self.data.in_shape)
        model = self.model(self.recipe.seeds[0])
        images, allowed = self.example(2), self.options.allow_code
        with running("given images", (MODELS, name), allow_code=allowed), self.runtime.evaluating(model):
            try:
                outputs = model(images)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                line = " ".join(str(error).split())[:200]
                raise UsageError(f'model "{name}" cannot take images of {shape}: {line}') from error
        got = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        if got != [len(images), classes]:
            raise UsageError(f'model "{name}": got outputs {got}, expected {[len(images), classes]} (images, classes)')
        check_targets(self.recipe, model, allowed)
        # What is chosen by held-out data must not be chosen by the test set.
        if not len(self.data.validation_labels):
            check_held_out(self.recipe)

    @cached_property
    def groups(self) -> Groups:
        """Dependency groups of the recipe's network; they depend on its shape, not on its weights."""
        return trace_groups(self.model(0), self.example(1))

    def example(self, count: int) -> Tensor:
        """The first `count` test images as the network sees them, on the run's device."""
        images, labels = self.data.test_images[:count], self.data.test_labels[:count]
        ((inputs, _),) = evaluation_batches(images, labels, count, normalize=self.data.normalize)
        return inputs.to(self.runtime.device)

    def loader(self, spec: TrainSpec, seed: int) -> Loader:
        """Training batches; a last batch of a single image is left out, because BatchNorm cannot use it."""
        data = self.data
        batch_size = min(spec.batch_size, len(data.train_labels))
        return Loader(
            data.train_images,
            data.train_labels,
            batch_size,
            seed,
            normalize=data.normalize,
            augment=spec.augment,
            shuffle=spec.shuffle,
            drop_last=batch_size > 1 and len(data.train_labels) % batch_size == 1,
        )

    def training_batches(self) -> Iterable[tuple[Tensor, Tensor]]:
        """The training set in stored order, without augmentation, on the run's device; anew at every iteration."""
        return _TrainingBatches(self)

    def test(self, model: nn.Module) -> Evaluation:
        """Accuracy on the test set."""
        return self._evaluate(model, self.data.test_images, self.data.test_labels)

    def validate(self, model: nn.Module) -> Evaluation | None:
        """Accuracy on the validation share of the training set; None if the recipe holds nothing out."""
        if not len(self.data.validation_labels):
            return None
        return self._evaluate(model, self.data.validation_images, self.data.validation_labels)

    def _evaluate(self, model: nn.Module, images: Tensor, labels: Tensor) -> Evaluation:
        batches = evaluation_batches(images, labels, _EVALUATION_BATCH, normalize=self.data.normalize)
        return evaluate(model, batches, self.runtime)


def make_model(
    recipe: Recipe, num_classes: int, in_shape: tuple[int, int, int], seed: int, allow_code: Collection[str]
) -> nn.Module:
    """The recipe's network for such images, freshly initialized from `seed`."""
    name = recipe.model.name
    with running("built", (MODELS, name), allow_code=allow_code):
        return build_model(
            name,
            num_classes=num_classes,
            in_shape=in_shape,
            kwargs=recipe.model.kwargs,
            seed=seed,
            allow_code=allow_code,
        )


def check_targets(recipe: Recipe, model: nn.Module, allow_code: Collection[str]) -> None:
    """Every layer pattern matches, and every granularity divides its layers: said before training."""
    for method in recipe.methods:
        targets_of(make_regularizer(method.regularizer, allow_code), model, method.include, method.exclude)
    for prune in recipe.prune:
        shape = parse_granularity(prune.granularity)
        for target in find_targets(model, prune.include, prune.exclude):
            shape.pool(target, model.get_parameter(target.name).detach(), "sum")


@dataclass(frozen=True)
class _TrainingBatches:
    context: Context

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        data, runtime = self.context.data, self.context.runtime
        for batch in evaluation_batches(
            data.train_images, data.train_labels, _EVALUATION_BATCH, normalize=data.normalize
        ):
            yield runtime.to_device(*batch)  # type: ignore[misc]
