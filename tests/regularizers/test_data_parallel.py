"""Two processes, each with half of every batch (DistributedDataParallel): one network, one draw, averaged gradients.

Run as a program it is one of the two processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import secateur
from secateur.core.duration import Progress
from secateur.core.seeds import keyed_generator
from secateur.core.targets import unwrap
from secateur.errors import UsageError
from secateur.regularizers import REGULARIZERS, noisy_weight
from secateur.regularizers.attachment import Attachment
from secateur.regularizers.base import Regularizer
from secateur.regularizers.ddrop import DDrop
from secateur.regularizers.ddrop_scale import DDropScale
from secateur.regularizers.dropout import Dropout
from secateur.regularizers.gradual_pruning import GradualPruning
from secateur.regularizers.irrelevance import Irrelevance
from secateur.regularizers.l0 import L0
from secateur.regularizers.mask_pool import MaskPoolDropout
from secateur.regularizers.pgmpf import PGMPF
from secateur.regularizers.smallify import Smallify
from secateur.regularizers.soft_filter_pruning import SoftFilterPruning
from secateur.regularizers.targeted_dropout import TargetedDropout

RANKS, STEPS, HALF = 2, 3, 6

CASES: dict[str, Regularizer] = {name: REGULARIZERS.load(name)() for name in REGULARIZERS.names()} | {
    "gradual_pruning": GradualPruning(end=1.0, updates=3),
    "irrelevance": Irrelevance(factor=0.1),
    "pgmpf": PGMPF(block_from=1.0),
    # Equal scales, as at the start, are kept with keep_max.
    "ddrop_scale": DDropScale(keep_max=0.8),
    "dropout unit": Dropout(drop_rate=0.3, granularity="unit"),
    "targeted_dropout unit": TargetedDropout(gamma=0.5, granularity="unit"),
    # Layers taken for large ones.
    "dropout unit large": Dropout(drop_rate=0.3, granularity="unit"),
    "targeted_dropout unit large": TargetedDropout(gamma=0.5, granularity="unit"),
    "ddrop per batch": DDrop(keep_min=0.2, per_sample=False),
    "ddrop weight_norm": DDrop(keep_min=0.2, scores="weight_norm", l1=0.0),
    "ddrop_scale per batch": DDropScale(keep_min=0.2, per_sample=False),
    "mask_pool endless": MaskPoolDropout(pool=None),
    "gradual_pruning unit": GradualPruning(granularity="unit", end=1.0, updates=3),
    "soft_filter_pruning asymptotic": SoftFilterPruning(schedule="exponential"),
    "l0 weight": L0(granularity="weight", factor=1e-3),
    "smallify weight": Smallify(granularity="weight", factor=1e-3),
}
# Two starts of Python are what takes time: these run in the first, everything else in the second.
QUICK = {"targeted_dropout", "ddrop", "l0", "variational_dropout"}
OF_SAMPLES = {"ddrop", "ddrop weight_norm", "ddrop_scale", "variational_dropout"}


class _NormByPart(nn.BatchNorm1d):
    """A BatchNorm that one process computes as two do: each half of the batch by its own statistics."""

    parts = 1

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        return torch.cat([super(_NormByPart, self).forward(part) for part in x.chunk(self.parts)])


def network(parts: int = 1) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            *(nn.Linear(12, 10), _NormByPart(10), nn.ReLU(), nn.Linear(10, 8, bias=False), _NormByPart(8), nn.GELU()),
            nn.Linear(8, 4),
        )
        for module in net:
            if isinstance(module, _NormByPart):
                module.parts = parts
                nn.init.normal_(module.weight)
                # A dropped unit in front of it has no variance, and rounding is not to be blown up.
                module.eps = 0.1
    return net.train()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = keyed_generator(step, "batch")
    return torch.randn(RANKS * HALF, 12, generator=generator), torch.randint(4, (RANKS * HALF,), generator=generator)


def noise_of(attachment: Any) -> dict[str, Tensor]:
    """What a method multiplies or adds in this step, whatever it calls it."""
    found: dict[str, Tensor] = {}
    for kind in ("_masks", "_logistic", "_seeds", "_passing"):
        found |= {f"{kind} {name}": value.clone() for name, value in getattr(attachment, kind, {}).items()}
    for slot in getattr(attachment, "_slots", ()):
        if (multiplier := slot.multiplier) is not None:
            found[f"multiplier {slot.target.name}"] = multiplier
    running = getattr(attachment, "_running", None)
    for draw in running._draws.values() if running is not None else ():
        found[f"running {draw.slot.target.name}"] = draw.numbers()
    return found


@contextmanager
def sizes(name: str) -> Iterator[None]:
    """Within the block layers are large ones if the case is named so."""
    before, noisy_weight.SMALL = noisy_weight.SMALL, 0 if name.endswith(" large") else noisy_weight.SMALL
    try:
        yield
    finally:
        noisy_weight.SMALL = before


@dataclass
class Trained:
    """Three steps of one process. `local` are the gradients before they were averaged."""

    noise: list[dict[str, Tensor]] = field(default_factory=list)
    local: list[dict[str, Tensor]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    parameters: list[dict[str, Tensor]] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)


def train(model: nn.Module, attachment: Attachment, rows: slice) -> Trained:
    net, result = unwrap(model), Trained()
    local: dict[str, Tensor] = {}
    for name, parameter in net.named_parameters():
        # Behind the hooks of the method, in front of the average.
        parameter.register_hook(lambda gradient, name=name: local.update({name: gradient.clone()}))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        out = model(x[rows])
        result.noise.append(noise_of(attachment))
        (nn.functional.cross_entropy(out, y[rows]) + attachment.penalty()).backward()
        result.local.append(dict(local))
        result.gradients.append({n: p.grad.clone() for n, p in net.named_parameters()})
        optimizer.step()
        attachment.after_step(Progress(step + 1, STEPS, 1))
        result.parameters.append({n: p.detach().clone() for n, p in net.named_parameters()})
    result.state, result.scores = attachment.state_dict(), attachment.scores()
    masks = attachment.finalize()
    result.masks = {} if masks is None else {name: masks[name] for name in masks}
    return result


def alone(name: str) -> Trained:
    net = network(parts=RANKS)
    with sizes(name):
        return train(net, CASES[name].attach(net, seed=1), slice(None))


def _process(rank: int, folder: Path, quick: bool) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=RANKS)
    rows = slice(rank * HALF, (rank + 1) * HALF)
    found: dict[str, Any] = {}
    for name, spec in CASES.items():
        if (name in QUICK) != quick:
            continue
        net = network()
        with sizes(name):
            attachment = spec.attach(net, seed=1)
            found[name] = train(DistributedDataParallel(net), attachment, rows)
        net = network()
        wrapper = DistributedDataParallel(net)
        if not spec.learns:
            with sizes(name):
                found[f"{name}, around"] = train(wrapper, spec.attach(wrapper, seed=1), rows)
            continue
        found[f"{name}, around"] = _words(lambda wrapper=wrapper, spec=spec: spec.attach(wrapper))
        left = [n for n, _ in net.named_parameters()], [len(m._forward_hooks) for m in wrapper.modules()]
        found[f"{name}, left"] = left
        with spec.attach(net):
            found[f"{name}, late"] = _words(lambda wrapper=wrapper: wrapper(batch(0)[0]))
    # Compiled first, then attached, then wrapped.
    for name in () if quick else ("targeted_dropout", "l0"):
        # What a network of this class has been compiled to without hooks would be run for this one too.
        torch.compiler.reset()
        compiled: Any = torch.compile(network(), backend="aot_eager", fullgraph=True)
        attachment = CASES[name].attach(compiled, seed=1)
        found[f"{name}, compiled"] = train(DistributedDataParallel(compiled), attachment, rows)
    plain = {name: vars(value) if isinstance(value, Trained) else value for name, value in found.items()}
    torch.save(plain, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def _words(call: Any) -> str:
    try:
        call()
    except UsageError as error:
        return str(error)
    return "nothing was raised"


class Runs:
    """What both processes found, by case; each of the two groups is run when first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._found: dict[bool, list[dict[str, Any]]] = {}

    def __call__(self, name: str, quick: bool | None = None) -> list[Any]:
        quick = name.partition(",")[0] in QUICK if quick is None else quick
        if quick not in self._found:
            self._found[quick] = self._start("quick" if quick else "rest")
        return [ranks[name] for ranks in self._found[quick]]

    def _start(self, group: str) -> list[dict[str, Any]]:
        folder = self._folder / group
        folder.mkdir()
        source = str(Path(secateur.__file__).parents[1])
        environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        commands = [[sys.executable, __file__, str(rank), str(folder), group] for rank in range(RANKS)]
        running = [subprocess.Popen(c, env=environment, stderr=subprocess.PIPE, text=True) for c in commands]
        try:
            errors = [p.communicate(timeout=240)[1] for p in running]
        finally:
            for process in running:
                process.kill()
        assert [p.returncode for p in running] == [0] * RANKS, "\n".join(errors)[-4000:]
        found = [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]
        return [{n: Trained(**v) if isinstance(v, dict) else v for n, v in by_name.items()} for by_name in found]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("ranks"))


