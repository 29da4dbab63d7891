"""Every registered method has a card; every card has every heading, current tables, and blocks that run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from docs_pages import CARDS, DOCS, ROOT, blocks, check_command, commands, headings, namespace, run_python, section

from secateur.criteria import CRITERIA
from secateur.errors import UnknownNameError, UsageError
from secateur.lab.cards import argument_notes, header_table, method_rows, parameter_table, refresh, refresh_docs
from secateur.lab.recipe_file import load_recipe, shipped_recipes
from secateur.regularizers import REGULARIZERS

HEADINGS = [
    "In one sentence",
    "Definition",
    "Use",
    "Hyper-parameters",
    "What differs from the paper",
    "Cost (measured)",
    "Evidence",
    "Interactions and failure modes",
    "References",
    "Where",
]
NAMES = [*REGULARIZERS.builtin, *CRITERIA.builtin]
_QUOTED = re.compile(r"<!-- from: (?P<file>[^>]+?) -->\n(?P<text>.*?)<!-- end from -->\n?", re.DOTALL)

by_card = pytest.mark.parametrize("card", CARDS, ids=lambda path: path.stem)


def test_every_registered_method_has_a_card_and_every_card_a_method() -> None:
    assert sorted(path.stem for path in CARDS) == sorted(NAMES)


@by_card
def test_headings_are_all_there_in_order_and_none_is_empty(card: Path) -> None:
    assert headings(card) == HEADINGS
    for heading in HEADINGS:
        assert re.sub(r"<!--.*?-->", "", section(card, heading)).strip(), f"{card.name}: {heading} is empty"


@by_card
def test_tables_are_what_the_code_generates(card: Path) -> None:
    text = card.read_text(encoding="utf-8")
    assert f"<!-- generated: header {card.stem} -->\n" in text.partition("## ")[0]
    assert f"<!-- generated: parameters {card.stem} -->\n" in section(card, "Hyper-parameters")
    assert header_table(card.stem) in text
    assert parameter_table(card.stem) in text
    assert refresh(text) == text, "stale; run secateur.lab.cards.refresh_docs('docs')"


@by_card
def test_blocks_run(card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_python(card, namespace()) == 1
    lines = commands(card)
    assert ["run", card.stem] in [words[:2] for words in lines]
    for words in lines:
        check_command(words)


@by_card
def test_the_recipe_shown_is_the_one_that_ships(card: Path) -> None:
    (shown,) = blocks(card, "yaml")
    text = shipped_recipes()[card.stem].read_text(encoding="utf-8")
    assert shown.text == text
    assert text.startswith("# ")
    assert "?" in text.partition("\nname: ")[0]
    recipe = load_recipe(card.stem)
    assert recipe.description
    assert recipe.train.duration == "10ep"


@by_card
def test_the_recipe_has_a_control(card: Path) -> None:
    recipe = load_recipe(card.stem)
    if card.stem in REGULARIZERS.builtin:
        assert "none" in {method.regularizer["name"] for method in recipe.methods}
    else:
        criteria = [*(spec.criterion for spec in recipe.prune), *(m.criterion for m in recipe.methods if m.criterion)]
        assert {"magnitude", "random"} & ({criterion["name"] for criterion in criteria} - {card.stem})


@pytest.mark.slow
@by_card
def test_the_recipe_runs(card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur.lab.context import Options
    from secateur.lab.run import run_recipe

    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(card.stem, ["train.duration=1ep", "data.subset=200", "seeds=[0]"])
    rows = run_recipe(recipe, Options(out=tmp_path / "runs", device="cpu"))["rows"]
    assert len(rows) == sum(len(spec.sparsities) for method in recipe.methods for _, spec in recipe.ways(method))
    for row in rows:
        assert row["sparsity_got"] == pytest.approx(row["sparsity_asked"], abs=0.01)


@by_card
def test_the_recipe_uses_the_method(card: Path) -> None:
    recipe = load_recipe(card.stem)
    plugins = [p for m in recipe.methods for p in (m.regularizer, m.criterion) if p is not None]
    assert card.stem in {plugin["name"] for plugin in [*plugins, *(spec.criterion for spec in recipe.prune)]}


@by_card
def test_figures_come_from_a_file_of_the_repository(card: Path) -> None:
    for heading in ("Cost (measured)", "Evidence"):
        text = section(card, heading)
        for quoted in _QUOTED.finditer(text):
            source = (ROOT / quoted["file"]).read_text(encoding="utf-8")
            for line in filter(None, quoted["text"].splitlines()):
                assert line in source, f"{card.name}: not in {quoted['file']}: {line}"
        own = re.sub(r"\[.*?\]\(.*?\)|`[^`]*`", "", _QUOTED.sub("", text))
        assert not re.search(r"\d", own), f"{card.name}, {heading}: a number typed by hand"


@by_card
def test_what_it_points_to_exists(card: Path) -> None:
    where = section(card, "Where")
    files = re.findall(r"`((?:src|tests|recipes|evidence)/[^`]+)`", where)
    assert [line.split(":")[0] for line in where.split("\n") if line.startswith("- ")] == [
        "- Class",
        "- Test",
        "- Recipe",
    ]
    for file in files:
        assert (ROOT / file).is_file(), f"{card.name}: {file}"
        if file.endswith(".yaml"):
            used = re.findall(
                r"(?:regularizer|criterion): (?:\{name: )?(\w+)", (ROOT / file).read_text(encoding="utf-8")
            )
            assert card.stem in used, f"{card.name}: {file} does not use it"
    (row,) = (r for r in method_rows() if r["name"] == card.stem)
    kind = (CRITERIA if row["phase"] == "score" else REGULARIZERS).load(card.stem)
    assert f"`secateur.{kind.__name__}`" in where
    assert kind.__module__.replace(".", "/") + ".py" in where


@by_card
def test_every_parameter_is_explained(card: Path) -> None:
    below = section(card, "Hyper-parameters").partition("<!-- end generated -->")[2]
    for line in parameter_table(card.stem).splitlines()[2:]:
        name = line.split("`")[1]
        assert not line.endswith("|  |") or f"`{name}`" in below, f"{card.stem}: nothing is said about {name}"


def test_notes_are_read_from_the_docstring() -> None:
    class Documented:
        """What it is.

        Args:
            low, high: two bounds,
                on two lines.
            other: alone.

        Reference: none.
        """

    assert argument_notes(Documented) == {
        "low": "two bounds, on two lines.",
        "high": "two bounds, on two lines.",
        "other": "alone.",
    }


def test_stale_pages_are_found_and_mended(tmp_path: Path) -> None:
    page = tmp_path / "deep" / "page.md"
    page.parent.mkdir()
    page.write_text("# A\n<!-- generated: header none -->\nold\n<!-- end generated -->\nend\n", encoding="utf-8")
    assert refresh_docs(tmp_path) == [page]
    assert page.read_text(encoding="utf-8").splitlines()[-1] == "end"
    assert header_table("none") in page.read_text(encoding="utf-8")
    assert refresh_docs(tmp_path) == []


def test_unknown_blocks_and_methods_are_errors() -> None:
    with pytest.raises(UnknownNameError, match="nearest: magnitude"):
        header_table("magnitud")
    with pytest.raises(UsageError, match=r'block "heading ddrop": expected header NAME'):
        refresh("<!-- generated: heading ddrop -->\n<!-- end generated -->")


def test_the_matrix_names_every_method() -> None:
    text = (DOCS / "methods" / "index.md").read_text(encoding="utf-8")
    assert refresh(text) == text
    for name in NAMES:
        assert f"[`{name}`]({name}.md)" in text
