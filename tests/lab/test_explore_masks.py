"""Pruning along unit masks in the lab: rates, seeds, control and race; and what the report says of them."""

from __future__ import annotations

import json
import math

import pytest
import torch
from pydantic import ValidationError

from secateur.errors import UsageError
from secateur.lab.context import Options
from secateur.lab.explore.mask_cut import cut_by_mask
from secateur.lab.explore.masks import run
from secateur.lab.explore.masks_spec import MasksSpec
from secateur.lab.explore.recipe import ExploreRecipe
from secateur.lab.explore.session import Session
from secateur.lab.listener import Interrupted, Listener
from secateur.lab.report.explore.masks import view
from secateur.regularizers.mask_pool import unit_mask
from secateur.surgery import load_pruned
from secateur.variants import UnitMasks, UnitsByCriterion

THESIS = {"name": "thesis_cnn", "kwargs": {"widths": [8, 12, 12], "hidden": 16}}
POOL = {"name": "mask_pool", "drop_rate": 0.5, "pool": 3}


def _session(out, **changed):
    recipe = {
        "name": "masks",
        "data": {"name": "digits", "subset": 300},
        "model": THESIS,
        "train": {"duration": "2ep", "checkpoint_every": "2ep", "evaluate_every": "2ep"},
        "regularizer": POOL,
        "exclude": ["@last"],
        "judge": {"images": 120},
        "explore": [{"kind": "noise", "sigmas": [0.1], "sparsities": [0.5]}],
        **changed,
    }
    session = Session(ExploreRecipe.model_validate(recipe), Options(out=out, device="cpu"))
    session.train()
    return session


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return _session(tmp_path_factory.mktemp("masks"))


def _spec(**changed):
    return MasksSpec.model_validate({"kind": "masks", "rates": [0.0, 0.3, 0.6], "unseen": 4, **changed})


def _section(spec, result):
    return json.loads(
        json.dumps({"kind": "masks", "title": None, "spec": spec.model_dump(mode="json"), **result}, allow_nan=False)
    )


@pytest.fixture(scope="module")
def raced(session, tmp_path_factory):
    folder = tmp_path_factory.mktemp("raced")
    before = {n: t.clone() for n, t in session.network.state_dict().items()}
    spec = _spec(race={"rate": 0.4, "candidates": 30, "first": 20, "random": 6})
    result = run(session, spec, folder)
    assert all(torch.equal(before[n], t) for n, t in session.network.state_dict().items())
    assert not session.network.training
    return spec, result, folder


def test_known_masks_are_the_pool_and_others_are_not(raced):
    _, result, _ = raced
    assert result["known"] == [0, 1, 2]
    assert result["unseen"] == [3, 4, 5, 6]
    assert {k: v for k, v in result["trained"].items() if k != "layers"} == {"drop_rate": 0.5, "pool": 3, "min_keep": 1}
    assert set(result["trained"]["layers"]) >= {layer["name"] for layer in result["layers"]}
    assert [r["rate"] for r in result["rates"]] == [0.0, 0.3, 0.6]
    assert result["images"] == 120


def test_every_number_is_that_of_its_variant(session, raced):
    _, result, _ = raced
    bench = session.bench()
    dense = session.accuracy(session.network, session.judged)
    assert result["dense"] == pytest.approx(dense[0] / dense[1])
    for rate in result["rates"]:
        for kind in ("known", "unseen"):
            part = rate[kind]
            for seed, accuracy, control, removed in zip(
                result[kind], part["accuracies"], part["control"]["accuracies"], part["removed"], strict=True
            ):
                with bench.variant(UnitMasks(rate["rate"], seed)) as model:
                    assert accuracy == pytest.approx(session.accuracy(model, session.judged)[0] / 120)
                gone = {t.name: int((~unit_mask(seed, t.name, t.units, rate["rate"])).sum()) for t in session.targets}
                with bench.variant(UnitsByCriterion(removed=gone)) as model:
                    assert control == pytest.approx(session.accuracy(model, session.judged)[0] / 120)
                if rate["rate"] < 0.5:
                    cut = cut_by_mask(
                        session.network, rate["rate"], seed, session.context.example(16), targets=session.targets
                    )
                    assert removed == pytest.approx(cut.removed)
            assert part["median"] == pytest.approx(sorted(part["accuracies"])[1]) or kind == "unseen"
        with bench.variant(UnitsByCriterion(rate["rate"])) as model:
            assert rate["l2"]["accuracy"] == pytest.approx(session.accuracy(model, session.judged)[0] / 120)


def test_at_rate_zero_nothing_happens(raced):
    _, result, _ = raced
    zero = result["rates"][0]
    assert set(zero["known"]["accuracies"]) == {result["dense"]} == {zero["l2"]["accuracy"]}
    assert set(zero["unseen"]["removed"]) == {0.0}
    assert zero["known_against_unseen"] is None
    assert zero["proof"]["max_abs_diff"] == 0.0
    assert zero["proof"]["parameters_before"] == zero["proof"]["parameters_after"] == result["parameters"]


