"""Keep a run of the demo as evidence, and show it in the README: `python tools/keep_demo.py runs/demo-HASH`."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

from secateur.lab.report import summary_lines

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- demo output -->\n```text\n).*?(```\n<!-- end of demo output -->)", re.DOTALL)


def main(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    evidence = ROOT / "evidence" / "demo"
    evidence.mkdir(parents=True, exist_ok=True)
    (ROOT / "docs" / "images").mkdir(parents=True, exist_ok=True)
    for name in ("result.json", "recipe.yaml"):
        shutil.copy(run / name, evidence / name)
    for name in ("report.html", "table.csv"):
        shutil.copy(run / "report" / name, evidence / name)
    for picture in (run / "report").glob("*accuracy*unit*.png"):
        shutil.copy(picture, ROOT / "docs" / "images" / "demo-unit.png")
    readme = ROOT / "README.md"
    text = "\n".join(summary_lines(result)) + "\n"
    readme.write_text(BLOCK.sub(lambda m: m[1] + text + m[2], readme.read_text()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
