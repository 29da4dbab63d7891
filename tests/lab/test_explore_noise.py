"""The noise section: its numbers by hand, images held back, stopped runs, and what the page says about it."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from secateur.core.statistics import above, holm, paired_examples
from secateur.errors import UsageError
from secateur.lab.context import Options
from secateur.lab.explore import noise
from secateur.lab.explore.recipe import ExploreRecipe
from secateur.lab.explore.session import Session
from secateur.lab.explore.specs import NoiseSpec
from secateur.lab.listener import Interrupted, Listener
from secateur.lab.report.explore.noise import LEVEL, pays, view
from secateur.variants import NoisyPrune, Workbench, evaluate_variants
from secateur.variants.noise import standard_normal


def _recipe(**changes):
    return ExploreRecipe.model_validate(
        {
            "name": "small",
            "data": {"name": "digits", "subset": 300},
            "model": {"name": "digits_cnn", "kwargs": {"widths": [4, 6, 8]}},
            "train": {"duration": "4ep", "batch_size": 50},
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


def _spec(**changes):
    return NoiseSpec.model_validate(
        {"kind": "noise", "sigmas": [0.1], "sparsities": [0.5], "variants": 3, "confirm": False, **changes}
    )


def _section(spec, found):
    return json.loads(json.dumps({"kind": spec.kind, "title": "Noise", "spec": spec.model_dump(mode="json"), **found}))


def _by_hand(session, sigma, sparsity, seed, mask_of_noisy=True, weights_noisy=True, batches=None):
    """Accuracy of a network pruned without the library: NumPy's arithmetic, the smallest weights of all set to zero."""
    model = copy.deepcopy(session.network)
    parameters = dict(model.named_parameters())
    own, noisy = {}, {}
    for target in session.targets:
        weight = parameters[target.name].detach().cpu().numpy()
        drawn = standard_normal(weight.size, seed, target.name).reshape(weight.shape)
        own[target.name] = weight.copy()
        noisy[target.name] = weight + drawn * np.float32(sigma)
    ranked = noisy if mask_of_noisy else own
    sizes = np.concatenate([np.abs(w).ravel() for w in ranked.values()])
    gone = np.argsort(sizes, kind="stable")[: int(sparsity * sizes.size)]
    keep = np.ones(sizes.size, dtype=bool)
    keep[gone] = False
    start = 0
    for name, weight in (noisy if weights_noisy else own).items():
        mask = keep[start : start + weight.size].reshape(weight.shape)
        start += weight.size
        parameters[name].data = torch.from_numpy(weight * mask)
    right = count = 0
    with torch.no_grad():
        for inputs, labels in session.judged if batches is None else batches:
            right += int((model(inputs).argmax(dim=1) == labels).sum())
            count += len(labels)
    return right / count


def test_cells_are_what_they_are_by_hand(session, tmp_path):
    spec = _spec(sigmas=[0.2, 0.0, 0.05], sparsities=[0.8, 0.4], variants=6, transfer=True, confirm=True)
    found = noise.run(session, spec, tmp_path)
    assert [(c["sigma"], c["sparsity"]) for c in found["cells"]] == [(0.05, 0.4), (0.2, 0.4), (0.05, 0.8), (0.2, 0.8)]
    assert [p["sparsity"] for p in found["plain"]] == [0.0, 0.4, 0.8]
    right, count = session.accuracy(session.network, session.judged)
    assert found["dense"] == found["plain"][0]["accuracy"] == right / count
    assert found["count"] == count == 60
    assert found["layers"] == ["conv1", "conv2", "conv3", "head"]
    for cell in found["cells"]:
        sigma, sparsity = cell["sigma"], cell["sparsity"]
        plain = _by_hand(session, 0.0, sparsity, 0)
        noisy = [_by_hand(session, sigma, sparsity, seed) for seed in range(6)]
        assert cell["plain"] == plain
        assert cell["accuracies"] == noisy
        assert cell["median"] == np.median(noisy)
        # The second smallest and the second largest do not enclose it often enough of six.
        assert (cell["median_low"], cell["median_high"]) == (min(noisy), max(noisy))
        assert cell["gain"] == pytest.approx(np.mean(noisy) - plain, abs=1e-12)
        assert cell["gain_low"] <= cell["gain"] <= cell["gain_high"]
        assert (cell["p_gain_seeds"], cell["test"]) == above(noisy, plain)
        assert cell["p_loss_seeds"] == above([-a for a in noisy], -plain)[0]
        assert cell["p_gain_images"] + cell["p_loss_images"] == pytest.approx(1.0)
        assert (cell["p_gain_images"] < 0.025) == (cell["gain_low"] > 0)
        assert (cell["p_loss_images"] < 0.025) == (cell["gain_high"] < 0)
        masks = [_by_hand(session, sigma, sparsity, seed, weights_noisy=False) for seed in range(6)]
        weights = [_by_hand(session, sigma, sparsity, seed, mask_of_noisy=False) for seed in range(6)]
        assert cell["transfer"]["noisy mask, plain weights"]["accuracies"] == masks
        assert cell["transfer"]["plain mask, noisy weights"]["accuracies"] == weights
    for side in ("gain", "loss"):
        worst = [max(c[f"p_{side}_seeds"], c[f"p_{side}_images"]) for c in found["cells"]]
        assert [c[f"p_{side}"] for c in found["cells"]] == holm(worst)
    best = max(found["cells"], key=lambda cell: cell["gain"])
    again = found["confirmed"]
    assert (again["sigma"], again["sparsity"], again["count"]) == (best["sigma"], best["sparsity"], 300)
    held = list(session.held)
    assert again["plain"] == _by_hand(session, 0.0, best["sparsity"], 0, batches=held)
    assert again["accuracies"] == [
        _by_hand(session, best["sigma"], best["sparsity"], s, batches=held) for s in range(6, 12)
    ]
    shown = view(_section(spec, found), "noise")
    assert shown.title == "Noise"
    assert [table.title for table in shown.tables][2] == "Masks exchanged, medians"
    assert all("<svg" in picture.svg and picture.png for picture in shown.pictures)
    assert any("300 test images held back" in line for line in shown.lines)


