"""Reading the documentation as a test does: code blocks, sections, and the things they need to run."""

from __future__ import annotations

import importlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from typer.main import get_command
from typer.testing import CliRunner

from secateur.cli.main import app
from secateur.lab.recipe_file import load_any

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GUIDES = sorted((DOCS / "guides").glob("*.md"))
CARDS = sorted(path for path in (DOCS / "methods").glob("*.md") if path.stem != "index")

_FENCE = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
_FILE = re.compile(r"# (?P<name>[\w./-]+\.(?:py|yaml))\n")


@dataclass(frozen=True)
class Block:
    """A fenced block; `file` is the name in its first line, if that is a comment like `# my.yaml`."""

    language: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        found = _FILE.match(self.text)
        return found["name"] if found else None


def blocks(path: Path, language: str) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    return [
        Block(found["language"], found["text"], text.count("\n", 0, found.start()) + 1)
        for found in _FENCE.finditer(text)
        if found["language"] == language
    ]


def headings(path: Path, level: int = 2) -> list[str]:
    prose = _FENCE.sub("", path.read_text(encoding="utf-8"))
    return re.findall(rf"^{'#' * level} (.+)$", prose, re.MULTILINE)


def section(path: Path, heading: str) -> str:
    _, _, rest = path.read_text(encoding="utf-8").partition(f"## {heading}\n")
    return rest.split("\n## ")[0]


def namespace() -> dict[str, Any]:
    """What pages may take for granted, as docs/methods/index.md says: model, inputs, batches and train."""
    from secateur.lab.data import load_data
    from secateur.lab.models import build_model

    data = load_data("digits")
    images = data.train_images[:256].float().div(16.0)
    batches = [(images[i : i + 64], data.train_labels[i : i + 64]) for i in range(0, 256, 64)]
    found: dict[str, Any] = {
        "model": build_model("digits_cnn", num_classes=10, in_shape=(1, 8, 8), seed=0),
        "inputs": images[:32],
        "batches": batches,
    }
    (train,) = blocks(DOCS / "methods" / "index.md", "python")
    exec(compile(train.text, "docs/methods/index.md", "exec"), found)
    return found


def run_python(path: Path, found: dict[str, Any]) -> int:
    """Run every Python block of a page in order, in one namespace (a named one as a module); returns how many."""
    found.setdefault("__name__", "page")
    count = 0
    for block in blocks(path, "python"):
        count += 1
        if block.file is not None:
            Path(block.file).write_text(block.text, encoding="utf-8")
            importlib.invalidate_caches()
            importlib.import_module(Path(block.file).stem)
            continue
        # Line numbers in a traceback are those of the page.
        code = compile("\n" * block.line + block.text, str(path), "exec")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            exec(code, found)
    return count


def check_yaml(path: Path, allow_code: tuple[str, ...] = ()) -> list[str]:
    """Write every YAML block to its file and load it as a recipe; fragments get a name. Returns the files."""
    files = []
    for number, block in enumerate(blocks(path, "yaml")):
        name = block.file or f"fragment{number}.yaml"
        text = block.text if re.search(r"^name:", block.text, re.MULTILINE) else f"name: fragment\n{block.text}"
        Path(name).write_text(text, encoding="utf-8")
        load_any(name, allow_code=allow_code)
        files.append(name)
    return files


def commands(path: Path) -> list[list[str]]:
    """Every `secateur ...` line of the page's console blocks, as words."""
    lines = "\n".join(block.text for block in blocks(path, "console")).replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    for words in split:
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
    return [words[1:] for words in split if words and words[0] == "secateur"]


def check_command(words: list[str]) -> None:
    """Parse a command line as the program would, without running it; run it where that is quick and safe."""
    top = get_command(app)
    name, *rest = words
    command = top.commands.get(name)  # type: ignore[attr-defined]
    assert command is not None, f"secateur {name}: no such command"
    context = command.make_context(name, list(rest))
    if name == "run":
        overrides = list(context.params["set_"] or [])
        load_any(context.params["recipe"], overrides, allow_code=context.params["allow_code"] or [])
    if name in ("check", "methods", "models"):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"secateur {shlex.join(words)}: {result.output}{result.stderr}"


__all__ = [
    "CARDS",
    "DOCS",
    "GUIDES",
    "ROOT",
    "Block",
    "blocks",
    "check_command",
    "check_yaml",
    "commands",
    "headings",
    "namespace",
    "run_python",
    "section",
]
