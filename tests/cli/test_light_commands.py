"""`--help`, `check` and `methods` answer in under a second and import no torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HEAVY = ("torch", "torchvision", "lightning_fabric", "matplotlib", "sklearn", "scipy", "onnx", "timm", "torch_pruning")
LIGHT = [["--help"], ["run", "--help"], ["check", "demo"], ["check", "demo", "--json"], ["methods"]]
LIGHT += [["methods", "ddrop"], ["models"], ["--version"], ["check", "demmo"], ["frobnicate"]]

ASK = """
import sys
from secateur.cli import main
sys.argv = ["secateur", *sys.argv[1:]]
try:
    main()
finally:
    print("HEAVY", *[name for name in HEAVY if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_light_commands_import_nothing_heavy(arguments):
    code = f"HEAVY = {HEAVY!r}\n{ASK}"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "HEAVY", done.stderr
    assert done.returncode == (2 if arguments[-1] in ("demmo", "frobnicate") else 0)


@pytest.mark.parametrize("arguments", [["--help"], ["check", "demo"], ["methods"]], ids=" ".join)
def test_light_commands_take_less_than_a_second_of_processor(arguments):
    best = float("inf")
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-m", "secateur", *arguments], capture_output=True, check=True)
        after = os.times()
        best = min(best, after.children_user + after.children_system - before.children_user - before.children_system)
        if best < 1.0:
            break
    assert best < 1.0


def test_importing_secateur_imports_nothing_heavy():
    heavy = (*HEAVY, "numpy", "pydantic", "typer")
    code = f"import secateur, sys; print([n for n in {heavy!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_module_runs_like_the_command():
    done = subprocess.run([sys.executable, "-m", "secateur", "--version"], capture_output=True, text=True, check=True)
    import secateur

    assert done.stdout.strip() == secateur.__version__


def test_a_reader_that_stops_early_is_no_error():
    """`secateur methods | head -1` ends quietly."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "secateur", "methods", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.wait(30)