def test_the_cut_is_proven_and_tests_are_adjusted(raced):
    _, result, _ = raced
    proof = result["rates"][1]["proof"]
    assert proof["max_abs_diff"] <= 1e-5 * proof["scale"]
    assert proof["parameters_after"] < proof["parameters_before"]
    tests = [r["known_against_unseen"] for r in result["rates"][1:]]
    assert sorted(t["p_adjusted"] for t in tests)[0] == pytest.approx(min(1.0, 2 * min(t["p"] for t in tests)))
    assert all(t["p_adjusted"] >= t["p"] for t in tests)
    tests = [r[kind]["against_control"] for r in result["rates"][1:] for kind in ("known", "unseen")]
    tests = sorted((t["p"], t["p_adjusted"]) for t in tests if t["p"] is not None)
    assert tests[0][1] == pytest.approx(min(1.0, len(tests) * tests[0][0]))
    assert tests[-1][1] >= tests[-1][0]
    assert "p_adjusted" not in result["rates"][0]["known"]["against_control"]


def test_the_winner_of_the_race_is_measured_elsewhere_cut_and_saved(session, raced):
    _, result, folder = raced
    race = result["race"]
    assert 0 <= race["seed"] < 30
    assert race["known"] == (race["seed"] < 3)
    assert race["value"] == pytest.approx(race["judged"]["winner"])
    assert race["rungs"][0] == {"images": 20, "alive": 30}
    bench = session.bench()
    scores = []
    for seed in range(36):
        with bench.variant(UnitMasks(0.4, seed)) as model:
            scores.append([session.accuracy(model, images) for images in (session.judged, session.held)])
    assert race["judged"]["winner"] == pytest.approx(max(s[0][0] for s in scores[:30]) / 120)
    held = session.counts[1]
    assert race["held"]["images"] == held
    assert race["held"]["winner"] == pytest.approx(scores[race["seed"]][1][0] / held)
    assert race["held"]["random_accuracies"] == pytest.approx([s[1][0] / held for s in scores[30:]])
    assert race["held"]["ahead"]["mean"] == pytest.approx(race["held"]["winner"] - race["held"]["random"])
    delivered = race["delivered"]
    assert delivered["accuracy"] == race["held"]["winner"]
    assert delivered["max_abs_diff"] <= delivered["tolerance"] * delivered["scale"]
    assert delivered["reload_max_abs_diff"] == 0.0
    again = load_pruned(folder / "best-mask.safetensors")
    assert sum(p.numel() for p in again.parameters()) == delivered["parameters_after"] < result["parameters"]
    assert session.accuracy(again, session.held)[0] / held == delivered["accuracy"]


def test_a_second_run_reads_what_the_first_wrote(session, raced):
    spec, result, folder = raced
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.json*")}
    assert set(sizes) == {"masks.jsonl", "race.json", "race-held.jsonl", "race-judged.jsonl"}
    assert run(session, spec, folder) == result
    assert sizes == {path.name: path.stat().st_size for path in folder.glob("*.json*")}


def test_known_masks_can_be_kept_out_of_the_race(session, tmp_path):
    spec = _spec(rates=[0.3], unseen=1, race={"rate": 0.4, "candidates": 5, "first": 20, "random": 2, "known": False})
    race = run(session, spec, tmp_path)["race"]
    assert race["seed"] in range(3, 8)
    assert not race["known"]
    assert not race["known_took_part"]


def test_it_stops_when_asked(session, tmp_path):
    class Impatient(Listener):
        def advanced(self, step, note):
            self.stop = True

    before, session.context.listener = session.context.listener, Impatient()
    try:
        with pytest.raises(Interrupted):
            run(session, _spec(), tmp_path)
    finally:
        session.context.listener = before
    assert run(session, _spec(), tmp_path)["images"] == 120


def test_a_network_without_a_pool_has_no_known_masks(tmp_path):
    session = _session(
        tmp_path,
        regularizer={"name": "none"},
        judge={"images": 60, "recalibrate": 40},
        model={"name": "digits_cnn", "kwargs": {"widths": [4, 4, 8]}},
        exclude=["@last"],
    )
    spec = _spec()
    result = run(session, spec, tmp_path)
    assert result["known"] == []
    assert result["trained"] is None
    assert result["unseen"] == [0, 1, 2, 3]
    assert result["rates"][1]["known"] is None
    shown = view(_section(spec, result), "x")
    assert any("no known masks" in note for note in shown.notes)
    assert any("40 training images" in note for note in shown.notes)
    with pytest.raises(UsageError, match=r"masks.known: seed 1 is none that .* under none"):
        run(session, _spec(known=[1]), tmp_path / "other")


def test_what_cannot_be_cut_is_said_before_anything_is_evaluated(tmp_path):
    session = _session(tmp_path, exclude=[])
    with pytest.raises(UsageError, match=r'layer "head" cannot be cut: .*; exclude the layer'):
        run(session, _spec(), tmp_path / "section")
    assert not (tmp_path / "section").exists()


