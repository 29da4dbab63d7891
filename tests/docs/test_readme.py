"""The README tells the truth: its Python runs, its commands parse, its output is that of the run kept as evidence."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from secateur.cli.main import app
from secateur.lab.report import summary_lines

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), scope)
    assert scope["report"].pruned.params < scope["report"].dense.params / 3
    assert scope["again"].fc.weight.shape == (10, 256)


def test_the_demo_output_is_that_of_the_kept_run():
    shown = re.search(r"<!-- demo output -->\n```text\n(.*?)```", README, re.DOTALL)
    kept = json.loads((ROOT / "evidence" / "demo" / "result.json").read_text())
    assert shown is not None
    assert shown[1].splitlines() == summary_lines(kept)


@pytest.mark.parametrize(
    "command", re.findall(r"^secateur (.*?)(?:\s+#.*)?$", README.replace("\\\n", " "), re.MULTILINE)
)
def test_every_command_line_is_understood(command):
    name, *arguments = shlex.split(command)
    flags = [a.split("=")[0] for a in arguments if a.startswith("--")]
    help_text = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert help_text.exit_code == 0
    assert all(flag in help_text.output for flag in flags)


def test_every_path_in_the_table_exists():
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path
