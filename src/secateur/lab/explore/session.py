"""What the sections of one exploration share: the network, the images it is judged by, and those it is not."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.duration import Duration
from secateur.core.seeds import keyed_generator
from secateur.core.targets import Targets, find_targets
from secateur.criteria import CRITERIA
from secateur.errors import DataError, UsageError
from secateur.lab.context import Context, Options
from secateur.lab.data import Dataset, evaluation_batches
from secateur.lab.data.dataset import Normalize, fingerprint, stratified
from secateur.lab.explore.recipe import ExploreRecipe
from secateur.lab.listener import Listener
from secateur.lab.models import MODELS
from secateur.lab.plugins import make_criterion
from secateur.lab.recipe import MethodSpec
from secateur.lab.stages import run_train, train_stage, trained_model
from secateur.lab.store import Stage
from secateur.lab.weights import load_weights
from secateur.search.location import without_password
from secateur.variants.evaluate import right_or_wrong
from secateur.variants.inputs import fitting_batch
from secateur.variants.workbench import Workbench

__all__ = ["Session"]

Batch = tuple[Tensor, Tensor]

# Training images that criteria are scored on and that show which BatchNorm follows which layer.
_SCORED = 512
# Training images at a time that BatchNorm statistics are renewed by; test images that judge, unless told.
_RENEWING, _JUDGED = 128, 1000


class Session:
    """One exploration at work.

    Args:
        recipe: what is asked.
        options: where results go and data come from.
    """

    def __init__(self, recipe: ExploreRecipe, options: Options, listener: Listener | None = None) -> None:
        self.recipe = recipe
        self.context = _Context(recipe.base(), options, listener or Listener())
        self.context.weights = recipe.weights

    @property
    def listener(self) -> Listener:
        return self.context.listener

    @property
    def _method(self) -> MethodSpec:
        return self.context.recipe.methods[0]

    @cached_property
    def weights_file(self) -> Path | None:
        """Where the weights trained elsewhere are: under the working folder, or the data folder."""
        if self.recipe.weights is None:
            return None
        given = Path(self.recipe.weights.file).expanduser()
        folder = self.context.data_folder
        found = [p for p in (given, *([folder / given] if folder is not None else [])) if p.is_file()]
        return found[0] if found else given

    @property
    def weights_path(self) -> Path:
        """That file from anywhere: as it was given, if the data folder has it."""
        assert self.recipe.weights is not None
        given, found = Path(self.recipe.weights.file), self.weights_file
        folder = self.context.data_folder
        return given if found is None or (folder is not None and found == folder / given) else found.resolve()

    @property
    def training(self) -> Stage | None:
        """The stage that trains the network; None for weights trained elsewhere."""
        return None if self.weights_file is not None else train_stage(self.context, self._method, self.recipe.seed)

    @property
    def steps(self) -> int:
        """Of that training."""
        spec = self.recipe.train
        return Duration.parse(spec.duration).steps(self.context.loader(spec, self.recipe.seed).steps_per_epoch)

    def check_outputs(self) -> None:
        """Raise `DataError` for a network whose answers are no numbers: every variant would only be wrong."""
        with torch.no_grad():
            finite = torch.cat([torch.isfinite(self.network(inputs)).all(dim=1) for inputs, _ in self.judged])
        if bad := int((~finite).sum()):
            file = "" if self.weights_file is None else f" with the weights of {self.weights_file}"
            raise DataError(
                f"network{file}: its outputs are not finite for {bad} of {len(finite)} images; it diverged in "
                "training, or its images were normalized in another way"
            )

    def train(self) -> dict[str, Any] | None:
        """Train the network unless that is done; what the stage says about it, or None for weights from elsewhere."""
        return None if self.training is None else run_train(self.context, self._method, self.recipe.seed)

    @cached_property
    def network(self) -> nn.Module:
        """The network all variants are of, in eval mode; sections leave it as they find it."""
        if self.weights_file is None:
            return trained_model(self.context, self._method, self.recipe.seed).eval()
        model = self.context.model(self.recipe.seed)
        load_weights(model, self.weights_file)
        return model.eval()

    @cached_property
    def source(self) -> dict[str, Any]:
        """What the network's weights depend on, for the keys of stages."""
        if self.training is not None:
            return {"train": self.training.key}
        assert self.weights_file is not None
        load_weights(self.context.model(self.recipe.seed), self.weights_file)
        return {
            "weights": hashlib.sha256(self.weights_file.read_bytes()).hexdigest(),
            "model": self.recipe.model.model_dump(mode="json"),
            "code": self.context.code_hash(MODELS, self.recipe.model.name),
            "data": self.context.data.fingerprint,
        }

    @cached_property
    def targets(self) -> Targets:
        """What variants may change."""
        return find_targets(self.network, self.recipe.include, self.recipe.excluded)

    def bench(self, criteria: Mapping[str, Mapping[str, Any]] | None = None) -> Workbench:
        """A workbench of the network; `criteria` are recipe entries by the name that variants use."""
        made = {n: make_criterion(plugin, self.context.options.allow_code) for n, plugin in (criteria or {}).items()}
        return Workbench(self.network, self.targets, batches=self.scored, criteria=made)

    @cached_property
    def _split(self) -> tuple[Batch, Batch]:
        data, spec = self.context.data, self.recipe.judge
        if spec.source == "validation":
            images, labels = data.validation_images, data.validation_labels
            count = len(labels) - spec.skip if spec.images is None else spec.images
        else:
            images, labels = data.test_images, data.test_labels
            count = min(_JUDGED, (len(labels) - spec.skip) // 2) if spec.images is None else spec.images
        if not 2 <= count <= len(labels) - spec.skip - (2 if spec.source == "test" else 0):
            aside = f", {spec.skip} set aside" if spec.skip else ""
            raise UsageError(
                f"judge.images {count}: the {spec.source} images are {len(labels)}{aside}"
                + ("; leave some of them for the report" if spec.source == "test" else "")
            )
        drawn, rest = stratified(labels, spec.skip + count, 0, "judge")
        if spec.skip:
            # A smaller draw is part of a larger one.
            others, _ = stratified(labels, spec.skip, 0, "judge")
            drawn = drawn[~torch.isin(drawn, others)]
        if spec.source == "validation":
            return (images[drawn], labels[drawn]), (data.test_images, data.test_labels)
        return (images[drawn], labels[drawn]), (images[rest], labels[rest])

    @cached_property
    def judged(self) -> list[Batch]:
        """Batches that every choice is made by, on the device."""
        return list(self._batches(*self._split[0]))

    @cached_property
    def judged_fingerprint(self) -> str:
        """Changes when the images judged by do."""
        images, labels = self._split[0]
        return fingerprint({"images": images, "labels": labels}, self.context.data.normalize, 0)

    @property
    def held(self) -> Iterator[Batch]:
        """Batches of test images by which nothing is chosen, for the report."""
        return self._batches(*self._split[1])

    @cached_property
    def batch_size(self) -> int:
        """Images at a time."""
        if self.recipe.judge.batch_size is not None:
            return self.recipe.judge.batch_size
        return fitting_batch(self.network, self.context.example(1))

    @property
    def counts(self) -> tuple[int, int]:
        """Images judged by, and images held back for the report."""
        return len(self._split[0][1]), len(self._split[1][1])

    def training_images(self, count: int, batch_size: int | None = None) -> list[Batch]:
        """Batches of `count` training images, every class in proportion, in random order, not augmented.

        Raises: `UsageError` for more than there are.
        """
        data = self.context.data
        if count > len(data.train_labels):
            raise UsageError(f"{count} training images asked for, of {len(data.train_labels)}; ask for fewer")
        drawn, _ = stratified(data.train_labels, count, 0, "scored")
        drawn = drawn[torch.randperm(count, generator=keyed_generator(0, "scored"))]
        return list(self._batches(data.train_images[drawn], data.train_labels[drawn], batch_size))

    @cached_property
    def scored(self) -> list[Batch]:
        """Training images for criteria that need data."""
        return self.training_images(min(_SCORED, len(self.context.data.train_labels)))

    @cached_property
    def renewing(self) -> list[Batch] | None:
        """Images that BatchNorm statistics are renewed by in every variant; None if they are not."""
        count = self.recipe.judge.recalibrate
        if count is None:
            return None
        batches = self.training_images(count, _RENEWING)
        # The averages count batches, not images: all are equally large.
        return [batch for batch in batches if len(batch[1]) == len(batches[0][1])]

    def _batches(self, images: Tensor, labels: Tensor, batch_size: int | None = None) -> Iterator[Batch]:
        size = batch_size or self.batch_size
        for batch in evaluation_batches(images, labels, size, normalize=self.context.data.normalize):
            yield self.context.runtime.to_device(*batch)  # type: ignore[misc]

    def accuracy(self, model: nn.Module, batches: Iterable[Batch]) -> tuple[int, int]:
        """How many are right, of how many; the model is in eval mode."""
        right = self.right(model, batches)
        return int(right.sum()), len(right)

    @torch.no_grad()
    def right(self, model: nn.Module, batches: Iterable[Batch]) -> Tensor:
        """Whether the answer to each image is right, bool on the CPU; the model is in eval mode."""
        return torch.cat([right_or_wrong(model(inputs), labels).cpu() for inputs, labels in batches])

    def stage(self, section: Any) -> Stage:
        """The stage of a section: named by all that its result depends on."""
        return self._stage("explore", section, leave_out={"title", "study"})

    def study(self, section: Any) -> Stage:
        """The stage that keeps the trials of a search: named by what they depend on, not by how many are asked for.

        So a search that is asked for more trials, or given more time, goes on with those there are.
        """
        return self._stage("study", section, leave_out={"title", "study", "trials", "budget", "tolerance"})

    def _stage(self, kind: str, section: Any, leave_out: set[str]) -> Stage:
        settings = section.model_dump(mode="json", exclude=leave_out)
        if settings.get("storage") is not None:
            # It is written down beside the stage, and passwords must not be.
            settings["storage"] = without_password(settings["storage"])
        plugins = [getattr(section, "criterion", None), *getattr(section, "criteria", ())]
        return self.context.store.stage(
            kind,
            {
                "network": self.source,
                "layers": [list(self.recipe.include), list(self.recipe.excluded)],
                "judge": self.recipe.judge.model_dump(mode="json", exclude={"batch_size"}),
                "section": settings,
                "seed": self.recipe.seed,
                "code": [self.context.code_hash(CRITERIA, plugin["name"]) for plugin in plugins if plugin],
                "device": self.context.runtime.device.type,
            },
        )


@dataclass
class _Context(Context):
    """A context whose images are normalized as the given weights were trained."""

    weights: Any = None

    @cached_property
    def data(self) -> Dataset:
        data = super().data
        if self.weights is None or self.weights.mean is None:
            return data
        mean, std = self.weights.mean, self.weights.std
        if len(mean) != data.in_shape[0]:
            raise UsageError(f"weights.mean has {len(mean)} numbers, and the images have {data.in_shape[0]} channels")
        normalize = Normalize(mean, std, data.normalize.scale)
        names = [f"{part}_{what}" for part in ("train", "validation", "test") for what in ("images", "labels")]
        parts = {name: getattr(data, name) for name in names}
        return replace(data, normalize=normalize, fingerprint=fingerprint(parts, normalize, data.num_classes))

    @property
    def data_folder(self) -> Path | None:
        """Where data sets are, if that was said."""
        found = self.options.data_dir or os.environ.get("SECATEUR_DATA_DIR")
        return Path(found).expanduser() if found else None
