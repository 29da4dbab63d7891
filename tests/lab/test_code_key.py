"""A stage that ran the caller's own code is another stage once that code is edited."""

from __future__ import annotations

import pytest

from secateur.errors import UsageError
from secateur.registry import code_hash


def test_the_hash_follows_the_source(tmp_path, monkeypatch):
    source = tmp_path / "own_method_for_hash.py"
    source.write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = code_hash("python:own_method_for_hash:value", ["own_method_for_hash"])
    source.write_text("value = 2\n")
    assert code_hash("python:own_method_for_hash:value", ["own_method_for_hash"]) != before
    assert code_hash("magnitude") is None
    with pytest.raises(UsageError, match="--allow-code"):
        code_hash("python:own_method_for_hash:value")