def cases(*without: str) -> pytest.MarkDecorator:
    slow = pytest.mark.slow
    named = [pytest.param(n, marks=() if n in QUICK else slow) for n in CASES if n not in without]
    return pytest.mark.parametrize("name", named)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def close(one: dict[str, Tensor], other: dict[str, Tensor], **tolerance: float) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[n], other[n], **tolerance) for n in one)


@cases()
def test_all_processes_hold_one_network(runs, name):
    first, second = runs(name)
    for one, other in zip(first.parameters, second.parameters, strict=True):
        assert same(one, other)
    for what in ("state", "scores", "masks"):
        assert same(getattr(first, what), getattr(second, what))
    # They did not simply see the same data.
    assert not same(first.local[0], second.local[0])


@cases()
def test_one_draw_a_step_but_of_samples(runs, name):
    first, second = runs(name)
    if CASES[name].draws_noise:
        assert all(first.noise[1:])
    for one, other in zip(first.noise, second.noise, strict=True):
        if name in OF_SAMPLES:
            assert one.keys() == other.keys()
            assert all(not torch.equal(one[n], other[n]) for n in one)
        else:
            assert same(one, other)


@cases()
def test_regularized_gradients_are_averaged(runs, name):
    first, second = runs(name)
    for step in range(STEPS):
        mean = {n: (g + second.local[step][n]) / 2 for n, g in first.local[step].items()}
        assert close(first.gradients[step], mean, rtol=1e-5, atol=1e-7)
        assert same(first.gradients[step], second.gradients[step])


