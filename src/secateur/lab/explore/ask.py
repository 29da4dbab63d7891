"""One question instead of a recipe: which networks made from this one are worth having?"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from secateur.errors import UsageError
from secateur.lab.explore.recipe import ExploreRecipe
from secateur.lab.recipe_file import check_plugins
from secateur.lab.report.page import slug

__all__ = ["search_recipe", "search_variants"]


def search_recipe(
    model: str,
    *,
    weights: str | Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    data: str = "digits",
    objectives: Sequence[str] = ("accuracy", "sparsity"),
    budget: str | None = None,
    trials: int | None = None,
    vary: str | None = None,
    exclude: Sequence[str] = (),
    images: int | None = None,
    recalibrate: int | None = None,
    tolerance: float = 0.01,
    seed: int = 0,
    allow_code: Collection[str] = (),
) -> ExploreRecipe:
    """The recipe that `search_variants` runs; see there.

    Raises: `UsageError` naming the argument that is wrong.
    """
    for argument, names in (("objectives", objectives), ("exclude", exclude)):
        if isinstance(names, str):
            raise UsageError(f"search: {argument}: expected a list of names, got {names!r}")
    section: dict[str, Any] = {"kind": "search", "objectives": list(objectives), "tolerance": tolerance, "seed": seed}
    # Small generations, so that a few minutes are more than a random search.
    section |= {"population": 20}
    section |= {"vary": vary or ("units" if "latency" in objectives else "weights"), "budget": budget, "trials": trials}
    recipe: dict[str, Any] = {
        "name": f"search-{slug(model)}"[:100],
        "data": {"name": data},
        "model": {"name": model},
        "seed": seed,
        "exclude": list(exclude),
        "judge": {"images": images, "recalibrate": recalibrate},
        "explore": [section],
    }
    if weights is not None:
        recipe["weights"] = {"file": str(weights), "mean": mean, "std": std}
    elif mean is not None or std is not None:
        raise UsageError("search: mean and std say how given weights were trained; give weights too")
    try:
        made = ExploreRecipe.model_validate(recipe)
    except ValidationError as error:
        first = error.errors()[0]
        where = next((str(part) for part in reversed(first["loc"]) if isinstance(part, str)), "arguments")
        # Data and model are called by their names.
        where = str(first["loc"][-2]) if where == "name" and len(first["loc"]) > 1 else where
        message = first["msg"].removeprefix("Value error, ")
        told = f", got {first['input']!r}"
        if isinstance(first["input"], dict) or first["type"] == "value_error":
            told = ""
        place = "" if where in ("search", "weights", "arguments") else f"{where}: "
        raise UsageError(f"search: {place}{message[0].lower() + message[1:]}{told}") from error
    check_plugins(made, allow_code)
    return made


def search_variants(
    model: str,
    *,
    out: str | Path = "runs",
    data_dir: str | Path | None = None,
    download: bool = False,
    device: str = "auto",
    allow_code: Collection[str] = (),
    **question: Any,
) -> dict[str, Any]:
    """Search the networks that can be made from one, deliver the best that is nearly as good, and report.

    Args:
        model: a name from `secateur models`, `torchvision:NAME`, `timm:NAME` or `python:module:function`.
        out: folder for the run, its stages and its report.
        data_dir: data folder; None: the environment variable `SECATEUR_DATA_DIR`.
        download: let data sets download themselves.
        device: "auto", "cpu" or "cuda".
        allow_code: modules that `python:` names may run code from.
        question:
            `weights`: file with the network's weights (no code in it is run); None trains it here.
            `mean`, `std`: how images were normalized when these were trained, a number a channel.
            `data`: a known data set or a folder.
            `objectives`: two or more of accuracy, sparsity, gain, latency, bytes.
            `budget`: time, as in "10min"; `trials`: how many instead.
            `vary`: "weights" (noise, then zeros) or "units" (cut for real); by default units where latency counts.
            `exclude`: layers left alone. `images`: how many test images choose (default: half, 1000 at most); the rest
            are for the report.
            `recalibrate`: training images that renew BatchNorm statistics of every network.
            `tolerance`: accuracy that may be lost. `seed`: of training and search.

    Returns: the result, as in `result.json`: the section's `front` and `delivered` (with the path of the file), and
        the run's `folder`, which has the report.

    Raises: `UsageError`, `DataError`, `CheckpointError` for what cannot be done; `MissingExtraError` without Optuna.
    """
    from secateur.lab.context import Options
    from secateur.lab.explore.run import explore

    recipe = search_recipe(model, allow_code=allow_code, **question)
    folder = None if data_dir is None else Path(data_dir)
    return explore(recipe, Options(Path(out), folder, download, device, allow_code=tuple(allow_code)))
