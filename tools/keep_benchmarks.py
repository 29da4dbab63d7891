"""Put benchmark results into `benchmarks/README.md`: `python tools/keep_benchmarks.py SCRIPT=RESULT.json ...`.

Several results of one script (one a case) are joined into one table; of a row that is in several, that of the most
rounds is taken. Every script's table is replaced as a whole. SCRIPT may bear flags that make it another table
(`--compiled`).
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parent.parent / "benchmarks" / "README.md"
HEAD = "| case | variant | ms | ratio | 95 % | goal | |\n|---|---|---:|---:|---|---|---|"


def table(script: str, results: list[dict[str, Any]]) -> str:
    """One script's section: its title, and a line for every row."""
    rounds = sorted({str(result["rounds"]) for result in results})
    lines = [f"### `{script}`: {results[0]['title']} ({', '.join(rounds)} rounds)", "", HEAD]
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    # Of a row measured in several runs, that of the most rounds counts; it keeps its place.
    for result in sorted(results, key=lambda result: result["rounds"]):
        rows.update({(row["case"], row["name"]): row for row in result["rows"]})
    order = dict.fromkeys((row["case"], row["name"]) for result in results for row in result["rows"])
    return "\n".join([*lines, *(_line(rows[key]) for key in order)]) + "\n"


def _line(row: dict[str, Any]) -> str:
    varies = row["low"] != row["high"]
    interval = f"{row['low']:.3f}..{row['high']:.3f}" if varies else ""
    goal = "" if row["goal"] is None else f"{'>=' if row['at_least'] else '<='} {row['goal']:g}"
    verdict = {None: "", True: "met", False: "**missed**"}[row["met"]]
    said = "; ".join(part for part in (verdict, row["note"]) if part)
    time = "" if math.isnan(row["milliseconds"]) else f"{row['milliseconds']:.2f}"
    cells = (row["case"], row["name"], time, f"{row['ratio']:.3f}", interval, goal, said)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main(pairs: list[str]) -> None:
    found: dict[str, list[dict[str, Any]]] = {}
    for pair in pairs:
        script, _, file = pair.partition("=")
        found.setdefault(script, []).append(json.loads(Path(file).read_text()))
    text = README.read_text()
    facts = next(iter(found.values()))[0]["machine"]
    text = re.sub(
        r"(## Measured\n\n).*?(\n\n)",
        lambda m: (
            m[1]
            + f"CPU {facts['cpu']} ({facts['simd']} kernels, {facts['cores']} cores shared with other work), Python "
            + f"{facts['python']}, torch {facts['torch']}, NumPy {facts['numpy']}; CPU only."
            + m[2]
        ),
        text,
        count=1,
        flags=re.DOTALL,
    )
    for script, results in found.items():
        section = re.compile(rf"### `{re.escape(script)}`.*?(?=\n### |\n## )", re.DOTALL)
        text, replaced = section.subn(table(script, results).replace("\\", r"\\"), text, count=1)
        if not replaced:
            text = text.replace("## Reading the misses", f"{table(script, results)}\n## Reading the misses", 1)
    README.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