# The noise of variational dropout is made from seeds that differ; the other is the test below.
@cases("irrelevance", "variational_dropout")
def test_two_processes_train_as_one_with_the_whole_batch(runs, name):
    whole, part = alone(name), runs(name)[0]
    for step in range(STEPS):
        assert close(part.gradients[step], whole.gradients[step], rtol=1e-4, atol=1e-6)
        assert close(part.parameters[step], whole.parameters[step], rtol=1e-4, atol=1e-6)
    for what in ("state", "masks"):
        assert same(getattr(part, what), getattr(whole, what))


@pytest.mark.slow
def test_irrelevance_sees_the_gradient_of_each_part(runs):
    """Its exponential is of the gradient before the average: the mean over processes of exp(-|g_rank|)."""
    plain, factor = runs("none"), CASES["irrelevance"].factor
    start = dict(network().named_parameters())
    for name in ("0.weight", "3.weight", "6.weight"):
        each = [p.local[0][name] + 2 * factor * (-p.local[0][name].abs()).exp() * start[name] for p in plain]
        expected = (each[0] + each[1]).detach() / 2
        torch.testing.assert_close(runs("irrelevance")[0].gradients[0][name], expected, rtol=1e-5, atol=1e-7)


@cases()
def test_attached_around_the_wrapper_it_is_the_same_or_refused(runs, name):
    if not CASES[name].learns:
        for inside, around in zip(runs(name), runs(f"{name}, around"), strict=True):
            assert all(same(*pair) for pair in zip(inside.parameters, around.parameters, strict=True))
            assert same(inside.state, around.state)
        return
    for words in (*runs(f"{name}, around"), *runs(f"{name}, late")):
        assert "attach to the bare model (or to the compiled one), then wrap it" in words
    for names, hooks in runs(f"{name}, left"):
        assert names == [n for n, _ in network().named_parameters()]
        assert not any(hooks)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["targeted_dropout", "l0"])
def test_compiled_then_attached_then_wrapped(runs, name):
    for compiled, plain in zip(runs(f"{name}, compiled", quick=False), runs(name), strict=True):
        for pair in zip(compiled.parameters, plain.parameters, strict=True):
            assert close(*pair, rtol=1e-4, atol=1e-6)
        assert same(compiled.state, plain.state)


if __name__ == "__main__":
    _process(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "quick")
