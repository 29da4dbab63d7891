"""One report.html that needs nothing else, with the plots and tables as files beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.errors import UsageError
from secateur.lab.report import plots, tables
from secateur.lab.report.final import asked_and_got, asked_lines, cost_rows, facts, latency_ratio, proof
from secateur.lab.report.page import origin, page, replace_file, slug, writable
from secateur.lab.report.picture import Picture
from secateur.lab.report.runs import between, overview, run_names
from secateur.lab.report.schema import Result, read_result
from secateur.lab.report.verdict import judge

__all__ = ["summary_lines", "write_report"]

_NUMBERS = 'All numbers are in <a href="table.csv">table.csv</a> and <a href="layers.csv">layers.csv</a>.'


def write_report(results: Sequence[Mapping[str, Any]], out_dir: Path | str) -> Path:
    """Write report.html, table.csv, layers.csv and every plot as SVG and PNG; return the path of report.html.

    The page holds its plots and styles, asks nothing of the network and runs no script. Several results make
    one page that compares them. Files are replaced whole: a full disk leaves the old report as it was.

    Args:
        results: what runs wrote as result.json, in the order they should appear.
        out_dir: created where it is missing.

    Raises:
        UsageError: no result at all.
        CheckpointError: a result that is malformed; one line with the key path.
        StorageError: the folder cannot be written.
    """
    if not results:
        raise UsageError("report: got no results, expected at least one; name the runs to report on")
    checked = [read_result(raw) for raw in results]
    names = run_names(checked)
    folder = writable(Path(out_dir))
    pictures: list[Picture] = []
    runs = []
    for name, result in zip(names, checked, strict=True):
        prefix = "" if len(checked) == 1 else f"{slug(name)}-"
        runs.append(_run(name, result, prefix, pictures))
    named = list(zip(names, checked, strict=True))
    comparison = None
    if len(checked) > 1:
        table, note = between(named)
        comparison = {"overview": overview(named), "table": table, "note": note}
    title = " vs ".join(names) if len(names) < 4 else f"{len(names)} runs"
    text = page("runs.html", title, runs=runs, comparison=comparison)
    judged = [(name, result, run["verdict"].comparisons) for (name, result), run in zip(named, runs, strict=True)]
    for picture in pictures:
        replace_file(folder / f"{picture.name}.svg", picture.svg.encode())
        replace_file(folder / f"{picture.name}.png", picture.png)
    replace_file(folder / "table.csv", tables.csv_text(judged).encode())
    replace_file(folder / "layers.csv", tables.layers_csv(named).encode())
    # Last, so that a page never names a file that is not there yet.
    replace_file(folder / "report.html", text.encode("utf-8", "replace"))
    return folder / "report.html"


def summary_lines(result: Mapping[str, Any]) -> list[str]:
    """The short text for a terminal: verdict, asked against achieved, proof, speed and files of one result.

    Raises:
        CheckpointError: a result that is malformed; one line with the key path.
    """
    checked = read_result(result)
    verdict = judge(checked)
    lines = [verdict.headline, verdict.detail]
    for section in (item for item in verdict.sections if item.brief):
        lines += ["", section.title, *(f"  {line}" for line in section.lines)]
    final = checked.final
    lines.append("")
    if final is None:
        asked = checked.recipe is None or checked.recipe.get("final") is not None
        why = "its delivery failed; run the recipe again to see why" if asked else 'the recipe has no section "final"'
        return [*lines, f"Final network: none ({why})"]
    seed = "" if final.seed is None else f", seed {final.seed}"
    lines.append(f"Final network: {final.method}{seed}, cut by {final.granularity or 'granularity not recorded'}")
    lines += [f"  {line}" for line in asked_lines(final)]
    lines.append(f"  Proof of the cut: {proof(final.verify)[0]}")
    lines += [f"  {fact.name}: {fact.value}" for fact in facts(final) if fact.name.startswith("Top-1")]
    lines.append(f"  Latency, dense / cut: {latency_ratio(final.latency)}")
    lines += [f"  {fact.name}: {fact.value}" for fact in facts(final) if fact.name.startswith(("Export", "File"))]
    return lines


def _run(name: str, result: Result, prefix: str, pictures: list[Picture]) -> dict[str, Any]:
    """Everything the template says about one run; the plots are also added to `pictures`."""
    verdict, chance = judge(result), result.chance()
    shared = plots.limits(result.panels, chance)
    drawn: list[Picture] = []
    timed: list[Picture] = []
    for panel in result.panels:
        panel_slug = slug(panel.granularity) + ("-trained-again" if panel.retrained else "")
        title = panel.title[:1].upper() + panel.title[1:]
        for number, (part, lines) in enumerate(plots.pages(result, panel), start=1):
            name = f"{prefix}accuracy-{panel_slug}" + (f"-{number}" if part else "")
            drawn.append(plots.accuracy(name, title + part, lines, chance, shared))
        timed += plots.latency(f"{prefix}latency-{panel_slug}", title, plots.lines(result, panel), chance)
    curves = plots.curves(f"{prefix}training", result)
    pictures += [*drawn, *timed, *curves]
    return {
        "name": name,
        "anchor": slug(name),
        "result": result,
        "verdict": verdict,
        "accuracy": drawn,
        "latency": timed,
        "curves": curves,
        "final": None if result.final is None else _final(result),
        "achieved": [tables.achieved(panel) for panel in result.panels],
        "accuracies": [tables.accuracies(panel) for panel in result.panels],
        "differences": tables.differences(verdict.comparisons),
        "densities": [(panel.title, heats) for panel in result.panels if (heats := tables.densities(panel))],
        "trainings": tables.trainings(result),
        **origin(
            result.provenance,
            result.recipe,
            created=result.created,
            wall_seconds=result.wall_seconds,
            recipe_hash=result.recipe_hash,
            numbers=_NUMBERS,
        ),
    }


def _final(result: Result) -> dict[str, Any]:
    final = result.final
    assert final is not None
    asked, got = asked_and_got(final)
    head = ("Quantity", "Dense", "Cut", "Ratio")
    return {
        "method": final.method,
        "seed": final.seed,
        "granularity": final.granularity,
        "asked": asked,
        "got": got,
        "costs": tables.Table("Asked against achieved", head, tuple(cost_rows(final))),
        "facts": facts(final),
    }
