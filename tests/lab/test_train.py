"""Training stopped after any step, politely or not, and resumed ends bitwise as if it had never stopped."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.core.targets import find_targets
from secateur.criteria.magnitude import Magnitude
from secateur.errors import CheckpointError, DivergedError, UsageError
from secateur.lab.data import Loader
from secateur.lab.evaluate import Evaluation
from secateur.lab.listener import Interrupted, Listener
from secateur.lab.plugins import make_regularizer
from secateur.lab.recipe import LearningRateSpec, OptimizerSpec, TrainSpec
from secateur.lab.runtime import Runtime
from secateur.lab.train import TrainResult, learning_rate, make_optimizer, train
from secateur.sparsify.ranking import rank

STEPS = 9
REGULARIZERS = {
    "none": {"name": "none"},
    "dropout": {"name": "dropout", "drop_rate": 0.3, "granularity": "unit"},
    "td weight": {"name": "targeted_dropout", "granularity": "weight", "gamma": 0.5, "alpha": 0.5},
    "td unit": {"name": "targeted_dropout", "granularity": "unit", "gamma": 0.5, "alpha": 0.5},
    "td ramp": {
        "name": "targeted_dropout",
        "granularity": "unit",
        "gamma": 0.6,
        "alpha": 0.7,
        "ramp": True,
    },
    "ddrop": {"name": "ddrop", "keep_min": 0.5, "keep_max": 0.9, "l1": 1e-3, "schedule": "cosine"},
}
OPTIMIZERS = {
    "sgd": OptimizerSpec(name="sgd", lr=0.1, nesterov=True),
    "adamw": OptimizerSpec(name="adamw", lr=0.01, decay_norms=False),
}


class Killed(Exception):
    """Stands for the end of the process: nothing is saved on its way."""


class StopAfter(Listener):
    def __init__(self, step: int, polite: bool) -> None:
        self._step, self._polite = step, polite

    def advanced(self, step: int, note: str) -> None:
        if step == self._step:
            if not self._polite:
                raise Killed
            self.stop = True


def network() -> nn.Module:
    """BatchNorm for DDROP, and nn.Dropout, which draws from the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(6 * 64, 12),
            nn.ReLU(),
            nn.Linear(12, 4),
        )


@functools.cache
def arrays() -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (26, 1, 8, 8), dtype=np.uint8)), torch.arange(26) % 4


@functools.cache
def runtime() -> Runtime:
    return Runtime("cpu")


def accuracy(model: nn.Module) -> Evaluation:
    model.eval()
    images, labels = arrays()
    with torch.no_grad():
        outputs = model(images.float() / 255)
    model.train()
    loss = float(nn.functional.cross_entropy(outputs, labels))
    return Evaluation(int((outputs.argmax(1) == labels).sum()), None, len(labels), loss)


def spec(optimizer: OptimizerSpec = OPTIMIZERS["sgd"], **changes: object) -> TrainSpec:
    return TrainSpec(
        **{
            "duration": f"{STEPS}it",
            "batch_size": 8,
            "optimizer": optimizer,
            "lr_schedule": LearningRateSpec(warmup="2it"),
            "augment": "crop_flip",
            "grad_clip": 5.0,
            "checkpoint_every": "2it",
            "evaluate_every": "3it",
            **changes,
        }
    )


def run(
    folder: Path,
    regularizer: dict,
    settings: TrainSpec,
    listener: Listener | None = None,
    model: nn.Module | None = None,
    masked: bool = False,
) -> tuple[nn.Module, TrainResult]:
    folder.mkdir(parents=True, exist_ok=True)
    model = model or network()
    method = make_regularizer(regularizer)
    last = find_targets(model, exclude=["@last"]) if regularizer["name"] != "ddrop" else None
    outcome = train(
        model,
        Loader(*arrays(), settings.batch_size, 0, augment=settings.augment),
        settings,
        runtime=runtime(),
        regularizer=method,
        folder=folder,
        seed=5,
        evaluation=accuracy,
        targets=last,
        masks=rank(model, Magnitude()).masks(0.5) if masked else None,
        listener=listener,
    )
    return model, outcome


