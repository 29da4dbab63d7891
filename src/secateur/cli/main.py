"""The commands. Nothing here imports torch before a command needs it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur._version import __version__
from secateur.cli import catalog, explore, files
from secateur.cli.console import errors_to_exit, fail, human, listening, out_json, show_tracebacks, table
from secateur.errors import CheckNotMetError, UsageError

if TYPE_CHECKING:
    from secateur.lab.explore.recipe import ExploreRecipe
    from secateur.lab.recipe import Recipe

__all__ = ["app", "main"]

app = typer.Typer(
    name="secateur",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Train networks to be pruned, prune them, cut them for real, and prove the cut exact.",
    epilog=(
        "Exit codes: 0 done; 1 the run failed; 2 wrong usage or recipe; 3 an extra or a device is missing; "
        "5 a check was not met; 130 interrupted, state saved."
    ),
)
catalog.add_to(app)
files.add_to(app)
explore.add_to(app)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, errors too.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for runs and their stages.")]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help=r"Folder with data sets \[default: $SECATEUR_DATA_DIR].")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help=r"Processor threads \[default: torch's choice].")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress, only the result.")]
Set = Annotated[list[str], typer.Option("--set", help="Override a recipe key: train.duration=5ep (repeatable).")]
Seeds = Annotated[str | None, typer.Option("--seeds", help="Seeds instead of the recipe's: 0-4 or 0,2,5.")]
AllowCode = Annotated[
    list[str], typer.Option("--allow-code", help="Module that python:module:name entries may run (repeatable).")
]


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of every error.")] = False,
) -> None:
    show_tracebacks(debug)
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def demo(
    out: Out = Path("runs"),
    set_: Set = [],  # noqa: B006 (typer reads the default, nothing changes it)
    threads: Annotated[int, typer.Option("--threads", min=1, help="Processor threads.")] = 1,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Train, prune, cut, prove, export and report on the scanned digits: two minutes, no download.

    Five ways of training, three paired seeds, pruned by weight and by unit. Example: secateur demo
    """
    _run("demo", set_, None, out, None, False, "cpu", threads, True, [], quiet, json_, None)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    set_: Set = [],  # noqa: B006
    seeds: Seeds = None,
    out: Out = Path("runs"),
    data_dir: DataDir = None,
    download: Annotated[bool, typer.Option("--download", help="Let data sets download themselves.")] = False,
    device: Device = "auto",
    threads: Threads = None,
    resume: Annotated[bool, typer.Option(help="Use finished stages and checkpoints; or do them again.")] = True,
    dry_run: Annotated[bool, typer.Option("-n", "--dry-run", help="Show the resolved recipe and its stages.")] = False,
    allow_code: AllowCode = [],  # noqa: B006
    fail_under: Annotated[
        float | None, typer.Option("--fail-under", help="Exit 5 if the delivered network's accuracy is below this.")
    ] = None,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Run a recipe; run it again to continue where it stopped.

    Example: secateur run demo --set train.duration=4ep --seeds 0-4
    """
    if dry_run:
        _dry_run(recipe, set_, seeds, out, data_dir, device, allow_code, json_)
        return
    _run(recipe, set_, seeds, out, data_dir, download, device, threads, resume, allow_code, quiet, json_, fail_under)


@app.command()
def check(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    set_: Set = [],  # noqa: B006
    seeds: Seeds = None,
    allow_code: AllowCode = [],  # noqa: B006
    json_: Json = False,
) -> None:
    """Validate a recipe without running anything. Example: secateur check my.yaml"""
    with errors_to_exit(json_):
        from secateur.lab.explore.recipe import ExploreRecipe
        from secateur.lab.precheck import precheck

        loaded = _load(recipe, set_, seeds, allow_code)
        precheck(loaded, allow_code)
        if isinstance(loaded, ExploreRecipe):
            _checked_exploration(loaded, json_)
            return
        trainings, rows = loaded.counts()
        counts = {"trainings": trainings, "rows": rows}
        if json_:
            out_json({"recipe": loaded.resolved(), "hash": loaded.hash, **counts})
        else:
            typer.echo(
                f"{loaded.name} ({loaded.hash}) is valid: {counts['trainings']} trainings, {counts['rows']} pruned "
                f"networks{', one delivered' if loaded.final else ''}"
            )


def _checked_exploration(recipe: ExploreRecipe, as_json: bool) -> None:
    sections = [section.title or section.kind for section in recipe.explore]
    if as_json:
        out_json({"recipe": recipe.resolved(), "hash": recipe.hash, "sections": sections})
    else:
        typer.echo(f"{recipe.name} ({recipe.hash}) is valid: it explores one network, {', '.join(sections)}")


def _load(recipe: str, overrides: list[str], seeds: str | None, allow_code: list[str]) -> Recipe | ExploreRecipe:
    from secateur.lab.explore.recipe import ExploreRecipe
    from secateur.lab.recipe_file import load_any

    extra = [f"seeds=[{', '.join(map(str, _parse_seeds(seeds)))}]"] if seeds is not None else []
    if extra and isinstance(load_any(recipe, overrides, allow_code=allow_code), ExploreRecipe):
        raise UsageError("--seeds: this recipe explores one network; set its seed (--set seed=1)")
    return load_any(recipe, [*overrides, *extra], allow_code=allow_code)


def _parse_seeds(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UsageError(f'--seeds "{text}": expected numbers like 0-4 or 0,2,5')
        numbers = range(int(first), int(last or first) + 1)
        if not 1 <= len(numbers) <= 10_000:
            raise UsageError(f'--seeds "{text}": {part.strip()} names {len(numbers)} seeds, expected 1 to 10000')
        found += numbers
    return found


def _run(
    recipe: str,
    overrides: list[str],
    seeds: str | None,
    out: Path,
    data_dir: Path | None,
    download: bool,
    device: str,
    threads: int | None,
    resume: bool,
    allow_code: list[str],
    quiet: bool,
    as_json: bool,
    fail_under: float | None,
) -> None:
    with errors_to_exit(as_json):
        loaded = _load(recipe, overrides, seeds, allow_code)
        from secateur.lab.explore.recipe import ExploreRecipe

        if fail_under is not None and (isinstance(loaded, ExploreRecipe) or loaded.final is None):
            raise UsageError("--fail-under: the recipe delivers no network; give it a final section")
        if isinstance(loaded, ExploreRecipe):
            from secateur.lab.context import Options

            options = Options(out, data_dir, download, device, resume, tuple(allow_code))
            explore.run_exploration(loaded, options, threads, quiet, as_json)
            return
        with listening(quiet or as_json) as listener:
            listener.message(f"{loaded.name} ({loaded.hash})")
            from secateur.lab.context import Options
            from secateur.lab.report import summary_lines
            from secateur.lab.run import run_recipe

            _set_threads(threads)
            options = Options(out, data_dir, download, device, resume, tuple(allow_code))
            result = run_recipe(loaded, options, listener)
        if as_json:
            out_json(result)
        else:
            typer.echo("\n".join(summary_lines(result)))
            typer.echo(f"report: {Path(result['folder']) / 'report' / 'report.html'}")
    if fail_under is not None:
        with errors_to_exit():  # the result is on stdout already, so this says only that it is not enough
            _check_accuracy(result["final"], fail_under)


def _check_accuracy(final: dict[str, Any], fail_under: float) -> None:
    reached = final["accuracy"].get("fine_tuned", final["accuracy"]["cut"])
    if reached < fail_under:
        raise CheckNotMetError(f"accuracy of the delivered network is {reached:.4f}, below --fail-under {fail_under:g}")


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _dry_run(
    recipe: str,
    overrides: list[str],
    seeds: str | None,
    out: Path,
    data_dir: Path | None,
    device: str,
    allow_code: list[str],
    as_json: bool,
) -> None:
    with errors_to_exit(as_json):
        loaded = _load(recipe, overrides, seeds, allow_code)
        from secateur.lab.context import Options
        from secateur.lab.explore.recipe import ExploreRecipe
        from secateur.lab.explore.run import exploration_folder, plan_exploration
        from secateur.lab.run import plan_run, run_folder

        options = Options(out, data_dir, device=device, allow_code=tuple(allow_code))
        if isinstance(loaded, ExploreRecipe):
            planned, folder = plan_exploration(loaded, options), exploration_folder(loaded, options)
        else:
            planned, folder = plan_run(loaded, options), run_folder(loaded, options)
        if as_json:
            stages = [{"title": p.title, "key": p.key, "done": p.done} for p in planned]
            out_json({"recipe": loaded.resolved(), "folder": str(folder), "stages": stages})
            return
        table(
            f"{loaded.name} -> {folder}",
            ("stage", "key", "state"),
            [(p.title, p.key, "done" if p.done else "to do") for p in planned],
        )
        human.print(f"{sum(p.done for p in planned)} of {len(planned)} stages are done already; nothing was run")


def main() -> None:
    """Entry point of `secateur` and `python -m secateur`."""
    # Dependencies that would report home are told not to before they are imported.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    try:
        code = app(standalone_mode=False)
    except typer.Abort:
        code = 130
    except typer.TyperException as error:  # an unknown command or option, a missing argument
        message = error.format_message().rstrip(".")
        if not message:  # no command at all: the help is on the screen already
            sys.exit(2)
        try:
            fail(f"{message}; see {_asked()} --help", "UsageError", 2, "--json" in sys.argv)
        except typer.Exit as exit_:
            code = exit_.exit_code
    sys.exit(code)


def _asked() -> str:
    """The command that was typed, without its arguments."""
    names = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    return " ".join(["secateur", *(word for word in words[:1] if word in names)])
