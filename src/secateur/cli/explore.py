"""The command that asks for variants of a network in one line, and what recipes that explore print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli.console import errors_to_exit, listening, out_json
from secateur.errors import UsageError

if TYPE_CHECKING:
    from secateur.lab.context import Options
    from secateur.lab.explore.recipe import ExploreRecipe

__all__ = ["add_to", "run_exploration"]


def add_to(app: typer.Typer) -> None:
    """Register this file's commands."""
    app.command()(search)


def search(
    model: Annotated[str, typer.Argument(help="A name from secateur models, torchvision:NAME, timm:NAME, python:...")],
    weights: Annotated[
        Path | None,
        typer.Option("--weights", help=r"File with its weights, no code in it is run \[default: train it]."),
    ] = None,
    data: Annotated[str, typer.Option("--data", help="A known data set, or a folder of arrays or images.")] = "digits",
    mean: Annotated[
        str | None,
        typer.Option(
            "--mean", help="What pixels in [0, 1] were normalized by: .485,.456,.406; default: the data set's."
        ),
    ] = None,
    std: Annotated[str | None, typer.Option("--std", help="And divided by.")] = None,
    objectives: Annotated[
        str, typer.Option("--objectives", help="Two or more of accuracy, sparsity, gain, latency, bytes.")
    ] = "accuracy,sparsity",
    budget: Annotated[
        str | None, typer.Option("--budget", help="Time to search: 90s, 10min, 1h; measuring the front comes on top.")
    ] = None,
    trials: Annotated[int | None, typer.Option("--trials", min=1, help="Networks to try.")] = None,
    vary: Annotated[
        str | None, typer.Option("--vary", help=r"weights (zeros) or units (cut) \[default: units for latency].")
    ] = None,
    exclude: Annotated[list[str], typer.Option("--exclude", help="Layers to leave alone (repeatable).")] = [],  # noqa: B006
    images: Annotated[
        int | None, typer.Option("--images", min=2, help=r"Test images to choose by \[default: half, 1000 at most].")
    ] = None,
    recalibrate: Annotated[
        int | None, typer.Option("--recalibrate", min=1, help="Training images that renew BatchNorm statistics.")
    ] = None,
    tolerance: Annotated[float, typer.Option("--tolerance", help="Accuracy that may be lost, as a share.")] = 0.01,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of training and search.")] = 0,
    out: Annotated[Path, typer.Option("--out", help="Folder for the run, its file and its report.")] = Path("runs"),
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help=r"Folder with data sets \[default: $SECATEUR_DATA_DIR].")
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Let data sets download themselves.")] = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Processor threads.")] = None,
    allow_code: Annotated[list[str], typer.Option("--allow-code", help="Module that python: names may run.")] = [],  # noqa: B006
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress, only the result.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, errors too.")] = False,
) -> None:
    """Search the networks that can be made from one; deliver the best that is nearly as accurate, and report.

    Example: secateur search resnet20 --weights w.pth --data cifar10 --objectives accuracy,sparsity --budget 10min
    """
    with errors_to_exit(json_):
        from secateur.lab.explore.ask import search_recipe

        recipe = search_recipe(
            model,
            weights=weights,
            mean=_numbers("--mean", mean),
            std=_numbers("--std", std),
            data=data,
            objectives=[name.strip() for name in objectives.split(",")],
            budget=budget,
            trials=trials,
            vary=vary,
            exclude=exclude,
            images=images,
            recalibrate=recalibrate,
            tolerance=tolerance,
            seed=seed,
            allow_code=allow_code,
        )
        from secateur.lab.context import Options

        options = Options(out, data_dir, download, device, allow_code=tuple(allow_code))
        run_exploration(recipe, options, threads, quiet, json_)


def run_exploration(
    recipe: ExploreRecipe, options: Options, threads: int | None, quiet: bool, as_json: bool
) -> dict[str, Any]:
    """Run it and print what it found."""
    with listening(quiet or as_json) as listener:
        listener.message(f"{recipe.name} ({recipe.hash})")
        import torch

        from secateur.lab.explore.run import explore
        from secateur.lab.report.explore.render import exploration_lines

        if threads is not None:
            torch.set_num_threads(threads)
        result = explore(recipe, options, listener)
    if as_json:
        out_json(result)
    else:
        typer.echo("\n".join(exploration_lines(result)))
        typer.echo(f"report: {Path(result['folder']) / 'report' / 'report.html'}")
    return result


def _numbers(option: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f'{option} "{text}": expected numbers with commas between, as .485,.456,.406') from error
