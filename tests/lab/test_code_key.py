"""A stage that ran code of others is another stage once that code is edited, wherever in its package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from secateur.criteria import CRITERIA
from secateur.errors import UsageError
from secateur.lab.context import Context, Options
from secateur.lab.models import MODELS
from secateur.lab.recipe_file import load_recipe
from secateur.lab.stages import prune_stage, train_stage
from secateur.regularizers import REGULARIZERS

CRITERION = """\
from dataclasses import dataclass
from secateur import Criterion
from keyed_package.deep.helper import factor

@dataclass(frozen=True)
class Mine(Criterion):
    def score(self, evidence):
        return evidence.weight.abs() * factor
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a criterion that another file of it helps, installed with an entry point."""
    folder = tmp_path / "keyed_package"
    (folder / "deep").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "deep" / "__init__.py").touch()
    (folder / "deep" / "helper.py").write_text("factor = 1.0\n")
    (folder / "criterion.py").write_text(CRITERION)
    info = tmp_path / "keyed-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: keyed\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[secateur.criteria]\nkeyed = keyed_package.criterion:Mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [n for n in sys.modules if n.startswith("keyed_package")]:
        del sys.modules[name]


NAMES = ("keyed", "python:keyed_package.criterion:Mine")


@pytest.mark.parametrize("name", NAMES)
def test_the_hash_covers_the_whole_package_by_content(package: Path, name):
    def key() -> str | None:
        return CRITERIA.code_hash(name, ["keyed_package"])

    first = key()
    assert first is not None
    (package / "deep" / "helper.py").touch()
    (package / "notes.txt").write_text("no code")
    assert key() == first
    (package / "deep" / "helper.py").write_text("factor = 2.0\n")
    edited = key()
    assert edited != first
    (package / "another.py").touch()
    assert key() not in (first, edited)
    (package / "another.py").unlink()
    (package / "deep" / "helper.py").write_text("factor = 1.0\n")
    (package / ".#helper.py").symlink_to(package / "nowhere")  # what editors leave
    assert key() == first


def test_a_module_of_one_file_counts_alone(tmp_path, monkeypatch):
    source = tmp_path / "own_method_for_hash.py"
    source.write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    name, allowed = "python:own_method_for_hash:value", ["own_method_for_hash"]
    before = CRITERIA.code_hash(name, allowed)
    (tmp_path / "beside.py").write_text("value = 1\n")
    assert CRITERIA.code_hash(name, allowed) == before
    source.write_text("value = 2\n")
    assert CRITERIA.code_hash(name, allowed) not in (before, None)
    with pytest.raises(UsageError, match="--allow-code"):
        CRITERIA.code_hash(name)


def test_what_ships_with_secateur_counts_by_its_version_alone():
    assert CRITERIA.code_hash("magnitude") is None
    assert REGULARIZERS.code_hash("ddrop") is None
    for name in ("digits_cnn", "torchvision:resnet18", "python:secateur.lab.models.small:mlp"):
        assert MODELS.code_hash(name, ["secateur"]) is None


@pytest.mark.parametrize("name", NAMES)
def test_only_stages_that_use_the_code_get_another_key(package: Path, tmp_path, name):
    recipe = tmp_path / "keyed.yaml"
    recipe.write_text(f"name: keyed\nprune: [{{criterion: '{name}', sparsities: [0.5]}}, {{granularity: unit}}]\n")

    def keys() -> list[str]:
        allowed = ("keyed_package",)
        context = Context(load_recipe(recipe, allow_code=allowed), Options(tmp_path, allow_code=allowed))
        (method,) = context.recipe.methods
        return [
            train_stage(context, method, 0).key,
            *(prune_stage(context, method, 0, p).key for p in context.recipe.prune),
        ]

    before = keys()
    (package / "deep" / "helper.py").write_text("factor = 3.0\n")
    after = keys()
    assert [a == b for a, b in zip(after, before, strict=True)] == [True, False, True]
