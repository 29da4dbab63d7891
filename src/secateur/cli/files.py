"""Commands on what runs leave behind: runs, reports, pruned networks."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli.console import errors_to_exit, out_json, table
from secateur.errors import NoEffectError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["add_to"]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, errors too.")]
AllowCode = Annotated[list[str], typer.Option("--allow-code", help="Module a builder may come from (repeatable).")]
File = Annotated[Path, typer.Argument(help="A pruned network (.safetensors) that a run delivered.")]


def add_to(app: typer.Typer) -> None:
    """Register this file's commands."""
    for command in (runs, report, verify, measure, export):
        app.command()(command)


def runs(
    out: Annotated[Path, typer.Option("--out", help="Folder with runs.")] = Path("runs"), json_: Json = False
) -> None:
    """List the runs in a folder and whether they are complete."""
    with errors_to_exit(json_):
        from secateur.lab.run import list_runs

        found = list_runs(out)
        if json_:
            out_json({"runs": found})
        else:
            columns = ("folder", "complete", "created", "rows", "wall_seconds")
            table("", columns, [[r[c] for c in columns] for r in found])
            for row in found:
                if row["reason"] is not None:
                    typer.echo(f"incomplete: {row['reason']}")


def report(
    run: Annotated[list[Path], typer.Argument(help="Run folders, or result.json files.")],
    out: Annotated[
        Path | None, typer.Option("--out", help=r"Where to write \[default: the run's report folder].")
    ] = None,
    json_: Json = False,
) -> None:
    """Write the HTML report of one run, or a comparison of several. Example: secateur report runs/demo-*"""
    with errors_to_exit(json_):
        from secateur.lab.report import write_report
        from secateur.lab.report.explore.render import write_exploration
        from secateur.lab.run import read_run

        # A shell's runs/* also names the folder of stages.
        run = [path for path in run if path.name != "stages"] or run
        results = _comparable(run) if len(run) > 1 else [read_run(run[0])]
        if out is None and len(run) > 1:
            command = shlex.join(["secateur", "report", *map(str, run), "--out", "comparison"])
            raise UsageError(f"several runs: say where their comparison goes, as in: {command}")
        folder = out if out is not None else (run[0] if run[0].is_dir() else run[0].parent) / "report"
        explored = [result for result in results if result.get("kind") == "exploration"]
        path = write_exploration(explored[0], folder) if explored else write_report(results, folder)
        if json_:
            out_json({"report": str(path)})
        else:
            typer.echo(str(path))


def _comparable(runs: list[Path]) -> list[dict[str, Any]]:
    """The results of runs that one page can compare; why others are not on it is said on stderr."""
    from secateur.lab.run import read_run

    results = []
    for path in runs:
        if path.is_dir() and (path / "recipe.yaml").is_file() and not (path / "result.json").is_file():
            typer.echo(f"{path}: left out, it is not finished", err=True)
            continue
        result = read_run(path)
        if result.get("kind") == "exploration":
            typer.echo(f"{path}: left out, explorations are reported one at a time", err=True)
        else:
            results.append(result)
    if not results:
        raise UsageError(f"none of these {len(runs)} runs can be compared with others; name one of them")
    return results


def verify(file: File, allow_code: AllowCode = [], json_: Json = False) -> None:  # noqa: B006
    """Rebuild a pruned network from its file alone and compare it with its stored answer."""
    with errors_to_exit(json_):
        from secateur.surgery.inspect import check_pruned

        checked = check_pruned(file, allow_code=allow_code)
        if json_:
            out_json({"file": str(file), **asdict(checked)})
        else:
            typer.echo(
                f"{file}: rebuilt from the file alone, {checked.params} parameters; "
                f"max |stored - rebuilt| = {checked.max_abs_diff:.3g} over {checked.values} values "
                f"(scale {checked.scale:.3g})"
            )


