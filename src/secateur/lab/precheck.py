"""What a run would refuse before it trains, as far as the recipe alone tells. Imports torch only where it must."""

from __future__ import annotations

from collections.abc import Collection

from secateur.errors import UsageError
from secateur.lab.data import DATASETS
from secateur.lab.explore.recipe import ExploreRecipe
from secateur.lab.models import MODELS
from secateur.lab.recipe import Recipe

__all__ = ["check_held_out", "precheck"]


def precheck(recipe: Recipe | ExploreRecipe, allow_code: Collection[str] = ()) -> None:
    """Raise what a run would raise about held-out images, the network's arguments and its layers.

    For data that are a folder nothing is checked, because the shape of their images is not known. The network is built
    only if the recipe says something about it that may be wrong.
    """
    known = DATASETS.get(recipe.data.name)
    if known is None:
        return
    base = recipe.base() if isinstance(recipe, ExploreRecipe) else recipe
    if not base.data.validation:
        check_held_out(base)
    layers = (recipe.include, recipe.excluded) if isinstance(recipe, ExploreRecipe) else (("*",), ())
    if _says_something(base) or layers != (("*",), ()):
        from secateur.core.targets import find_targets
        from secateur.lab.context import check_targets, make_model

        model = make_model(base, known.num_classes, known.in_shape, base.seeds[0], allow_code)
        check_targets(base, model, allow_code)
        find_targets(model, *layers)


def check_held_out(recipe: Recipe) -> None:
    """Raise `UsageError` if something is chosen by held-out images; call it where there are none."""
    trainings = [recipe.train, *(m.loop.train for m in recipe.methods if m.loop is not None and m.loop.train)]
    if recipe.final is not None and recipe.final.fine_tune is not None:
        trainings.append(recipe.final.fine_tune)
    chosen = ["train.patience" for spec in trainings if spec.patience is not None]
    chosen += ["train.keep" for spec in trainings if spec.keep == "best"]
    chosen += ["loop.kappa" for m in recipe.methods if m.loop is not None and m.loop.kappa is not None]
    if chosen:
        raise UsageError(
            f"{chosen[0]} chooses by held-out images, and the recipe holds none out: that would be the test set; "
            "set data.validation (0.1)"
        )


def _says_something(recipe: Recipe) -> bool:
    """Whether arguments, layer patterns or cells are named that a network may not have."""
    patterns = {p for m in recipe.methods for p in (*m.include, *m.exclude)}
    patterns |= {p for way in recipe.prune for p in (*way.include, *way.exclude)}
    return (
        recipe.model.name not in MODELS.builtin
        or bool(recipe.model.kwargs)
        or not patterns <= {"*", "@first", "@last"}
        or any(p.granularity not in ("weight", "unit") for p in recipe.prune)
    )