def stop_and_resume(folder: Path, regularizer: dict, settings: TrainSpec, stops: list[tuple[int, bool]]) -> tuple:
    """Stop after each of `stops` (step, politely?) in turn, then run to the end; always in a new network."""
    for step, polite in stops:
        with pytest.raises(Interrupted if polite else Killed):
            run(folder, regularizer, settings, StopAfter(step, polite))
        torch.rand(7)  # another process would find the global generator elsewhere
    return run(folder, regularizer, settings)


def same(left: tuple[nn.Module, TrainResult], right: tuple[nn.Module, TrainResult]) -> None:
    a, b = left[0].state_dict(), right[0].state_dict()
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert left[1].history == right[1].history
    assert left[1].final_loss == right[1].final_loss
    assert left[1].steps == right[1].steps == STEPS


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_resumed_from_any_step_is_uninterrupted(tmp_path, regularizer, optimizer):
    method, settings = REGULARIZERS[regularizer], spec(OPTIMIZERS[optimizer])
    whole = run(tmp_path / "whole", method, settings)
    # Before, at and after a checkpoint (every 2) and an evaluation (every 3), and when all is done but the result.
    for step, polite in ((1, True), (3, False), (4, True), (5, False), (6, False), (7, True), (STEPS, True)):
        folder = tmp_path / f"{step}{polite}"
        same(whole, stop_and_resume(folder, method, settings, [(step, polite)]))
        assert (folder / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, STEPS), st.booleans()), min_size=2, max_size=4, unique_by=lambda s: s[0]),
    st.sampled_from(sorted(REGULARIZERS)),
    st.integers(1, STEPS),
    st.integers(1, STEPS),
)
def test_resumed_many_times_is_uninterrupted(tmp_path_factory, stops, regularizer, save_every, evaluate_every):
    folder = tmp_path_factory.mktemp("many")
    settings_ = spec(checkpoint_every=f"{save_every}it", evaluate_every=f"{evaluate_every}it")
    whole = run(folder / "whole", REGULARIZERS[regularizer], settings_)
    same(whole, stop_and_resume(folder / "parts", REGULARIZERS[regularizer], settings_, sorted(stops)))


def test_masked_training_resumes_and_stays_masked(tmp_path):
    whole = run(tmp_path / "whole", REGULARIZERS["none"], spec(), masked=True)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", REGULARIZERS["none"], spec(), StopAfter(5, True), masked=True)
    same(whole, run(tmp_path / "parts", REGULARIZERS["none"], spec(), masked=True))
    assert int((whole[0][0].weight == 0).sum()) == whole[0][0].weight.numel() // 2


def test_the_regularizers_and_the_noise_do_something(tmp_path):
    ends = [run(tmp_path / name, method, spec())[0][0].weight for name, method in REGULARIZERS.items()]
    for i, a in enumerate(ends):
        assert all(not torch.equal(a, b) for b in ends[i + 1 :])


def test_training_leaves_the_global_generator_alone(tmp_path):
    before = torch.get_rng_state()
    run(tmp_path, REGULARIZERS["dropout"], spec())
    assert torch.equal(before, torch.get_rng_state())


def test_metrics_are_one_json_object_a_line(tmp_path):
    _, outcome = run(tmp_path, REGULARIZERS["none"], spec())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == outcome.history
    assert [line["step"] for line in lines] == [3, 6, 9]


