"""The section on the greedy oracle: orders as they should be, paired comparisons, and what the page says."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from secateur.core.statistics import paired_examples
from secateur.lab.context import Options
from secateur.lab.explore import oracle
from secateur.lab.explore.oracle_spec import OracleSpec
from secateur.lab.explore.recipe import ExploreRecipe
from secateur.lab.explore.session import Session
from secateur.lab.report.explore.oracle import view
from secateur.variants import Workbench
from secateur.variants.greedy import greedy_oracle
from secateur.variants.kinds import DropUnits

UNITS = {"conv1": 3, "conv2": 4, "conv3": 5}


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    recipe = ExploreRecipe.model_validate(
        {
            "name": "small",
            "data": {"name": "digits", "subset": 300},
            "model": {"name": "digits_cnn", "kwargs": {"widths": [3, 4, 5]}},
            "train": {"duration": "4ep", "batch_size": 50},
            "judge": {"images": 60},
            "explore": [{"kind": "noise", "sigmas": [0.1], "sparsities": [0.5]}],
        }
    )
    session = Session(recipe, Options(out=tmp_path_factory.mktemp("out"), device="cpu"))
    session.train()
    return session


def _spec(**changes):
    return OracleSpec(kind="oracle", images=80, points=6, random=2, **changes)


def _section(spec, found):
    return json.loads(json.dumps({"kind": spec.kind, "title": "Oracle", "spec": spec.model_dump(mode="json"), **found}))


def _targets(session):
    from secateur.core.targets import find_targets

    return find_targets(session.network, exclude=["@last"])


def test_the_orders_and_their_comparison(session, tmp_path):
    spec = _spec()
    found = oracle.run(session, spec, tmp_path)
    assert found["layers"] == UNITS
    targets = _targets(session)
    bench = Workbench(session.network, targets, batches=session.scored)
    greedy = greedy_oracle(bench, session.training_images(80), until=0.1)
    # 12 units, of which a tenth, rounded up, would be 2; every layer keeps one.
    assert [(s["layer"] + ".weight", s["unit"]) for s in found["order"]] == list(greedy.order)
    assert len(found["order"]) == 9
    assert found["tried"] == greedy.cost.examples // 80 - 1
    assert found["dropped"] == [0, 2, 4, 5, 7, 9]
    assert [curve["label"] for curve in found["curves"]] == ["greedy oracle", "mean_activation", "magnitude", "random"]
    assert found["curves"][0]["loss"][1] == pytest.approx(found["order"][1]["loss"], abs=1e-6)
    # The three begin with one network.
    assert len({curve["accuracy"][0] for curve in found["curves"]}) == 1
    norms = [
        (float(torch.linalg.vector_norm(session.network.get_parameter(t.name).detach()[u])), t.name, u)
        for t in targets
        for u in range(t.units)
    ]
    order = [(name, unit) for _, name, unit in sorted(norms)]
    assert oracle._ranked(session, targets, {"name": "magnitude"}, 0) == order
    with torch.no_grad():
        rows = []
        for units in (greedy.order[:2], order[:2]):
            with bench.variant(DropUnits(tuple(units))) as model:
                rows.append(torch.cat([model(x).argmax(1) == y for x, y in session.judged]).numpy())
    got = paired_examples(*rows)
    item = found["curves"][2]["behind"][1]
    assert (item["mean"], item["low"], item["p"]) == (got.mean, got.low, got.p)
    shown = view(_section(spec, found), "oracle")
    assert shown.lines[0].startswith("With 5 of 12 units dropped, halfway, the greedy oracle is right in ")
    assert [picture.name for picture in shown.pictures] == ["oracle-accuracy", "oracle-loss"]
    assert all("<svg" in picture.svg and picture.png for picture in shown.pictures)
    assert [len(table.rows) for table in shown.tables] == [6, 9]


def test_random_orders_and_what_stays(session):
    targets = _targets(session)
    orders = [oracle._random(targets, _spec(min_keep=2), number) for number in range(3)]
    for order in orders:
        assert len(order) == len(set(order)) == 6
        left = {t.name: t.units - sum(name == t.name for name, _ in order) for t in targets}
        assert set(left.values()) == {2}
    assert orders[0] != orders[1]
    assert orders[0] == oracle._random(targets, _spec(min_keep=2), 0)


def test_steps_and_two_of_one_criterion(session, tmp_path):
    spec = _spec(steps=2, criteria=({"name": "magnitude", "order": 1}, {"name": "magnitude", "order": 2}))
    found = oracle.run(session, spec, tmp_path)
    assert found["dropped"] == [0, 1, 2]
    assert [curve["label"] for curve in found["curves"][1:]] == ["magnitude (order 1)", "magnitude (order 2)", "random"]
    assert oracle.run(session, spec, tmp_path) == found
    assert np.isfinite(found["whole_loss"])


def test_long_orders_are_cut_short_on_the_page():
    item = {"mean": 0.1, "low": None, "high": None, "p": None}
    curve = {"label": "greedy oracle", "orders": 1, "accuracy": [0.9, 0.5], "low": [0.8, 0.4], "high": [1.0, 0.6]}
    curve["loss"] = [0.1, 0.7]
    other = {**curve, "label": "random", "orders": 3, "behind": [item, item]}
    found = {
        "count": 100,
        "searched": 50,
        "layers": {"a": 200},
        "order": [{"layer": "a", "unit": at, "loss": 0.1} for at in range(60)],
        "dropped": [0, 60],
        "curves": [curve, other],
        "tried": 1000,
    }
    shown = view(_section(_spec(), found), "x")
    assert shown.tables[1].title == "Order of removal, the first 50 of 60"
    assert "random (mean of 3): 50.0 % there; the oracle minus it is +10.0 points (no interval" in shown.lines[1]
    assert "ahead beyond chance at 0, behind at 0" in shown.lines[1]


def test_refusals():
    with pytest.raises(ValidationError, match="give one"):
        _spec(steps=1, until=0.5)
    with pytest.raises(ValidationError, match="criteria repeat one"):
        _spec(criteria=({"name": "magnitude"}, {"name": "magnitude"}))
    with pytest.raises(ValidationError, match="nothing to compare with"):
        OracleSpec(kind="oracle", random=0, criteria=())