def test_seeds_outside_the_pool_are_not_known(session, tmp_path):
    with pytest.raises(UsageError, match=r"seed 3 is none .* whose pool has 3"):
        run(session, _spec(known=[0, 3]), tmp_path)
    result = run(session, _spec(known=[1], unseen=2, rates=[0.5]), tmp_path)
    assert result["known"] == [1]
    assert result["unseen"] == [3, 4]


@pytest.mark.parametrize("which", ["all", "inner"])
def test_residual_networks(which, tmp_path):
    resnet = {"name": "resnet20", "kwargs": {"widths": [8, 8, 8]}}
    data, train = {"name": "digits", "subset": 64}, {"duration": "1ep"}
    session = _session(tmp_path, model=resnet, data=data, train=train, judge={"images": 40})
    result = run(session, _spec(groups=which, rates=[0.3], unseen=2), tmp_path)
    names = [layer["name"] for layer in result["layers"]]
    assert ("conv1" in names) == (which == "all") == bool(result["coupled"])
    assert len(names) == (9 if which == "inner" else len(session.targets))
    (rate,) = result["rates"]
    assert min(rate["unseen"]["removed"]) > 0
    assert rate["proof"]["max_abs_diff"] <= 1e-5 * rate["proof"]["scale"]
    notes = " ".join(view(_section(_spec(groups=which), result), "x").notes)
    assert ("left whole" if which == "inner" else "make units together") in notes


def test_the_view_says_what_was_found(raced):
    spec, result, _ = raced
    shown = view(_section(spec, result), "masks")
    assert shown.title == "Pruning along masks"
    assert [p.name for p in shown.pictures] == ["masks-masks", "masks-sizes", "masks-race"]
    assert all(p.svg.lstrip().startswith("<?xml") and "<svg" in p.svg and p.caption and p.alt for p in shown.pictures)
    assert [t.title for t in shown.tables] == ["Top-1 by drop rate", "What the cuts remove", "The race"]
    assert all(len(row) == len(t.head) for t in shown.tables for row in t.rows)
    text = " ".join((*shown.lines, *shown.notes))
    assert "nan" not in text
    assert "None" not in text
    assert "Mann-Whitney" in text
    assert "flatters" in text
    assert "One network" in text


def _part(values):
    summary = {
        "accuracies": values,
        "lowest": min(values),
        "median": sorted(values)[len(values) // 2],
        "highest": max(values),
    }
    against = {"mean": 0.0, "low": None, "high": None, "n": 1, "method": "no interval from one seed", "p": None}
    return {**summary, "removed": [0.5], "median_removed": 0.5, "control": summary, "against_control": against}


def test_the_view_needs_only_json_and_says_what_was_not_measured():
    section = {
        "kind": "masks",
        "title": "By hand",
        "spec": {"groups": "inner"},
        "images": 1000,
        "recalibrate": None,
        "trained": {"drop_rate": 0.5, "pool": 9, "min_keep": 1, "layers": ["a", "b", "head"]},
        "coupled": [],
        "layers": [{"name": "a", "units": 4}, {"name": "b", "units": 4}],
        "dense": 0.9,
        "known": [8],
        "unseen": [42],
        "rates": [
            {
                "rate": 0.9,
                "known": _part([0.6]),
                "unseen": _part([0.4]),
                "l2": {"accuracy": 0.5, "removed": 0.7},
                "known_against_unseen": {"medians": 0.2, "p": 1.0, "p_adjusted": 1.0, "test": "Mann-Whitney U test"},
                "proof": None,
            }
        ],
    }
    shown = view(section, "by-hand")
    assert shown.title == "By hand"
    text = " ".join((*shown.lines, *shown.notes))
    assert "masks it was trained with keep a median of 60.0 % (1 mask, 60.0 % to 60.0 %)" in text
    assert (
        "+20.0 points between the medians, p = 1 (Mann-Whitney U test; Holm over all rates): the difference is not"
        in text
    )
    assert "no interval" in text
    assert "too little is left" in text
    assert "residual sums are left whole" in text
    assert "differ in head" in text
    assert "not measured" in shown.tables[1].rows[0]
    assert len(shown.pictures) == 2


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rates": [0.5, 0.5]}, "rates repeat a value"),
        ({"known": [1, 1]}, "known repeat a value"),
        ({"rates": [0.0]}, "rates hold only 0"),
        ({"rates": [1.0]}, "less than 1"),
        ({"rates": [math.nan]}, "finite"),
        ({"unseen": 0}, "greater than or equal to 1"),
        ({"race": {"rate": 0.0}}, "greater than 0"),
        ({"groups": "outer"}, "'all' or 'inner'"),
    ],
)
def test_what_a_recipe_may_not_say(changed, said):
    with pytest.raises(ValidationError, match=said):
        _spec(**changed)


def test_defaults():
    spec = MasksSpec.model_validate({"kind": "masks", "race": {}})
    assert spec.rates == tuple(i / 10 for i in range(10))
    assert spec.race.candidates == 1000
    assert MasksSpec.model_validate(spec.model_dump(mode="json")) == spec
