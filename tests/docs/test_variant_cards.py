"""The cards of what is done with variants: every heading, blocks that run, figures from files, and nothing missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from docs_pages import DOCS, ROOT, check_command, check_yaml, commands, headings, namespace, run_python, section
from test_cards import HEADINGS

import secateur

CARDS = sorted((DOCS / "variants").glob("*.md"))
_QUOTED = re.compile(r"<!-- from: (?P<file>[^>]+?) -->\n(?P<text>.*?)<!-- end from -->\n?", re.DOTALL)

by_card = pytest.mark.parametrize("card", CARDS, ids=lambda path: path.stem)


def test_the_cards_are_there() -> None:
    assert [card.stem for card in CARDS] == ["mask_guided", "stochastic_pruning"]


@by_card
def test_headings_are_all_there_in_order_and_none_is_empty(card: Path) -> None:
    assert headings(card) == HEADINGS
    for heading in HEADINGS:
        assert re.sub(r"<!--.*?-->", "", section(card, heading)).strip(), f"{card.name}: {heading} is empty"


@by_card
def test_blocks_run(card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_python(card, namespace()) == 1
    assert check_yaml(card)
    assert commands(card)
    for words in commands(card):
        check_command(words)


@by_card
def test_figures_come_from_a_file_of_the_repository(card: Path) -> None:
    for heading in ("Cost (measured)", "Evidence"):
        text = section(card, heading)
        for quoted in _QUOTED.finditer(text):
            source = (ROOT / quoted["file"]).read_text(encoding="utf-8")
            assert quoted["text"].strip(), f"{card.name}: nothing quoted of {quoted['file']}"
            for line in filter(None, quoted["text"].splitlines()):
                assert line in source, f"{card.name}: not in {quoted['file']}: {line}"


@by_card
def test_what_it_points_to_exists(card: Path) -> None:
    where = section(card, "Where")
    files = re.findall(r"`((?:src|tests)/[^`]+)`", where)
    assert files
    for file in files:
        assert (ROOT / file).is_file(), f"{card.name}: {file}"
    (name,) = re.findall(r"`secateur\.(\w+)`", where)
    assert hasattr(secateur, name)
