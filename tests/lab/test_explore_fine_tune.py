"""Fine-tuning after stochastic pruning: both ways of doing it, going on after a stop, and what the report says."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from secateur.core.masks import Masks
from secateur.core.targets import find_targets
from secateur.errors import DivergedError, UsageError
from secateur.lab.context import Options
from secateur.lab.explore.fine_tune import run
from secateur.lab.explore.fine_tune_spec import FineTuneSpec
from secateur.lab.explore.paper_fine_tune import fine_tune_as_published, learning_rate, part_loader
from secateur.lab.explore.recipe import ExploreRecipe
from secateur.lab.explore.session import Session
from secateur.lab.listener import Interrupted, Listener
from secateur.lab.report.explore.fine_tune import view
from secateur.surgery.file import load_pruned
from secateur.variants.kinds import NoisyPrune

RECIPE = {
    "name": "tuned",
    "train": {"duration": "3ep"},
    "explore": [{"kind": "noise", "sigmas": [0.01], "sparsities": [0.5]}],
}


def section(**more: Any) -> FineTuneSpec:
    return FineTuneSpec.model_validate({"kind": "fine_tune", "sigma": 0.03, "sparsity": 0.85, "variants": 2, **more})


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tuned")


def make_session(out: Path, listener: Listener | None = None, **more: Any) -> Session:
    made = Session(ExploreRecipe.model_validate({**RECIPE, **more}), Options(out=out, device="cpu"), listener)
    made.train()
    return made


@pytest.fixture(scope="module")
def session(out: Path) -> Session:
    return make_session(out)


@pytest.fixture(scope="module")
def tuned(session: Session, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("section")
    return run(session, section(train={"duration": "2ep", "optimizer": {"lr": 0.01}}), folder), folder


@pytest.fixture(scope="module")
def published(session: Session, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("published")
    return run(session, section(paper=True, images=300, epochs=4), folder), folder


def without_times(result: dict[str, Any]) -> dict[str, Any]:
    return {**result, "networks": [{k: v for k, v in n.items() if k != "seconds"} for n in result["networks"]]}


class StopsAt(Listener):
    """Asks to stop at the given step of the given training, counted from 1."""

    def __init__(self, training: int, step: int) -> None:
        self.training, self.step, self.started = training, step, 0

    def message(self, text: str) -> None:
        self.started += text.startswith("fine-tuning")

    def advanced(self, step: int, note: str) -> None:
        if self.started == self.training and step == self.step:
            self.stop = True


def test_fine_tuning_gives_back_accuracy(tuned: tuple[dict[str, Any], Path], session: Session) -> None:
    result, _ = tuned
    json.dumps(result, allow_nan=False)
    assert [(n["sigma"], n["seed"]) for n in result["networks"]] == [(0.0, None), (0.03, 0), (0.03, 1)]
    for network in result["networks"]:
        assert network["sparsity"] == pytest.approx(0.85, abs=1e-3)
        assert network["after"] > network["before"] + 0.1
    assert result["count"] == session.counts[1]
    assert result["dense"] > 0.9
    assert result["against"]["method"] == "paired t over examples"


def test_zeros_stay_zero_and_the_file_is_the_network(tuned: tuple[dict[str, Any], Path], session: Session) -> None:
    result, folder = tuned
    for variant, found in zip(
        [NoisyPrune(0.0, 0.85), NoisyPrune(0.03, 0.85, 0), NoisyPrune(0.03, 0.85, 1)], result["networks"], strict=True
    ):
        network = load_pruned(folder / found["file"])
        with session.bench().variant(variant) as model:
            before = {name: tensor.detach() != 0 for name, tensor in session.targets.tensors(model).items()}
        for name, tensor in session.targets.tensors(network).items():
            assert not bool((tensor.detach() != 0)[~before[name]].any())
        right, count = session.accuracy(network, session.held)
        assert right / count == pytest.approx(found["after"])
        assert (folder / found["file"]).stat().st_size == found["bytes"]


def test_before_is_the_variant_itself(tuned: tuple[dict[str, Any], Path], session: Session) -> None:
    with session.bench().variant(NoisyPrune(0.03, 0.85, 1)) as model:
        right, count = session.accuracy(model, session.held)
    assert tuned[0]["networks"][2]["before"] == pytest.approx(right / count)


def test_the_network_is_left_as_it_was(session: Session, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in session.network.state_dict().items()}
    run(session, section(variants=1, train={"duration": "2it"}), tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in session.network.state_dict().items())
    assert not session.network.training
    assert all(p.requires_grad for p in session.network.parameters())


def test_a_finished_network_is_not_trained_again(
    tuned: tuple[dict[str, Any], Path], session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, folder = tuned
    monkeypatch.setattr("secateur.lab.explore.fine_tune.train", None)
    assert run(session, section(train={"duration": "2ep", "optimizer": {"lr": 0.01}}), folder) == result


@pytest.mark.parametrize(
    "settings", [{"train": {"duration": "2ep", "optimizer": {"lr": 0.01}}}, {"paper": True, "images": 300, "epochs": 4}]
)
@pytest.mark.parametrize("step", [2, 5])
def test_a_stopped_section_goes_on_to_the_same_result(
    out: Path, tmp_path: Path, request: pytest.FixtureRequest, settings: dict[str, Any], step: int
) -> None:
    whole, folder = request.getfixturevalue("published" if "paper" in settings else "tuned")
    stopped = make_session(out, StopsAt(training=2, step=step))
    with pytest.raises(Interrupted):
        run(stopped, section(**settings), tmp_path)
    assert (tmp_path / "plain" / "network.json").is_file()
    assert (tmp_path / "noise-0" / "checkpoint.safetensors").is_file()
    again = run(make_session(out), section(**settings), tmp_path)
    assert without_times(again) == without_times(whole)
    for network in again["networks"]:
        weights = [load_pruned(place / network["file"]).state_dict() for place in (folder, tmp_path)]
        assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())
    assert not list(tmp_path.glob("*/checkpoint.safetensors"))


def test_the_best_is_chosen_by_the_images_judged_by(session: Session, tmp_path: Path) -> None:
    result = run(session, section(choose="best", variants=4, train={"duration": "2it"}), tmp_path)
    assert len(result["judged"]) == 4
    assert [n["seed"] for n in result["networks"]] == [None, result["judged"].index(max(result["judged"]))]
    assert result["against"]["method"] == "Agresti-Min, exact sign test"
    after = [n["after"] for n in result["networks"]]
    assert result["against"]["mean"] == pytest.approx(after[1] - after[0])


def test_statistics_are_renewed_where_the_recipe_wants_it(out: Path, tmp_path: Path) -> None:
    renewed = make_session(out, judge={"recalibrate": 200})
    result = run(renewed, section(variants=1, train={"duration": "2it"}), tmp_path)
    plain = run(make_session(out), section(variants=1, train={"duration": "2it"}), tmp_path / "plain")
    assert result["networks"][0]["before"] != plain["networks"][0]["before"]


# The preset.


@pytest.mark.parametrize("epochs", [3, 100])
def test_the_rate_swings_as_a_cosine_stepped_with_every_batch(epochs: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    for step in range(5 * epochs):
        assert learning_rate(step, epochs) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-15)
        assert learning_rate(step, epochs) == pytest.approx(
            1e-4 * math.cos(math.pi * step / (2 * epochs)) ** 2, abs=1e-15
        )
        assert learning_rate(step + 2 * epochs, epochs) == pytest.approx(learning_rate(step, epochs), abs=1e-15)
        optimizer.step()
        schedule.step()
    assert learning_rate(epochs, epochs) == pytest.approx(0.0, abs=1e-15)


def _published_steps(session: Session, folder: Path, **more: Any) -> tuple[nn.Module, nn.Module]:
    model = copy.deepcopy(session.network)
    targets = find_targets(model, exclude=("@first", "@last"))
    masks = Masks({n: t.detach().abs() > t.detach().abs().median() for n, t in targets.tensors(model).items()})
    masks.apply_(model)
    before = copy.deepcopy(model)
    loader = more.pop("loader", None) or part_loader(session.context.data, 200, 0)
    fine_tune_as_published(model, loader, masks, targets, 3, folder=folder, seed=0, **more)
    return before, model


def test_only_the_targets_move_and_zeros_stay(session: Session, tmp_path: Path) -> None:
    before, after = _published_steps(session, tmp_path)
    moved = {n for n, t in after.state_dict().items() if not torch.equal(t, before.state_dict()[n])}
    assert moved == {"conv2.weight", "conv3.weight"}
    for name in moved:
        zero = before.state_dict()[name] == 0
        assert bool((after.state_dict()[name][zero] == 0).all())
    assert all(p.requires_grad for p in after.parameters())
    assert not any(module.training for module in after.modules())


def test_one_step_is_clipped_sgd(session: Session, tmp_path: Path) -> None:
    """The first two steps by hand: decay after clipping, momentum, rate of each step."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        # Large, so that entries of the gradient are above 0.1.
        model[1].weight.normal_(0.0, 3.0, generator=torch.Generator().manual_seed(0))
        model[1].bias.zero_()
    weight = model[1].weight.detach().clone().requires_grad_()
    bias = model[1].bias.detach().clone().requires_grad_()
    targets = find_targets(model)
    loader = part_loader(session.context.data, 100, 0)
    masks = Masks({"1.weight": torch.ones_like(weight, dtype=torch.bool)})
    fine_tune_as_published(model, loader, masks, targets, 2, folder=tmp_path, seed=0)
    speeds = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for step in range(2):
        images, labels = loader.batch(step)
        loss = nn.functional.cross_entropy(images.flatten(1) @ weight.t() + bias, labels)
        gradients = torch.autograd.grad(loss, [weight, bias])
        assert max(float(g.abs().max()) for g in gradients) > 0.1
        with torch.no_grad():
            for parameter, gradient, speed in zip((weight, bias), gradients, speeds, strict=True):
                speed.mul_(0.9).add_(gradient.clamp(-0.1, 0.1) + 5e-4 * parameter)
                parameter -= 1e-4 * (1 + math.cos(math.pi * step / 2)) / 2 * speed
    assert torch.allclose(model[1].weight, weight, atol=1e-7, rtol=0)
    assert torch.allclose(model[1].bias, bias, atol=1e-7, rtol=0)


