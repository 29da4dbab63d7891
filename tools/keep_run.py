"""Keep a run as evidence: `python tools/keep_run.py RUN_FOLDER EVIDENCE_NAME`.

Copies recipe, result, report and table, and writes `accuracy.md`, the table that method cards quote, or for an
exploration `findings.md`. The demo's picture and printed summary also go into the README.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from secateur.core.statistics import mean_interval
from secateur.lab.report import summary_lines
from secateur.lab.report.explore.render import views

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- demo output -->\n```text\n).*?(```\n<!-- end of demo output -->)", re.DOTALL)


def accuracy_tables(result: dict[str, Any]) -> str:
    """Top-1 in percent, mean and 95 % interval over seeds, one table per granularity."""
    lines = [
        f"# {result['name']}: top-1 in percent, mean and 95 % interval over {len(result['recipe']['seeds'])} seeds"
    ]
    rows = result["rows"]
    for granularity, again in dict.fromkeys((r["granularity"], r["retrained"]) for r in rows):
        own = [r for r in rows if (r["granularity"], r["retrained"]) == (granularity, again)]
        sparsities = sorted({round(r["sparsity_asked"], 6) for r in own})
        title = f"pruned by {granularity}" + (", trained again" if again else "")
        lines += ["", f"| {title} | criterion | " + " | ".join(f"{s:.1%}" for s in sparsities) + " |"]
        lines += ["|---|---|" + "---|" * len(sparsities)]
        arms = dict.fromkeys((r["method"], r["criterion"], r["scope"]) for r in own)
        for arm in arms:
            here = [r for r in own if (r["method"], r["criterion"], r["scope"]) == arm]
            at = [[r for r in here if round(r["sparsity_asked"], 6) == sparsity] for sparsity in sparsities]
            method, criterion, scope = (part.replace("|", "\\|") for part in arm)
            scoped = sum(other[:2] == arm[:2] for other in arms) > 1
            name = f"{criterion} ({scope})" if scoped else criterion
            lines.append(f"| {method} | {name} | " + " | ".join(map(_cell, at)) + " |")
    return "\n".join(lines) + "\n"


def _cell(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    found = mean_interval([r["top1"] for r in rows], count=rows[0]["count"])
    interval = "" if found.low is None else f" ({100 * found.low:.1f}..{100 * found.high:.1f})"
    return f"{100 * found.mean:.1f}{interval}"


def findings(result: dict[str, Any]) -> str:
    """What every section of an exploration says, with its tables."""
    lines = [f"# {result['name']}"]
    for view in views(result):
        lines += ["", f"## {view.title}", "", *(f"- {line}" for line in view.lines)]
        for table in view.tables:
            lines += ["", table.title, "", "| " + " | ".join(table.head) + " |", "|---" * len(table.head) + "|"]
            lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table.rows]
        lines += ["", *view.notes]
    return "\n".join(lines) + "\n"


def main(run: Path, name: str) -> None:
    result = json.loads((run / "result.json").read_text())
    evidence = ROOT / "evidence" / name
    evidence.mkdir(parents=True, exist_ok=True)
    explored = result.get("kind") == "exploration"
    for file in ("result.json", "recipe.yaml", "report/report.html", *(() if explored else ("report/table.csv",))):
        shutil.copy(run / file, evidence / Path(file).name)
    if explored:
        (evidence / "findings.md").write_text(findings(result))
        return
    (evidence / "accuracy.md").write_text(accuracy_tables(result))
    if name == "demo":
        (ROOT / "docs" / "images").mkdir(parents=True, exist_ok=True)
        shutil.copy(run / "report" / "accuracy-unit.png", ROOT / "docs" / "images" / "demo-unit.png")
        readme = ROOT / "README.md"
        text = "\n".join(summary_lines(result)) + "\n"
        readme.write_text(BLOCK.sub(lambda m: m[1] + text + m[2], readme.read_text()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