def test_each_layer_may_be_ranked_by_itself(session, tmp_path):
    found = noise.run(session, _spec(scope="tensor", variants=1), tmp_path)
    wanted = NoisyPrune(0.1, 0.5, 0, scope="tensor")
    (mean,) = evaluate_variants(session.bench(), [wanted], session.judged).means()
    assert found["cells"][0]["accuracies"] == [mean]
    assert found["cells"][0]["median_low"] is None, "one value encloses no median"
    assert found["confirmed"] is None


@pytest.mark.parametrize("variants", [5, 6])
def test_only_six_networks_enclose_their_median(session, tmp_path, variants):
    spec = _spec(variants=variants)
    found = noise.run(session, spec, tmp_path)
    (cell,) = found["cells"]
    assert (cell["median_low"] is None) is (variants < 6)
    shown = view(_section(spec, found), "x")
    assert (".." in shown.tables[1].rows[0][2]) is (variants == 6)


def test_images_that_judge_and_images_held_back(session):
    judged, held = list(session.judged), list(session.held)
    assert session.counts == (60, 300)
    images = [torch.cat([i for i, _ in part]) for part in (judged, held)]
    labels = [torch.cat([y for _, y in part]) for part in (judged, held)]
    seen = [{row.numpy().tobytes() for row in part} for part in images]
    everything = {row.numpy().tobytes() for i, _ in _all(session) for row in i}
    assert seen[0] | seen[1] == everything
    assert len(images[0]) + len(images[1]) == len(session.context.data.test_labels)
    # No image judges that is held back as well; equal pictures, of which there are none here, would not count.
    assert not seen[0] & seen[1]
    counts = torch.bincount(torch.cat(labels), minlength=10)
    drawn = torch.bincount(labels[0], minlength=10)
    assert (drawn - 60 * counts / counts.sum()).abs().max() <= 1, "every class in proportion"


def _all(session):
    data = session.context.data
    return list(session._batches(data.test_images, data.test_labels))


def test_held_out_images_may_judge(tmp_path):
    data = {"data": {"name": "digits", "subset": 300, "validation": 0.2}}
    options = Options(out=tmp_path, device="cpu")
    session = Session(_recipe(**data, judge={"source": "validation"}), options)
    assert session.counts == (len(session.context.data.validation_labels), 360)
    with pytest.raises(UsageError, match=r"judge\.images 361: the validation images are "):
        _ = Session(_recipe(**data, judge={"source": "validation", "images": 361}), options).counts


def test_some_test_images_are_left_for_the_report(tmp_path):
    session = Session(_recipe(judge={"images": 359}), Options(out=tmp_path, device="cpu"))
    with pytest.raises(
        UsageError, match=r"judge\.images 359: the test images are 360; leave some of them for the report"
    ):
        _ = session.counts


