"""What sections share: which images judge, which are held back, which are scored, and what names a stage."""

from __future__ import annotations

import pytest
import torch

from secateur.errors import NoEffectError, UnknownNameError, UsageError
from secateur.lab.context import Options
from secateur.lab.explore.recipe import ExploreRecipe
from secateur.lab.explore.run import explore, plan_exploration
from secateur.lab.explore.session import Session

NOISE = {"kind": "noise", "sigmas": [0.1], "sparsities": [0.5]}


def _session(tmp_path, **changes):
    recipe = {"name": "small", "train": {"duration": "1it"}, "explore": [NOISE], **changes}
    session = Session(ExploreRecipe.model_validate(recipe), Options(out=tmp_path, device="cpu"))
    session.train()
    return session


def _images(batches):
    return {image.numpy().tobytes() for inputs, _ in batches for image in inputs}


def test_training_images_hold_every_class_in_proportion_wherever_one_looks(tmp_path):
    session = _session(tmp_path)
    labels = torch.cat([labels for _, labels in session.training_images(200)])
    whole = session.context.data.train_labels
    expected = torch.bincount(whole).double() * 200 / len(whole)
    assert bool(((torch.bincount(labels).double() - expected).abs() < 1).all())
    assert len(labels[:50].unique()) == 10
    with pytest.raises(UsageError, match="ask for fewer"):
        session.training_images(100_000)


def test_what_was_judged_by_before_is_set_aside(tmp_path):
    before = _session(tmp_path, judge={"images": 60})
    after = _session(tmp_path, judge={"images": 100, "skip": 60})
    judged, again, held = _images(before.judged), _images(after.judged), _images(after.held)
    assert not judged & again
    assert not judged & held
    assert not again & held
    assert after.counts == (100, 200)
    with pytest.raises(UsageError, match="60 set aside"):
        _ = _session(tmp_path, judge={"images": 300, "skip": 60}).counts


def test_statistics_are_renewed_by_batches_of_one_size(tmp_path):
    session = _session(tmp_path, judge={"recalibrate": 300})
    assert [len(labels) for _, labels in session.renewing] == [128, 128]
    assert [len(labels) for _, labels in _session(tmp_path, judge={"recalibrate": 50}).renewing] == [50]


UNITS = {"kind": "deliver", "vary": "units", "numbers": {"stem.weigth": 0.5}}


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"judge": {"recalibrate": 50}, "model": {"name": "mlp"}}, NoEffectError, "the network has none; leave it out"),
        ({"judge": {"recalibrate": 10_000}}, UsageError, "judge.recalibrate 10000: there are .* training images"),
        (
            {"explore": [UNITS]},
            UnknownNameError,
            r'unknown group of units in numbers "stem.weigth"; (nearest|known): ',
        ),
        (
            {"explore": [{"kind": "search", "vary": "units"}], "include": ["head"]},
            NoEffectError,
            "no unit may be removed",
        ),
        ({"explore": [{"kind": "analyses", "images": 9999}]}, UsageError, "analyses: images 9999: there are .* fewer"),
        ({"explore": [{"kind": "oracle", "images": 9999}]}, UsageError, "oracle: images 9999: there are .* fewer"),
        (
            {"explore": [{"kind": "fine_tune", "sigma": 0.1, "sparsity": 0.5, "paper": True}]},
            UsageError,
            "fine_tune: images 5000: there are .* fewer",
        ),
        ({"explore": [{"kind": "masks"}]}, UsageError, 'layer "head" cannot be cut: .*; exclude the layer'),
        ({"exclude": ["*"]}, UsageError, "no target left"),
    ],
)
def test_what_cannot_work_is_said_before_the_network_is_trained(tmp_path, changes, error, said):
    recipe = ExploreRecipe.model_validate(
        {"name": "small", "train": {"duration": "1it"}, "explore": [NOISE], **changes}
    )
    options = Options(out=tmp_path, device="cpu")
    for start in (plan_exploration, explore):
        with pytest.raises(error, match=said) as caught:
            start(recipe, options)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("stages/train-*"))


def test_the_seed_names_the_stage_also_of_given_weights(tmp_path):
    file = tmp_path / "weights.pt"
    torch.save(_session(tmp_path).network.state_dict(), file)
    given = {"name": "given", "weights": {"file": str(file)}, "explore": [NOISE]}
    stages = set()
    for seed in (0, 1):
        recipe = ExploreRecipe.model_validate({**given, "seed": seed})
        session = Session(recipe, Options(out=tmp_path, device="cpu"))
        stages.add(session.stage(recipe.explore[0]).key)
    assert len(stages) == 2