def test_no_other_image_than_those_of_the_part_is_used(session: Session, tmp_path: Path) -> None:
    data = session.context.data
    part = torch.randperm(len(data.train_labels), generator=_part_generator())[:200]
    images = torch.full_like(data.train_images, 3)
    images[part] = data.train_images[part]
    other = dataclasses.replace(data, train_images=images)
    _, plain = _published_steps(session, tmp_path / "a")
    _, changed = _published_steps(session, tmp_path / "b", loader=part_loader(other, 200, 0))
    assert all(torch.equal(t, changed.state_dict()[n]) for n, t in plain.state_dict().items())
    assert len(part_loader(data, 200, 0).labels) == 200
    assert part_loader(data, 200, 0).steps_per_epoch == 2
    with pytest.raises(UsageError, match="images 5000: the training set has"):
        part_loader(data, 5000, 0)


def _part_generator() -> torch.Generator:
    from secateur.core.seeds import keyed_generator

    return keyed_generator(0, "fine-tuning part")


def test_a_loss_that_is_not_finite_is_said(session: Session, tmp_path: Path) -> None:
    class Nan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.flatten(1)) * math.nan

    model = Nan()
    masks = Masks({"fc.weight": torch.ones(10, 64, dtype=torch.bool)})
    loader = part_loader(session.context.data, 100, 0)
    with pytest.raises(DivergedError, match="step 1 of 2"):
        fine_tune_as_published(model, loader, masks, find_targets(model), 2, folder=tmp_path, seed=0)