class Blows(nn.Module):
    """Gives NaN from its `after`-th training forward pass on; the weights stay fine."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.body = network()
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self._after = after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.passes += 1
        return self.body(x) * (float("nan") if int(self.passes) > self._after else 1.0)


def test_a_loss_that_is_not_finite_stops_says_where_and_keeps_the_last_good_checkpoint(tmp_path):
    whole, _ = run(tmp_path / "whole", REGULARIZERS["none"], spec(duration="4it"))
    with pytest.raises(DivergedError, match=r"loss is nan at step 6 \(epoch 2\), learning rate 0\.0\d+.*step 4"):
        run(tmp_path / "bad", REGULARIZERS["none"], spec(), model=Blows(5))
    from secateur.lab.checkpoint import load_tensors

    tensors, values = load_tensors(tmp_path / "bad" / "checkpoint.safetensors")
    assert values["step"] == 4
    assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())
    assert len(whole.state_dict()) == sum(name.startswith("model/body.") for name in tensors)


@pytest.mark.parametrize(("rate", "clip"), [(1e30, None), (3e38, None), (1e20, 1.0)])
def test_a_huge_learning_rate_never_leaves_a_checkpoint_that_is_not_finite(tmp_path, rate, clip):
    settings_ = spec(OptimizerSpec(lr=rate), checkpoint_every="1it", grad_clip=clip)
    with pytest.raises(DivergedError, match=r"not finite|(nan|inf) at step \d"):
        run(tmp_path, REGULARIZERS["none"], settings_)
    file = tmp_path / "checkpoint.safetensors"
    if file.is_file():
        from secateur.lab.checkpoint import load_tensors

        assert all(t.isfinite().all() for t in load_tensors(file)[0].values() if t.is_floating_point())


def test_weights_that_break_in_the_very_last_step_are_noticed(tmp_path):
    settings_ = spec(OptimizerSpec(lr=3e38), duration="1it", lr_schedule=LearningRateSpec(name="constant"))
    with pytest.raises(DivergedError, match="held-out data"):
        run(tmp_path, REGULARIZERS["none"], settings_)


def test_a_checkpoint_of_another_network_is_refused_in_one_line(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, REGULARIZERS["none"], spec(), StopAfter(3, True))
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 4))
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors: belongs to another network") as caught:
        run(tmp_path, REGULARIZERS["none"], spec(), model=other)
    assert "\n" not in str(caught.value)


def test_nothing_to_train_is_said(tmp_path):
    frozen = network().requires_grad_(False)
    with pytest.raises(UsageError, match="frozen"):
        run(tmp_path, REGULARIZERS["none"], spec(), model=frozen)
    with pytest.raises(UsageError, match="less than one step"):
        run(tmp_path, REGULARIZERS["none"], spec(duration="0.01ep"))


def test_learning_rate_schedules():
    step = LearningRateSpec(name="step", milestones=("1ep", "0.5run"), factor=0.1)
    got = [learning_rate(step, 1.0, s, 20, 5) for s in (0, 4, 5, 9, 10, 19)]
    assert got == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    cosine = LearningRateSpec(warmup="4it")
    rates = [learning_rate(cosine, 1.0, s, 20, 5) for s in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    assert learning_rate(LearningRateSpec(name="constant"), 0.3, 7, 20, 5) == 0.3


def test_norms_and_biases_are_spared_from_decay_on_request():
    model = network()
    groups = make_optimizer(model, OptimizerSpec(decay_norms=False, weight_decay=0.1)).param_groups
    decayed = {p for g in groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {p for p in model.parameters() if p.dim() > 1}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def _patient(**changes: object) -> TrainSpec:
    # So fast that the loss soon rises again.
    fast = OptimizerSpec(name="sgd", lr=0.5, momentum=0.95, weight_decay=0.0)
    return spec(fast, evaluate_every="1it", duration="40it", lr_schedule=LearningRateSpec(name="constant"), **changes)


def test_training_stops_when_the_held_out_loss_stops_falling(tmp_path: Path) -> None:
    _, outcome = run(tmp_path / "a", {"name": "none"}, _patient(patience=3))
    losses = [entry["eval_loss"] for entry in outcome.history]
    assert outcome.steps == len(losses) < 40
    assert losses.index(min(losses)) == len(losses) - 1 - 3


@pytest.mark.parametrize("keep", ["last", "best"])
def test_which_weights_are_kept(tmp_path: Path, keep: str) -> None:
    model, outcome = run(tmp_path / "a", {"name": "none"}, _patient(patience=3, keep=keep))
    losses = [entry["eval_loss"] for entry in outcome.history]
    assert accuracy(model).loss == (min(losses) if keep == "best" else losses[-1])
    assert min(losses) < losses[-1]


def test_the_best_weights_survive_an_interruption(tmp_path: Path) -> None:
    settings = _patient(patience=3, keep="best")
    whole, outcome = run(tmp_path / "a", {"name": "none"}, settings)
    best = outcome.steps - 3
    resumed, again = stop_and_resume(tmp_path / "b", {"name": "none"}, settings, [(best + 1, True), (best + 2, False)])
    assert again.history == outcome.history
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
