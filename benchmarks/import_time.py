"""What starting costs: `import secateur` against `import torch`, and the commands that must answer at once.

    python benchmarks/import_time.py [--rounds 9] [--json FILE]

Every run is a fresh process; its CPU time counts. For commands the ratio column is seconds, and the note says
whether torch was loaded.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

from _paired import Row, parser, ratios, report, timed_rounds

import secateur

TORCH = "import torch"
IMPORTS = {
    TORCH: "import torch",
    "import secateur": "import secateur",
    "import secateur, and all its names": "import secateur; [getattr(secateur, n) for n in secateur.__all__]",
}
COMMAND = """
import sys
from secateur.cli import main
sys.argv = ["secateur", *{arguments!r}]
try:
    main()
except SystemExit as leaving:
    code = leaving.code or 0
else:
    code = 0
print("torch" if "torch" in sys.modules else "no torch", file=sys.stderr)
sys.exit(code)
"""


def process(code: str) -> Callable[[], subprocess.CompletedProcess[str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return lambda: subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def child_time(action: Callable[[], subprocess.CompletedProcess[str]]) -> float:
    """CPU milliseconds of the process that `action` runs to its end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = action()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"the measured process failed:\n{done.stderr}")
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1e3


def commands() -> dict[str, list[str]]:
    found = {"secateur --help": ["--help"], "secateur methods": ["methods"]}
    recipe = Path(str(secateur.__file__)).parent / "recipes" / "demo.yaml"
    return found | {f"secateur check {recipe.name}": ["check", str(recipe)]}


def measure(rounds: int) -> list[Row]:
    asked = commands()
    codes = {**IMPORTS, **{name: COMMAND.format(arguments=a) for name, a in asked.items()}}
    runs = {name: process(code) for name, code in codes.items()}
    times = timed_rounds(runs, rounds, clock=child_time)
    rows = []
    for name in IMPORTS:
        goal = 1.1 if name == "import secateur" else None
        rows.append(Row("import, to torch's", name, median(times[name]), *ratios(times[name], times[TORCH]), goal))
    for name in asked:
        loaded = runs[name]().stderr.strip().splitlines()[-1]
        seconds = ratios(times[name], [1e3] * rounds)
        rows.append(Row("command, seconds", name, median(times[name]), *seconds, 1.0, note=loaded))
    return rows


def main() -> None:
    asked = parser(__doc__, rounds=9).parse_args()
    rows = measure(asked.rounds)
    report("Start-up time in fresh processes", rows, asked.rounds, asked.json)
    if any(row.note == "torch" for row in rows):
        raise SystemExit("a command that must answer at once has loaded torch")


if __name__ == "__main__":
    main()