def test_the_preset_says_how_it_does_on_its_part(published: tuple[dict[str, Any], Path]) -> None:
    result, _ = published
    assert all(0.0 <= n["part"] <= 1.0 for n in result["networks"])
    assert result["networks"][0]["steps"] == 4 * 3


# The spec.


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"paper": True, "train": {"duration": "1ep"}}, "leave train out"),
        ({"images": 100}, "belong to paper"),
        ({"epochs": 3}, "belong to paper"),
        ({"sigma": 0.0}, "greater than 0"),
        ({"sparsity": 0.0}, "greater than 0"),
        ({"sparsity": 1.0}, "less than 1"),
        ({"variants": 0}, "greater than or equal to 1"),
        ({"sigma": math.inf}, "finite"),
    ],
)
def test_what_cannot_be_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        section(**more)


def test_a_resolved_section_reads_back() -> None:
    for spec in (section(), section(paper=True, images=100)):
        assert FineTuneSpec.model_validate(spec.model_dump(mode="json")) == spec


# The report.


def shown(result: dict[str, Any], spec: FineTuneSpec) -> dict[str, Any]:
    data = {"kind": "fine_tune", "title": "Tuned", "spec": spec.model_dump(mode="json"), **result}
    return json.loads(json.dumps(data, allow_nan=False))


