"""The dependence between weights, or layers, against the Hessian as torch computes it whole."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.func import functional_call

from secateur.core.masks import Masks
from secateur.errors import UsageError
from secateur.lab.context import Options
from secateur.lab.explore.analyses import run
from secateur.lab.explore.analyses_spec import AnalysesSpec
from secateur.lab.explore.dependence import dependence
from secateur.lab.explore.recipe import ExploreRecipe
from secateur.lab.explore.run import plan_exploration
from secateur.lab.explore.session import Session
from secateur.lab.report.explore.analyses import view
from secateur.lab.report.explore.dependence import dependence_pictures

BASE = {
    "name": "tiny",
    "data": {"name": "digits", "subset": 300},
    "model": {"name": "mlp", "kwargs": {"hidden": [6, 5]}},
    "train": {"duration": "2ep", "batch_size": 50},
    "judge": {"images": 60},
}


def _spec(**changes):
    return AnalysesSpec.model_validate({"kind": "analyses", "what": ["weight_dependence"], "images": 80, **changes})


def _recipe(**changes):
    section = {"kind": "analyses", "what": ["weight_dependence"], "images": 80, **changes}
    return ExploreRecipe.model_validate({**BASE, "explore": [section]})


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    session = Session(_recipe(), Options(out=tmp_path_factory.mktemp("out"), device="cpu"))
    session.train()
    return session


def _whole(session, names, count):
    """w_i H_ij w_j over those parameters by one dense Hessian, and where each begins."""
    inputs, labels = (torch.cat(parts) for parts in zip(*session.training_images(count), strict=True))
    weights = {n: session.network.get_parameter(n).detach().double() for n in names}
    state = {n: v.double() for n, v in session.network.state_dict().items()}

    def loss(flat):
        parts = dict(zip(names, flat.split([w.numel() for w in weights.values()]), strict=True))
        given = {n: p.view(weights[n].shape) for n, p in parts.items()}
        outputs = functional_call(session.network, {**state, **given}, (inputs.double(),))
        return torch.nn.functional.cross_entropy(outputs, labels)

    flat = torch.cat([w.flatten() for w in weights.values()])
    hessian = torch.autograd.functional.hessian(loss, flat)
    return (hessian * flat[:, None] * flat).numpy(), np.cumsum([0, *(w.numel() for w in weights.values())])


def _names(session):
    return [target.name for target in session.targets]


def _kept(session):
    threshold = {t.name: session.network.get_parameter(t.name).detach().abs().median() for t in session.targets}
    masks = {n: session.network.get_parameter(n).detach().abs() > m for n, m in threshold.items()}
    return lambda sparsity: Masks(masks)


def test_pairs_of_weights(session):
    last = _names(session)[-2:]
    paired = [session.targets[name].module for name in last]
    found = dependence(session, _spec(paired=paired, sparsities=[0.5]), _kept(session))
    expected, ends = _whole(session, last, 80)
    size = np.abs(expected)
    assert found["of"] == "weights"
    assert found["layers"] == paired
    assert found["weights"] == len(expected)
    assert found["own"] == pytest.approx(np.trace(size) / size.sum(), rel=1e-3)
    within = sum(size[a:b, a:b].sum() for a, b in pairwise(ends))
    assert found["within"] == pytest.approx(within / size.sum(), rel=1e-3)
    # So few weights that none share a cell.
    assert np.allclose(found["matrix"], size, rtol=2e-3, atol=size.max() * 1e-5)
    assert found["starts"] == [0, ends[1]]
    masks = _kept(session)(0.5)
    keep = torch.cat([masks[n].flatten() for n in last]).numpy()
    (cell,) = found["cells"]
    assert cell["removed"] == pytest.approx(size[np.ix_(~keep, ~keep)].sum() / size.sum(), rel=1e-3)
    assert cell["kept"] == pytest.approx(size[np.ix_(keep, keep)].sum() / size.sum(), rel=1e-3)
    assert cell["removed"] + cell["across"] + cell["kept"] == pytest.approx(1.0)
    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(2000):
        other = generator.permutation(keep)
        drawn.append(2 * size[np.ix_(other, ~other)].sum() / size.sum())
    assert cell["across_by_chance"] == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / len(drawn) ** 0.5)


def test_many_weights_share_cells_within_their_layer(session):
    found = dependence(session, _spec(), _kept(session))
    expected, ends = _whole(session, _names(session), 80)
    assert len(expected) > 2 * 120
    assert len(found["matrix"]) <= 120 + len(found["layers"])
    starts = [*found["starts"], len(found["matrix"])]
    shares = [(b - a) / len(found["matrix"]) for a, b in pairwise(starts)]
    assert shares == pytest.approx(np.diff(ends) / ends[-1], abs=0.03)
    # Cells are means, so that each layer's mean is theirs, but for cells of unequal size.
    mean = np.abs(expected)[: ends[1], : ends[1]].mean()
    assert np.mean([row[: starts[1]] for row in found["matrix"][: starts[1]]]) == pytest.approx(mean, rel=0.05)


def test_too_many_weights_are_paired_by_layer(session, monkeypatch):
    from secateur.lab.explore import dependence as module

    monkeypatch.setattr(module, "_WEIGHTS", 20)
    found = module.dependence(session, _spec(), _kept(session))
    expected, ends = _whole(session, _names(session), 80)
    blocks = [[expected[a:b, c:d].sum() for c, d in pairwise(ends)] for a, b in pairwise(ends)]
    assert found["of"] == "layers"
    assert np.allclose(found["matrix"], blocks, rtol=1e-3, atol=1e-6)


def test_the_page(session, tmp_path, monkeypatch):
    spec = _spec(sparsities=[0.5, 0.9])
    section = json.loads(json.dumps({"title": "Inside", **run(session, spec, tmp_path / "a")}, allow_nan=False))
    shown = view(section, "inside")
    text = " ".join(shown.lines)
    assert "are each weight's own" in text
    assert "90 % removed: " in text
    (picture,) = shown.pictures
    assert picture.name == "inside-weight-dependence"
    assert [row[0] for row in shown.tables[0].rows] == ["50 %", "90 %"]
    from secateur.lab.explore import dependence as module

    monkeypatch.setattr(module, "_WEIGHTS", 20)
    section = json.loads(json.dumps({"title": "Inside", **run(session, spec, tmp_path / "b")}))
    assert 'the two that depend most on each other are "' in " ".join(view(section, "inside").lines)


@pytest.mark.parametrize("weights", [20, 2000])
def test_what_cannot_be_had(session, monkeypatch, weights):
    from secateur.lab.explore import dependence as module

    monkeypatch.setattr(module, "_WEIGHTS", weights)
    # Nothing is learned from a network whose weights are all zero.
    with torch.no_grad():
        before = {n: p.clone() for n, p in session.network.named_parameters()}
        for parameter in session.network.parameters():
            parameter.zero_()
    try:
        found = dependence(session, _spec(), _kept(session))
    finally:
        with torch.no_grad():
            for name, parameter in session.network.named_parameters():
                parameter.copy_(before[name])
    assert found["of"] == "nothing"
    assert found["none"]
    assert dependence_pictures({"what": "weight_dependence", **found}, "x") == []
    section = {"title": "T", "criterion": "magnitude", "layers": [], "weights": 1, "images": 2}
    shown = view({**section, "parts": [{"what": "weight_dependence", **found}]}, "x")
    assert "not to be had" in shown.lines[0]


def test_refusals(tmp_path):
    options = Options(tmp_path, device="cpu")
    with pytest.raises(ValidationError, match="paired is for weight_dependence"):
        AnalysesSpec.model_validate({"kind": "analyses", "what": ["spread"], "paired": ["head"]})
    with pytest.raises(UsageError, match="matches no"):
        plan_exploration(_recipe(paired=["haed"]), options)
    left_out = ExploreRecipe.model_validate({**_recipe(paired=["head"]).model_dump(mode="json"), "exclude": ["head"]})
    with pytest.raises(UsageError, match='paired: "head" is none of the layers that variants change'):
        plan_exploration(left_out, options)
    wide = {"model": {"name": "mlp", "kwargs": {"hidden": [40]}}}
    recipe = ExploreRecipe.model_validate({**_recipe(paired=["*"]).model_dump(mode="json"), **wide})
    with pytest.raises(UsageError, match=r"paired: these layers have 2960 weights, expected at most 2000; name fewer"):
        plan_exploration(recipe, options)
