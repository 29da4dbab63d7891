"""The section on single layers: numbers of the engine, a stopped run, and what the page says about them."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from secateur.lab.context import Options
from secateur.lab.explore.recipe import ExploreRecipe
from secateur.lab.explore.sensitivity import run
from secateur.lab.explore.sensitivity_spec import SensitivitySpec
from secateur.lab.explore.session import Session
from secateur.lab.listener import Interrupted, Listener
from secateur.lab.report.explore.sensitivity import view
from secateur.variants import LayerSparsity, evaluate_variants


def _recipe(**changes):
    return ExploreRecipe.model_validate(
        {
            "name": "small",
            "data": {"name": "digits", "subset": 300},
            "model": {"name": "digits_cnn", "kwargs": {"widths": [4, 6, 8]}},
            "train": {"duration": "2ep", "batch_size": 50},
            "judge": {"images": 60},
            "explore": [{"kind": "noise", "sigmas": [0.1], "sparsities": [0.5]}],
            **changes,
        }
    )


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    session = Session(_recipe(), Options(out=tmp_path_factory.mktemp("out"), device="cpu"))
    session.train()
    return session


def _section(spec, found):
    return json.loads(json.dumps({"kind": spec.kind, "title": "Layers", "spec": spec.model_dump(mode="json"), **found}))


def test_every_layer_is_pruned_alone(session, tmp_path):
    spec = SensitivitySpec(kind="sensitivity", sparsities=(0.9, 0.5))
    found = run(session, spec, tmp_path)
    assert [layer["layer"] for layer in found["layers"]] == ["conv1", "conv2", "conv3", "head"]
    assert found["layers"][0]["weights"] == 36
    wanted = LayerSparsity("conv2.weight", 0.9)
    (mean,) = evaluate_variants(session.bench(), [wanted], session.judged).means()
    step = found["layers"][1]["steps"][1]
    assert step["sparsity"] == 0.9
    assert step["accuracy"] == mean
    assert step["change"] == pytest.approx(mean - found["dense"])
    assert all(s["p"] <= s["p_holm"] <= 1 for layer in found["layers"] for s in layer["steps"])
    assert run(session, spec, tmp_path)["examples"] == 0
    shown = view(_section(spec, found), "layers")
    assert shown.title == "Layers"
    assert any("of 4 layers lose accuracy beyond chance" in line for line in shown.lines)
    assert [picture.name for picture in shown.pictures] == ["layers-heat", "layers-lines"]
    assert all("<svg" in picture.svg and picture.png for picture in shown.pictures)
    (table,) = shown.tables
    assert table.head == ("Layer", "Weights", "50 %", "90 %")
    assert len(table.rows) == 4


def test_a_stopped_run_goes_on(session, tmp_path, monkeypatch):
    spec = SensitivitySpec(kind="sensitivity", sparsities=(0.5,))

    class Stopping(Listener):
        def advanced(self, step, note):
            self.stop = step > 120

    monkeypatch.setattr(session.context, "listener", Stopping())
    with pytest.raises(Interrupted):
        run(session, spec, tmp_path)
    monkeypatch.setattr(session.context, "listener", Listener())
    assert 0 < run(session, spec, tmp_path)["examples"] < 60 * 5


def _layer(name, change, low, high, p):
    step = {"sparsity": 0.5, "accuracy": 0.9 + change, "change": change, "low": low, "high": high, "p": p, "p_holm": p}
    return {"layer": name, "weights": 100, "steps": [step]}


def test_many_layers_and_what_was_not_found():
    layers = [_layer(f"stage{at}.conv", -0.001, -0.02, 0.018, 1.0) for at in range(9)]
    layers.append(_layer("head", -0.5, -0.6, -0.4, 0.001))
    found = {"criterion": "magnitude", "count": 100, "dense": 0.9, "layers": layers, "intervals": ["a test"]}
    shown = view(_section(SensitivitySpec(kind="sensitivity", sparsities=(0.5,)), found), "x")
    assert shown.lines[0].startswith(
        'At 50 %, 1 of 10 layers lose accuracy beyond chance; "head" changes most, by -50.0'
    )
    assert 'for "stage0.conv", "stage1.conv", "stage2.conv", "stage3.conv" and 5 others' in shown.lines[1]
    assert "reach down to -2.0 points" in shown.lines[2]
    # Five have a color and a name, the rest none.
    assert shown.pictures[1].svg.count(">stage") == 4
    assert ">head<" in shown.pictures[1].svg


def test_refusals():
    with pytest.raises(ValidationError, match="repeat a value"):
        SensitivitySpec(kind="sensitivity", sparsities=(0.5, 0.5))
    with pytest.raises(ValidationError, match="hold only 0"):
        SensitivitySpec(kind="sensitivity", sparsities=(0.0,))