def written(after: list[float], **more: Any) -> dict[str, Any]:
    """A result by hand: the plain network goes from 50 to 80 %, the noisy from 60 % to `after`."""
    networks = [
        {
            "sigma": 0.01 if seed is not None else 0.0,
            "seed": seed,
            "sparsity": 0.9,
            "before": 0.5 if seed is None else 0.6,
            "after": value,
            "part": None,
            "steps": 1200,
            "seconds": 1.0,
            "file": "x/pruned.safetensors",
            "bytes": 2048,
        }
        for seed, value in zip([None, *range(len(after))], [0.8, *after], strict=True)
    ]
    against = {"mean": sum(after) / len(after) - 0.8, "low": 0.002, "high": 0.03, "p": 0.01, "method": "paired t"}
    result = {"count": 5000, "judged_count": 5000, "dense": 0.9, "judged": [], "networks": networks, "against": against}
    return shown({**result, **more}, section(sparsity=0.9, variants=len(after)))


def test_the_view_of_both_ways(tuned: tuple[dict[str, Any], Path], published: tuple[dict[str, Any], Path]) -> None:
    for (result, _), spec in ((tuned, section()), (published, section(paper=True, images=300, epochs=4))):
        page = view(shown(result, spec), "s1")
        assert page.title == "Tuned"
        assert page.pictures[0].name == "s1-fine-tuning"
        assert page.pictures[0].svg.startswith("<?xml")
        assert "<svg" in page.pictures[0].svg
        assert len(page.tables[0].rows) == 3
        assert "2 noisy networks are too few for a test" in page.lines[1]
        notes = " ".join(page.notes)
        assert ("sp_paper_ft" in notes) == spec.paper
        assert ("every 8 steps" in notes) == spec.paper
        assert ("learning rate 0.01" in notes) != spec.paper


def test_the_view_names_the_test_from_five_networks_on() -> None:
    page = view(written([0.811, 0.812, 0.814, 0.813, 0.815]), "s")
    assert "80.0 % on 5,000 images" in page.lines[0]
    assert "p = 0.031 (exact Wilcoxon signed-rank test, one-sided, n = 5)" in page.lines[1]
    assert "above the plain one on these images, by more than the choice of images explains" in page.lines[1]
    assert "had 50.0 % and gained +30.0 points" in page.lines[2]
    assert page.tables[0].rows[0] == ("without noise", "90.00 %", "50.00 %", "80.00 %", "+30.0", "1,200", "2.0 KiB")


def test_the_view_does_not_claim_more_than_there_is() -> None:
    few = {"mean": 0.013, "low": -0.01, "high": 0.03, "p": 0.2, "method": "paired t"}
    up = [0.811, 0.812, 0.814, 0.813, 0.815]
    assert "so few images may mislead" in view(written(up, against=few), "s").lines[1]
    assert "not shown to be above" in view(written([0.79, 0.812, 0.78, 0.813, 0.815]), "s").lines[1]
    lower = {"mean": -0.013, "low": -0.03, "high": -0.01, "p": 0.2, "method": "paired t"}
    down = [1.6 - value for value in up]
    assert "below the plain one on these images, by more" in view(written(down, against=lower), "s").lines[1]
    nothing = {"mean": 0.0, "low": None, "high": None, "p": None, "method": "no interval: no spread"}
    assert "no interval" in view(written([0.8] * 5, against=nothing), "s").lines[1]


def test_the_view_of_one_chosen_network() -> None:
    page = view(written([0.81], judged=[0.55, 0.61, 0.6]), "s")
    assert (
        "Of 3 noisy networks only the best on the 5,000 images judged by was fine-tuned: seed 0, 61.0 %"
        in page.lines[1]
    )
    assert "another draw of the noise may differ" in page.lines[2]
