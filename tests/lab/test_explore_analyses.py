"""The section of analyses: every part against the analysis it stands for, stopped runs, and the page."""

from __future__ import annotations

import json
import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from secateur.analysis.feature_variance import feature_variance, variance_ratio
from secateur.analysis.gradient_flow import gradient_flow
from secateur.lab.context import Options
from secateur.lab.explore import analyses
from secateur.lab.explore.analyses_spec import AnalysesSpec, What
from secateur.lab.explore.mc_dropout import mc_dropout
from secateur.lab.explore.recipe import ExploreRecipe
from secateur.lab.explore.session import Session
from secateur.lab.listener import Interrupted, Listener
from secateur.lab.report.explore.analyses import view
from secateur.variants import NoisyPrune, UnitMasks, Workbench

EVERY = What.__args__


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    recipe = ExploreRecipe.model_validate(
        {
            "name": "small",
            "data": {"name": "digits", "subset": 300},
            "model": {"name": "digits_cnn", "kwargs": {"widths": [4, 6, 8]}},
            "train": {"duration": "3ep", "batch_size": 50},
            "judge": {"images": 60},
            "explore": [{"kind": "noise", "sigmas": [0.1], "sparsities": [0.5]}],
        }
    )
    session = Session(recipe, Options(out=tmp_path_factory.mktemp("out"), device="cpu"))
    session.train()
    return session


def _spec(**changes):
    given = {"kind": "analyses", "what": EVERY, "images": 100, "sigmas": (0.0, 0.05), "sparsities": (0.5, 0.9)}
    return AnalysesSpec.model_validate({**given, "variants": 2, "passes": (2, 4), **changes})


def _section(spec, found):
    return json.loads(json.dumps({"kind": spec.kind, "title": "Inside", "spec": spec.model_dump(mode="json"), **found}))


@pytest.fixture(scope="module")
def found(session, tmp_path_factory):
    before = {n: p.clone() for n, p in session.network.state_dict().items()}
    found = analyses.run(session, _spec(), tmp_path_factory.mktemp("stage"))
    assert all(torch.equal(p, before[n]) for n, p in session.network.state_dict().items())
    assert not session.network.training
    return json.loads(json.dumps(found, allow_nan=False))


def _part(found, what):
    (part,) = (part for part in found["parts"] if part["what"] == what)
    return part


def _cell(part, sigma, sparsity):
    (cell,) = (c for c in part["cells"] if (c.get("sigma", 0.0), c["sparsity"]) == (sigma, sparsity))
    return cell


def test_feature_variance_and_gradient_flow(session, found):
    batches, bench = session.training_images(100), session.bench()
    dense = feature_variance(session.network, batches)
    with bench.variant(NoisyPrune(0.0, 0.9)) as model:
        ratio = variance_ratio(feature_variance(model, batches), dense)
        flows = [gradient_flow(model, batches, masked=masked).norm for masked in (False, True)]
    cell = _cell(_part(found, "feature_variance"), 0.0, 0.9)
    assert cell["mean"] == ratio.mean
    assert list(cell["layers"].values()) == list(ratio.layers.values())
    assert cell["networks"] == 1
    noisy = _cell(_part(found, "feature_variance"), 0.05, 0.9)
    assert noisy["networks"] == 2
    assert noisy["low"] <= noisy["high"]
    cell = _cell(_part(found, "gradient_flow"), 0.0, 0.9)
    assert [*cell["all"], *cell["kept"]] == pytest.approx(flows)
    assert cell["kept"][0] < cell["all"][0]
    assert len(_cell(_part(found, "gradient_flow"), 0.05, 0.5)["all"]) == 2


def test_masks_and_weights(session, found):
    part = _part(found, "weight_cdf")
    weights = torch.cat([session.network.get_parameter(t.name).detach().flatten() for t in session.targets])
    at = part["sigmas"].index(0.05)
    assert part["shares"][at] == pytest.approx(float((weights.abs().double() < 0.05).double().mean()))
    cells = _part(found, "mask_overlap")["cells"]
    assert [(c["sigma"], c["sparsity"]) for c in cells] == [(0.05, 0.5), (0.05, 0.9)]
    kept = []
    for seed in range(2):
        with session.bench().variant(NoisyPrune(0.05, 0.9, seed)) as model:
            kept.append(torch.cat([model.get_parameter(t.name).detach().flatten() != 0 for t in session.targets]))
    jaccard = int((kept[0] & kept[1]).sum()) / int((kept[0] | kept[1]).sum())
    assert cells[1]["kept"] == [pytest.approx(jaccard)]
    assert 0 < cells[1]["kept"][0] < 1
    assert cells[1]["by_chance"] == pytest.approx(0.1 / 1.9)
    collapse = _part(found, "collapse")["cells"]
    assert {c["seed"] for c in collapse} == {0, 1}
    (cell,) = (c for c in collapse if (c["sigma"], c["sparsity"], c["seed"]) == (0.05, 0.9, 1))
    with session.bench().variant(NoisyPrune(0.05, 0.9, 1)) as model:
        shares = {t.module: (model.get_parameter(t.name) != 0).double().mean() for t in session.targets}
    assert cell["layers"] == {layer: pytest.approx(float(share)) for layer, share in shares.items()}