def test_a_stopped_run_goes_on_and_does_nothing_twice(session, tmp_path, monkeypatch):
    spec = _spec(sigmas=[0.05, 0.1], variants=4, confirm=True)
    whole = noise.run(session, spec, tmp_path / "whole")

    class Stopping(Listener):
        def advanced(self, step, note):
            self.stop = step >= 60 * 5

    monkeypatch.setattr(session.context, "listener", Stopping())
    with pytest.raises(Interrupted):
        noise.run(session, spec, tmp_path / "parts")
    lines = (tmp_path / "parts" / "variants.jsonl").read_text().splitlines()
    monkeypatch.setattr(session.context, "listener", Listener())
    rest = noise.run(session, spec, tmp_path / "parts")
    # The dense network, the plain one and eight with noise.
    assert rest["cost"]["made"] == 10 - (len(lines) - 1)
    assert whole["cost"]["made"] == 10
    whole["cost"] = rest["cost"] = None
    assert rest == whole
    assert noise.run(session, spec, tmp_path / "parts")["cost"] == {"made": 0, "examples": 0, "recalibration": 0}


@pytest.mark.parametrize("criterion", ["lamp", "snip", {"name": "magnitude", "order": 1}, "random"])
def test_other_criteria(session, tmp_path, criterion):
    spec = _spec(criterion=criterion, variants=2)
    found = noise.run(session, spec, tmp_path)
    assert found["criterion"] == spec.criterion["name"]
    bench = session.bench({"it": spec.criterion})
    wanted = [NoisyPrune(0.1, 0.5, seed, "it") for seed in range(2)]
    assert found["cells"][0]["accuracies"] == list(evaluate_variants(bench, wanted, session.judged).means())


def test_a_criterion_that_needs_data_and_has_none(session):
    bench = Workbench(session.network, session.targets)
    with pytest.raises(UsageError, match="batches") as caught:
        evaluate_variants(bench, [NoisyPrune(0.1, 0.5, 0, "snip")], session.judged)
    assert "\n" not in str(caught.value)


def test_statistics_are_renewed_for_every_network(tmp_path, session):
    recipe = _recipe(judge={"images": 60, "recalibrate": 64})
    other = Session(recipe, session.context.options)
    other.train()
    found = noise.run(other, _spec(variants=2), tmp_path / "a")
    plain = noise.run(session, _spec(variants=2), tmp_path / "b")
    assert found["cost"]["recalibration"] == 64 * found["cost"]["made"] > 0
    assert plain["cost"]["recalibration"] == 0
    assert other.stage(_spec()).key != session.stage(_spec()).key


class _Cells(noise._Work):
    """Noise pays from a sparsity on; every cell asked for is written down."""

    start = 0.0
    asked: list[tuple[float, float]]

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        type(self).asked = []

    def cells(self, points):
        type(self).asked += points
        found = []
        for sigma, sparsity in points:
            good = sparsity >= self.start
            found.append({"sigma": sigma, "sparsity": sparsity, "gain": 0.01, "transfer": {}})
            found[-1] |= {"p_gain": 0.01 if good else 1.0}
        return found


@pytest.mark.parametrize(
    ("start", "below", "first"),
    [(0.7, 0.6875, 0.70625), (0.0, None, 0.25), (2.0, 0.9, None), (0.25, None, 0.25), (0.9, 0.89375, 0.9)],
)
def test_the_step_is_halved_where_noise_begins_to_pay(session, tmp_path, monkeypatch, start, below, first):
    monkeypatch.setattr(noise, "_Work", type("Mine", (_Cells,), {"start": start}))
    spec = _spec(sigmas=[0.3, 0.1], sparsities=[0.9, 0.25, 0.5, 0.8], crossover=4)
    found = noise.run(session, spec, tmp_path)
    assert [c["sigma"] for c in found["crossings"]] == [0.1, 0.3]
    for crossing in found["crossings"]:
        assert crossing["below"] == (None if below is None else pytest.approx(below))
        assert crossing["pays"] == (None if first is None else pytest.approx(first))
    halved = 0 if below is None or first is None else 4
    assert len(found["steps"]) == 2 * halved == len(noise._Work.asked) - 8


def test_noise_that_pays_must_do_so_by_its_seeds_and_by_the_images():
    """Without any true gain, and with a change that all seeds share, few families of cells have one that pays."""
    generator, wrong = np.random.default_rng(0), 0
    for _ in range(60):
        cells = []
        for _ in range(12):
            plain = generator.random(300) < 0.5
            shared = plain ^ (generator.random(300) < 0.1)
            values = [float((shared ^ (generator.random(300) < 0.005)).mean()) for _ in range(10)]
            rows = np.stack([shared] * 10).mean(axis=0)
            images = paired_examples(rows, plain.astype(float))
            gain = rows.mean() - plain.mean()
            half = images.p / 2
            cells.append(max(above(values, plain.mean())[0], half if gain > 0 else 1 - half))
        wrong += min(holm(cells)) < LEVEL
    assert wrong <= 7
    assert pays({"p_gain": 0.01})
    assert not pays({"p_gain": 0.05})


