"""Every analysis has a card; every card has every heading, blocks that run, and points to what exists."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
from docs_pages import DOCS, ROOT, blocks, headings, namespace, run_python, section

import secateur.analysis
import secateur.variants.sensitivity

HEADINGS = ["In one sentence", "Definition", "Use", "What it does not say", "Cost", "References", "Where"]
CARDS = sorted(path for path in (DOCS / "analyses").glob("*.md") if path.stem != "index")
# Measures of size and speed, which the API pages describe, and what the analyses are made of.
_OTHERS = {"cost", "latency", "memory", "inputs", "layers", "second_order"}

by_card = pytest.mark.parametrize("card", CARDS, ids=lambda path: path.stem)


def _analyses() -> dict[str, str]:
    """Public functions of the analyses, by name, with the file each is in."""
    names = [module.name for module in pkgutil.iter_modules(secateur.analysis.__path__) if module.name not in _OTHERS]
    modules = [importlib.import_module(f"secateur.analysis.{name}") for name in names]
    return {
        name: "src/" + module.__name__.replace(".", "/") + ".py"
        for module in [*modules, secateur.variants.sensitivity]
        for name in module.__all__
        if inspect.isfunction(getattr(module, name))
    }


def test_every_analysis_is_on_a_card_and_every_card_on_the_page_of_all() -> None:
    found = _analyses()
    assert {"feature_variance", "gradient_flow", "sensitivity", "spread", "mc_predict"} <= found.keys()
    where = {card.stem: section(card, "Where") for card in CARDS}
    for name, file in found.items():
        assert any(f"`secateur.{name}`" in text and f"`{file}`" in text for text in where.values()), name
    for card, text in where.items():
        assert any(f"`secateur.{name}`" in text for name in found), card
    index = (DOCS / "analyses" / "index.md").read_text(encoding="utf-8")
    assert sorted(set(re.findall(r"^\| \[`\w+`\]\((\w+)\.md\)", index, re.MULTILINE))) == sorted(where)


@by_card
def test_headings_are_all_there_in_order_and_none_is_empty(card: Path) -> None:
    assert headings(card) == HEADINGS
    for heading in HEADINGS:
        assert section(card, heading).strip(), f"{card.name}: {heading} is empty"


@by_card
def test_blocks_run_and_leave_the_network_alone(card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = namespace()
    before = {name: value.clone() for name, value in found["model"].state_dict().items()}
    assert run_python(card, found) == 1
    (block,) = blocks(card, "python")
    assert len([line for line in block.text.splitlines() if line and not line.startswith(("from", "import"))]) <= 3
    assert all(before[name].equal(value) for name, value in found["model"].state_dict().items())


@by_card
def test_what_it_points_to_exists(card: Path) -> None:
    where = section(card, "Where")
    assert [line.split(":")[0] for line in where.split("\n") if line.startswith("- ")] == ["- Function", "- Test"]
    files = re.findall(r"`((?:src|tests)/[^`]+)`", where)
    assert len(files) >= 2
    for file in files:
        assert (ROOT / file).is_file(), f"{card.name}: {file}"
    for name in re.findall(r"`secateur\.(\w+)`", where):
        assert callable(getattr(importlib.import_module("secateur"), name))


@by_card
def test_no_figure_is_typed_into_what_it_costs(card: Path) -> None:
    assert not re.search(r"(?<!\w)\d", re.sub(r"`[^`]*`", "", section(card, "Cost")))