def test_second_order_and_spread(session, found, tmp_path):
    part = _part(found, "hessian")
    for cell in part["cells"]:
        assert cell["predicted"] == pytest.approx(cell["value"] / 2 - cell["slope"])
        assert sum(cell["layers"].values()) == pytest.approx(cell["value"])
    # So little taken away that second order is nearly all of it.
    little = analyses.run(session, _spec(what=["hessian"], sparsities=[0.02]), tmp_path)
    (cell,) = _part(little, "hessian")["cells"]
    assert cell["measured"] == pytest.approx(cell["predicted"], rel=0.2)
    assert cell["predicted"] != 0
    cell = _cell(_part(found, "spread"), 0.05, 0.5)
    assert cell["networks"] == 2
    assert cell["lowest"] <= cell["mean"] <= cell["highest"]


def test_mc_dropout_by_masks_and_by_dropout(session, found, monkeypatch):
    part = _part(found, "mc_dropout")
    assert part["noise"] == "unit masks"
    targets = [t.name for t in session.targets if t.module != "head"]
    from secateur.core.targets import find_targets

    bench = Workbench(session.network, find_targets(session.network, exclude=["head"]), batches=session.scored)
    assert bench.targets.names == targets
    inputs, labels = (torch.cat(parts) for parts in zip(*session.judged, strict=True))
    total = 0
    for seed in range(2):
        with bench.variant(UnitMasks(0.1, seed)) as model, torch.no_grad():
            total = total + model(inputs).double().softmax(1)
    shares = total / 2
    entropy = -(shares * shares.clamp_min(1e-300).log()).sum(1)
    assert part["rows"][0]["entropy"] == pytest.approx(float(entropy.mean()), rel=1e-4)
    assert part["rows"][0]["right"] == int((shares.argmax(1) == labels).sum())

    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10)).eval()
    monkeypatch.setitem(session.__dict__, "network", network)
    again = mc_dropout(session, _spec())
    assert again["noise"] == "dropout"
    assert again == mc_dropout(session, _spec())
    assert all(0 < row["entropy"] <= math.log(10) for row in again["rows"])


def test_parts_that_are_done_are_not_done_again(session, tmp_path, monkeypatch):
    spec = _spec(what=["weight_cdf", "gradient_flow"])

    class Stopping(Listener):
        def advanced(self, step, note):
            self.stop = note == "gradient_flow"

    monkeypatch.setattr(session.context, "listener", Stopping())
    with pytest.raises(Interrupted):
        analyses.run(session, spec, tmp_path)
    assert (tmp_path / "weight_cdf.json").is_file()
    monkeypatch.setattr(session.context, "listener", Listener())
    monkeypatch.setitem(analyses._PARTS, "weight_cdf", None)
    assert [part["what"] for part in analyses.run(session, spec, tmp_path)["parts"]] == ["weight_cdf", "gradient_flow"]


def test_the_page(found):
    shown = view(_section(_spec(), found), "inside")
    for begin in ("Feature variance, 90 %", "Gradient flow, 90 %", "Noise of sigma 0.05", "Masks of 2", "Second order"):
        assert any(line.startswith(begin) for line in shown.lines), begin
    names = [picture.name for picture in shown.pictures]
    assert len(set(names)) == len(names) == 13
    for picture in shown.pictures:
        assert "<svg" in picture.svg
        assert picture.png
        assert "mathdefault" not in picture.svg
    assert all(len(row) == len(table.head) for table in shown.tables for row in table.rows)
    assert {"Feature variance, pruned over unpruned", "Gradient flow", "Accuracy over noises"} <= {
        table.title for table in shown.tables
    }


def test_alarms_and_what_cannot_be_had():
    alarm = {"sigma": 0.0, "sparsity": 0.9, "seed": 0, "layers": {"conv3": 0.0, "head": 0.5}}
    empty = [{"layer": "conv3", "kept": 0, "of": 50, "reason": "empty"}]
    found = {
        "criterion": "magnitude",
        "layers": ["conv3", "head"],
        "weights": 100,
        "images": 10,
        "count": 10,
        "parts": [
            {"what": "collapse", "thin": 0.01, "cells": [{**alarm, "found": empty}], "not_followed": "attention"},
            {"what": "hessian", "cells": [], "none": "a layer has none"},
            {"what": "mask_overlap", "cells": []},
            {"what": "weight_cdf", "sigmas": [0.1], "asked": [0.1], "shares": None, "layers": {}, "counted": 0},
        ],
    }
    shown = view(_section(_spec(), found), "x")
    assert shown.lines[0] == 'Alarm, 90 % without noise: "conv3" is empty in 1 of 1 network.'
    assert "not to be had (a layer has none)" in shown.lines[1]
    assert any("Paths were not followed: attention" in note for note in shown.notes)
    assert [picture.name for picture in shown.pictures] == ["x-collapse"]
    assert [table.title for table in shown.tables] == ["Layers with too little left"]


def test_refusals():
    with pytest.raises(ValidationError, match="give a sigma above 0"):
        _spec(what=["mask_overlap"], sigmas=[0.0])
    with pytest.raises(ValidationError, match="variants must be 2"):
        _spec(what=["mask_overlap"], variants=1)
    with pytest.raises(ValidationError, match="what repeat"):
        _spec(what=["spread", "spread"])
    with pytest.raises(ValidationError, match="Input should be"):
        _spec(what=["feature_varianc"])