def _cell(sigma, sparsity, gain, low, high, p, networks=20, transfer=None):
    return {
        "sigma": sigma,
        "sparsity": sparsity,
        "plain": 0.5,
        "accuracies": [0.5 + gain] * networks,
        "median": 0.5 + gain,
        "median_low": 0.49 + gain,
        "median_high": 0.51 + gain,
        "gain": gain,
        "gain_low": low,
        "gain_high": high,
        "p_gain_seeds": p,
        "p_gain_images": p,
        "p_gain": p,
        "p_loss": 0.001 if high is not None and high < 0 else 1.0,
        "test": "a named test",
        "transfer": transfer or {},
    }


def _shown(cells, **changes):
    found = {
        "criterion": "magnitude",
        "count": 100,
        "dense": 0.9,
        "layers": ["a", "b"],
        "weights": 1234,
        "plain": [{"sparsity": s, "accuracy": 0.5} for s in sorted({0.0, *(c["sparsity"] for c in cells)})],
        "cells": cells,
        "steps": [],
        "crossings": [],
        "confirmed": None,
        "cost": {},
        **changes,
    }
    return view(_section(_spec(), found), "x")


def test_the_words_for_noise_that_pays_harms_and_does_nothing():
    good = _cell(0.1, 0.5, 0.2, 0.1, 0.3, 0.001)
    bad, none = _cell(0.2, 0.5, -0.2, -0.3, -0.1, 1.0), _cell(0.3, 0.5, 0.01, -0.05, 0.07, 0.4)
    shown = _shown([good, bad, none], confirmed={"count": 77, **good})
    assert shown.lines[0].startswith(
        "Noise pays in 1 of 3 cells of sigma and sparsity and harms in 1; in 1, 100 images"
    )
    assert shown.lines[1].startswith("Largest gain: +20.0 points (+10.0..+30.0) with sigma 0.1 at sparsity 50 %, from")
    assert shown.lines[1].endswith("p 0.001.")
    assert "a named test" in shown.notes[0]
    assert "fresh seeds on 77 test images held back, by neither of which it was chosen" in shown.lines[2]
    assert shown.lines[2].endswith("The gain holds.")
    assert shown.tables[0].rows == (("50 %", "50.0 %", "+20.0 *", "-20.0 -", "+1.0"),)
    assert _shown([good], confirmed={"count": 77, **none}).lines[2].endswith("The gain does not hold there.")
    shown = _shown([bad], confirmed={"count": 77, **bad})
    assert shown.lines[1].startswith("No cell gains anything; the least loss: -20.0 points")
    assert "hold there" not in shown.lines[2], "there was no gain to hold"
    assert "another training may differ" in shown.notes[0]


def test_the_words_for_where_noise_begins_to_pay_and_for_masks():
    ways = {"noisy mask, plain weights": _cell(0.1, 0.5, 0.3, 0.1, 0.4, 0.1)}
    ways["plain mask, noisy weights"] = _cell(0.1, 0.5, -0.1, -0.2, 0.1, 1.0)
    crossings = [
        {"sigma": 0.1, "below": 0.5, "pays": 0.625},
        {"sigma": 0.2, "below": None, "pays": 0.5},
        {"sigma": 0.3, "below": 0.5, "pays": None},
    ]
    shown = _shown([_cell(0.1, 0.5, 0.2, 0.1, 0.3, 0.001, transfer=ways)], crossings=crossings)
    words = " ".join(shown.lines)
    assert "sigma 0.1 begins to pay between sparsity 50 % and 62.5 %." in words
    assert "sigma 0.2 pays from the lowest sparsity tried, 50 %." in words
    assert "sigma 0.3 pays at none of the sparsities tried." in words
    assert "A noisy mask on plain weights: between +30.0 and +30.0 points" in words
    assert "ahead of the noisy one in 1 of 1 cell." in words


def test_too_few_networks_for_any_p_value_are_told():
    none = [_cell(0.1 + s / 10, 0.5, 0.2, 0.1, 0.3, 0.5, networks=5) for s in range(2)]
    words = " ".join(_shown(none).lines)
    assert "with 5 networks a cell no p-value comes below 0.05 over 2 cells; 6 or more would do" in words
    # Which is true.
    assert holm([above([0.6 + s / 100 for s in range(6)], 0.5)[0]] * 2)[0] < 0.05
    assert holm([above([0.6 + s / 100 for s in range(5)], 0.5)[0]] * 2)[0] >= 0.05
    assert "could not be seen" not in " ".join(_shown([_cell(0.1, 0.5, 0.2, 0.1, 0.3, 0.04, networks=5)]).lines)