def measure(
    file: File,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per call.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Processor threads.")] = 1,
    rounds: Annotated[int, typer.Option(min=6, help="Timed rounds, dense and pruned in turn.")] = 30,
    allow_code: AllowCode = [],  # noqa: B006
    json_: Json = False,
) -> None:
    """Compare a pruned network with its dense self: parameters, MACs, bytes, latency, memory, as ratios."""
    with errors_to_exit(json_):
        import torch

        from secateur.analysis.cost import compare_costs, measure_cost
        from secateur.analysis.latency import latency_ratio, measure_latency
        from secateur.analysis.memory import peak_memory

        dense, pruned, example = _dense_and_pruned(file, allow_code)
        costs = {"dense": measure_cost(dense, example), "pruned": measure_cost(pruned, example)}
        # The weights of the dense network are not in the file: it is built anew, and how many are zero says nothing.
        costs["dense"] = replace(costs["dense"], nonzero=costs["dense"].params)
        stored = (file / "model.safetensors" if file.is_dir() else file).stat().st_size
        times = measure_latency(
            {"dense": dense, "pruned": pruned}, example, batch_size=batch_size, threads=threads, rounds=rounds
        )
        ratio = latency_ratio(times["dense"], times["pruned"])
        batch = torch.cat([example] * batch_size)
        memory = {name: peak_memory(m, batch).peak_bytes for name, m in (("dense", dense), ("pruned", pruned))}
        if json_:
            out_json(
                {
                    "costs": {
                        n: {k: getattr(c, k) for k in ("params", "nonzero", "macs", "bytes")} for n, c in costs.items()
                    },
                    "ratios": compare_costs(costs["dense"], costs["pruned"]),
                    "file_bytes": stored,
                    "latency_ms": {n: [t.median_ms, t.low_ms, t.high_ms] for n, t in times.items()},
                    "latency_ratio": {
                        "median": ratio.median,
                        "low": ratio.low,
                        "high": ratio.high,
                        "resolved": ratio.resolved,
                    },
                    "peak_memory_bytes": memory,
                    "batch_size": batch_size,
                    "threads": threads,
                    "device": times["dense"].device,
                }
            )
            return
        rows: list[list[Any]] = [
            [what, getattr(costs["dense"], key), getattr(costs["pruned"], key)]
            for what, key in (
                ("parameters", "params"),
                ("non-zero", "nonzero"),
                ("MACs", "macs"),
                ("bytes, stored dense", "bytes"),
            )
        ]
        # The file may hold zeros as single bits, and has the plan and an answer to check by.
        rows.append(["bytes, this file", costs["dense"].bytes, stored])
        rows.append(["peak memory, bytes", memory["dense"], memory["pruned"]])
        for row in rows:
            row.append(f"x{row[1] / row[2]:.2f}")
        rows.append(
            ["latency, ms, medians", f"{times['dense'].median_ms:.3f}", f"{times['pruned'].median_ms:.3f}", str(ratio)]
        )
        title = f"{times['dense'].device}, {threads} thread(s), batch {batch_size}"
        table(title, ("", "dense", "pruned", "dense / pruned"), rows)


def export(
    file: File,
    format_: Annotated[str, typer.Option("--format", help="onnx or torch.")] = "onnx",
    out: Annotated[Path | None, typer.Option("--out", help=r"File to write \[default: beside the source].")] = None,
    allow_code: AllowCode = [],  # noqa: B006
    json_: Json = False,
) -> None:
    """Export a pruned network and compare the export with its source numerically."""
    with errors_to_exit(json_):
        from secateur.lab.export import export_onnx, export_torch

        if format_ not in ("onnx", "torch"):
            raise UsageError(f'--format "{format_}": expected onnx or torch')
        _, pruned, example = _dense_and_pruned(file, allow_code)
        target = out or file.with_suffix(".onnx" if format_ == "onnx" else ".pt2")
        if target.resolve() == file.resolve():
            raise NoEffectError(f"{target}: the export would overwrite its source; give another --out")
        done = (export_onnx if format_ == "onnx" else export_torch)(pruned, example, target)
        if json_:
            out_json(
                {"format": done.format, "path": str(done.path), "bytes": done.bytes, "max_abs_diff": done.max_abs_diff}
            )
        else:
            typer.echo(str(done))


def _dense_and_pruned(file: Path, allow_code: list[str]) -> tuple[nn.Module, nn.Module, Tensor]:
    """The network before and after its plan, and one random input of the stored shape."""
    from secateur.surgery.file import load_pruned
    from secateur.surgery.inspect import example_input, load_dense

    return load_dense(file, allow_code=allow_code), load_pruned(file, allow_code=allow_code), example_input(file)
