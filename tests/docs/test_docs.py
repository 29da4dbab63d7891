"""The guides and CONTRIBUTING: every snippet runs, every command parses, every recipe and link is good."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from docs_pages import (
    CARDS,
    DOCS,
    GUIDES,
    ROOT,
    blocks,
    check_command,
    check_yaml,
    commands,
    headings,
    run_python,
)
from ruamel.yaml import YAML
from typer.testing import CliRunner

import secateur
from secateur.cli.main import app
from secateur.criteria import CRITERIA
from secateur.errors import SecateurError
from secateur.lab.cards import refresh
from secateur.lab.recipe import Recipe
from secateur.lab.recipe_docs import recipe_tables
from secateur.lab.recipe_file import load_recipe, shipped_recipes
from secateur.regularizers import REGULARIZERS

CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = sorted([*DOCS.rglob("*.md"), CONTRIBUTING, ROOT / "CHANGELOG.md"])
NEEDED = [
    "data",
    "explore",
    "files",
    "getting-started",
    "mask-guided",
    "recipes",
    "report",
    "runs",
    "surgery",
    "training-loop",
    "variants",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A fresh working directory from which modules can be imported; what pages import there is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


def test_the_guides_are_there() -> None:
    assert sorted(path.stem for path in GUIDES) == NEEDED


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_guides_run(guide: Path, folder: Path) -> None:
    run_python(guide, {"__name__": "guide"})
    check_yaml(guide)
    for words in commands(guide):
        check_command(words)
    assert blocks(guide, "console") or blocks(guide, "python")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_generated_blocks_are_current(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert refresh(text) == text, "stale; run secateur.lab.cards.refresh_docs('docs')"


def test_contributing_runs_and_its_plugins_keep_the_contracts(folder: Path) -> None:
    assert run_python(CONTRIBUTING, {"__name__": "contributing"}) == 8
    (recipe,) = check_yaml(CONTRIBUTING, allow_code=("mycriteria",))
    loaded = load_recipe(recipe, allow_code=["mycriteria"])
    # Without a control of that name and more seeds than one there is no verdict.
    assert [entry.title for entry in loaded.prune] == ["magnitude", "signal to noise"]
    assert len(loaded.seeds) > 1
    lines = commands(CONTRIBUTING)
    assert [words[0] for words in lines] == ["check", "run"]
    for words in lines:
        check_command(words)
    refused = CliRunner().invoke(app, ["check", "mine.yaml"])
    assert refused.exit_code == 2
    assert "--allow-code mycriteria" in refused.stderr


def test_contributing_keeps_its_word_about_length() -> None:
    sizes = {
        str(block.file): sum(
            bool(line.strip()) and not line.startswith(("#", "from ", "import ")) for line in block.text.splitlines()
        )
        for block in blocks(CONTRIBUTING, "python")
        if block.file
    }
    assert sizes["mycriteria.py"] <= 10
    assert sizes["mynoise.py"] <= sizes["mygaussian.py"] <= sizes["mynoise2.py"] <= 50
    assert sizes["mygates.py"] <= 50


def test_contributing_names_the_real_entry_point_groups() -> None:
    (block,) = blocks(CONTRIBUTING, "toml")
    groups = tomllib.loads(block.text)["project"]["entry-points"]
    assert sorted(groups) == sorted([CRITERIA.group, REGULARIZERS.group])


def test_a_plugin_from_an_entry_point_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in blocks(CONTRIBUTING, "python"):
        if block.file:
            (folder / block.file).write_text(block.text, encoding="utf-8")
    info = folder / "mypackage-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mypackage\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(
        f"[{CRITERIA.group}]\nsignal_to_noise = mycriteria:SignalToNoise\n"
        f"[{REGULARIZERS.group}]\nsign_noise = mynoise:SignNoise\n",
        encoding="utf-8",
    )
    importlib.invalidate_caches()
    assert CRITERIA.names()[-1] == "signal_to_noise"
    assert CRITERIA.load("signal_to_noise")().epsilon > 0
    assert REGULARIZERS.load("sign_noise")().flip_rate > 0
    listed = CliRunner().invoke(app, ["methods", "--json"])
    assert listed.exit_code == 0
    assert '"sign_noise"' in listed.stdout


def test_every_key_of_a_recipe_is_listed() -> None:
    text, seen = recipe_tables(), set()
    assert text in (DOCS / "guides" / "recipes.md").read_text(encoding="utf-8")

    def walk(schema: Any) -> None:
        for name, value in schema.get("properties", {}).items():
            seen.add(name)
            assert f"| `{name}` |" in text, name
            walk(value)

    schema = Recipe.model_json_schema()
    for part in [schema, *schema["$defs"].values()]:
        walk(part)
    assert {"sparsities", "exports", "decay_norms", "grad_clip"} <= seen


def test_shipped_recipes_are_named() -> None:
    text = (DOCS / "guides" / "recipes.md").read_text(encoding="utf-8")
    for name in shipped_recipes():
        assert f"`{name}`" in text


def test_exit_codes_are_those_of_the_errors() -> None:
    table = (DOCS / "guides" / "runs.md").read_text(encoding="utf-8").partition("## Exit codes")[2]
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}

    def codes(kind: type[SecateurError]) -> set[int]:
        return {kind.exit_code}.union(*(codes(sub) for sub in kind.__subclasses__()))

    assert codes(SecateurError) | {0, 130} == listed


def test_environment_variables_are_those_of_the_code() -> None:
    text = (DOCS / "guides" / "runs.md").read_text(encoding="utf-8")
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    used = set(re.findall(r"environ(?:\.get|\.setdefault)?[(\[]\"([A-Z_]+)\"", code)) - {"NO_COLOR"}
    assert {"SECATEUR_DATA_DIR", "ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"} <= used
    for name in used:
        assert f"| `{name}` |" in text, name


def test_api_pages_name_every_public_name_where_it_is_defined() -> None:
    named = set()
    for page in (DOCS / "api").glob("*.md"):
        for path in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            module, _, name = path.rpartition(".")
            assert hasattr(importlib.import_module(module), name), path
            named.add(name)
    assert set(secateur.__all__) - {"__version__"} <= named


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).is_file(), f"{page.name}: {target}"


def test_navigation_has_every_page() -> None:
    def leaves(node: Any) -> list[str]:
        if isinstance(node, str):
            return [node]
        return [leaf for child in (node.values() if isinstance(node, dict) else node) for leaf in leaves(child)]

    nav = leaves(YAML(typ="safe").load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(nav) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_license_citation_and_changelog() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    citation = YAML(typ="safe").load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == secateur.__version__
    assert citation["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["license"]
    assert len(citation["references"]) == 5
    for entry in [citation, *citation["references"]]:
        assert entry["title"]
        assert entry["authors"]
    assert "Unreleased" in headings(ROOT / "CHANGELOG.md")[0]


def test_nothing_machine_bound_is_in_the_pages() -> None:
    for page in [*PAGES, *CARDS]:
        assert not re.search(r"/work/|/tmp/|/home/|/root/", page.read_text(encoding="utf-8")), page


def test_checks_of_this_file_can_fail(folder: Path) -> None:
    page = folder / "page.md"
    page.write_text("```python\nassert 1 == 2\n```\n```yaml\nprune: [{granularty: unit}]\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError):
        run_python(page, {})
    with pytest.raises(SecateurError, match="nearest: granularity"):
        check_yaml(page)
    with pytest.raises(AssertionError, match="no such command"):
        check_command(["runn", "demo"])
    with pytest.raises(SecateurError, match="nearest: duration"):
        check_command(["run", "demo", "--set", "train.duraton=4ep"])
    with pytest.raises(Exception, match="No such option"):
        check_command(["run", "demo", "--sed", "1"])
