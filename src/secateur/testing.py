"""The contracts of plug-ins, as checks that anyone can run against their own criterion or regularizer.

Each check raises `AssertionError` saying what broke and where, and returns None when all is well. They train and
score small networks on the CPU for a few steps and take a second or so (`compiled=True` several).
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import optimizer as _optimizers

from secateur.core.duration import Progress
from secateur.core.granularity import Unit, Weight
from secateur.core.seeds import keyed_generator
from secateur.core.targets import Targets, find_targets
from secateur.criteria.base import Criterion, Need
from secateur.criteria.driver import cell_scores, gather_evidence, score_targets
from secateur.errors import NoEffectError
from secateur.regularizers.attachment import Attachment
from secateur.regularizers.base import Regularizer

__all__ = ["check_criterion", "check_regularizer"]

_STEPS, _EPOCH = 8, 2
_EVIDENCE = ("weight", "gradient", "norm_scale", "mean_abs", "variance", "zero_fraction", "activation_gradient")
_Batch = tuple[Tensor, Tensor]
_Loss = nn.functional.cross_entropy


def check_criterion(criterion: Criterion, *, informed: bool = True) -> None:
    """Check everything the contract of a criterion promises.

    It is a frozen dataclass of plain values; declares its needs and reads no other evidence; returns finite scores
    of the right shape, the same every time, on linear, grouped, depthwise and transposed layers; changes neither
    the model (parameters, buffers, gradients, mode, hooks, flags), nor its evidence, nor the global generators.

    Args:
        criterion: the instance to check.
        informed: it looks at the network, so a dead unit (weights, bias and gamma zero) must rank last. Pass False
            for controls that do not, such as random scores.

    Raises: `AssertionError` for the first promise that is broken.
    """
    name = _check_spec(criterion)
    _that(isinstance(criterion.needs, frozenset), f"{name}: needs is {criterion.needs!r}, expected a frozenset")
    unknown = criterion.needs - set(get_args(Need))
    _that(not unknown, f"{name}: needs {sorted(unknown)}, which the driver does not know; known: {get_args(Need)}")
    shapes = set(criterion.granularities)
    _that(bool(shapes) and shapes <= {"weight", "unit"}, f"{name}: granularities {criterion.granularities!r}")
    _that(criterion.pool in ("sum", "mean", "l1", "l2"), f"{name}: pool {criterion.pool!r} is not sum, mean, l1 or l2")
    for network in (_dense(), _convolutional()):
        # Its head has no BatchNorm behind it.
        targets = find_targets(network, exclude=["head"] if "norm" in criterion.needs else [])
        _check_scores(name, criterion, network, targets)
        if informed:
            _check_dead_unit(name, criterion, network, targets)


def check_regularizer(regularizer: Regularizer, *, compiled: bool = True) -> None:
    """Check everything the contract of a regularizer promises.

    It is a frozen dataclass of plain values. Attaching and removing leaves keys, parameters and their order, types,
    hooks and flags as they were, in the middle of a step too. Attached, it is the identity in eval mode bitwise; the
    optimizer (with a closure too), `state_dict()` and copies see plain weights; its noise depends on its seed alone
    and leaves the global generators alone; it resumes bitwise; it works with gradient accumulation, frozen
    parameters, bf16 autocast and `torch.compile(fullgraph=True)`.

    Args:
        regularizer: the instance to check. Choose hyper-parameters that act (no drop rate of 0).
        compiled: also check under `torch.compile`, which takes several seconds.

    Raises: `AssertionError` for the first promise that is broken.
    """
    name = _check_spec(regularizer)
    for check in (
        _check_trace,
        _check_eval,
        _check_plain_weights,
        _check_closure,
        _check_copy,
        _check_seed,
        _check_resume,
        _check_accumulation,
        _check_frozen,
        _check_autocast,
        _check_silence,
    ):
        check(name, regularizer)
    if compiled:
        _check_compiled(name, regularizer)


def _that(met: bool, message: str) -> None:
    # Not the assert statement: the checks must hold under python -O too.
    if not met:
        raise AssertionError(message)


def _check_spec(spec: Any) -> str:
    name = type(spec).__name__
    frozen = dataclasses.is_dataclass(spec) and type(spec).__dataclass_params__.frozen  # type: ignore[attr-defined]
    _that(frozen, f"{name}: expected a frozen dataclass (@dataclass(frozen=True))")
    fields = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.init}
    try:
        again = type(spec)(**json.loads(json.dumps(fields)))
    except (TypeError, ValueError) as error:
        raise AssertionError(f"{name}: its fields do not go through JSON and back: {error}") from error
    _that(again == spec, f"{name}: rebuilt from its fields as JSON it is {again}, expected {spec}")
    _that(bool(spec.summary), f"{name}: summary is empty; tables and cards need one line")
    return name


# Criteria


def _check_scores(name: str, criterion: Criterion, network: nn.Module, targets: Targets) -> None:
    before, generators = _values(network), _generators()
    try:
        first, again = (score_targets(network, targets, [criterion], batches=_batches(network))[0] for _ in range(2))
    except Exception as error:
        raise AssertionError(
            f"{name}: scoring {type(network).__name__} with the evidence it declares ({sorted(criterion.needs)}) "
            f"failed: {type(error).__name__}: {error}"
        ) from error
    _same_values(f"{name}: scoring changed the model", before, _values(network))
    _that(generators == _generators(), f"{name}: scoring used or seeded a global random generator; key your own")
    for target in targets:
        score, where = first[target.name], f"{name}: score of {target.name} ({target.kind}, groups {target.groups})"
        _that(score.is_floating_point(), f"{where} has dtype {score.dtype}, expected a float")
        _that(bool(score.isfinite().all()), f"{where} is not finite")
        _that(torch.equal(score, again[target.name]), f"{where} differs when computed again from the same data")
        whole = "weight" in criterion.granularities and tuple(score.shape) == target.shape
        per_unit = "unit" in criterion.granularities and tuple(score.shape) == (target.units,)
        _that(
            whole or per_unit, f"{where} has shape {list(score.shape)}, which granularities {criterion.granularities}"
            f" do not allow for a parameter {list(target.shape)} of {target.units} units",
        )
    for granularity in [Weight()] * ("weight" in criterion.granularities) + [Unit()]:
        for key, cells in cell_scores(criterion, granularity, targets, first).items():
            expected = targets[key].shape if granularity == Weight() else (targets[key].units,)
            _that(
                tuple(cells.shape) == expected,
                f"{name}: pooled to {granularity}, {key} has cells {list(cells.shape)}, expected {list(expected)}",
            )
    _check_evidence(name, criterion, network, targets)


def _check_evidence(name: str, criterion: Criterion, network: nn.Module, targets: Targets) -> None:
    for key, evidence in gather_evidence(network, targets, criterion.needs, batches=_batches(network)).items():
        given = {f: getattr(evidence, f) for f in _EVIDENCE if getattr(evidence, f) is not None}
        copies = {f: tensor.clone() for f, tensor in given.items()}
        criterion.score(evidence)
        for field, tensor in given.items():
            _that(torch.equal(tensor, copies[field]), f"{name}: score wrote into evidence.{field} of {key}")


@torch.no_grad()
def _check_dead_unit(name: str, criterion: Criterion, network: nn.Module, targets: Targets) -> None:
    dead = 1
    network = copy.deepcopy(network)
    for target in targets:
        weight = network.get_parameter(target.name)
        rows = target.rows(weight).clone()
        rows[dead] = 0.0
        weight.copy_(target.unrows(rows))
        if target.bias is not None:
            network.get_parameter(target.bias)[dead] = 0.0
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.weight[dead] = module.bias[dead] = 0.0
    (scores,) = score_targets(network, targets, [criterion], batches=_batches(network))
    for key, cells in cell_scores(criterion, Unit(), targets, scores).items():
        cells = cells.abs() if criterion.absolute else cells
        _that(
            bool(cells[dead] <= cells.min()),
            f"{name}: in {key} a dead unit scores {float(cells[dead]):g}, above the lowest {float(cells.min()):g}; "
            "higher must mean keep (pass informed=False for a control that ignores the network)",
        )


# Regularizers


def _check_trace(name: str, spec: Regularizer) -> None:
    network = _trainable(spec)
    structure, values = _structure(network), _values(network)
    attachment = spec.attach(network, seed=1)
    attached = _structure(network)
    for what in ("state_dict keys", "parameters", "types", "flags"):
        _that(attached[what] == structure[what], f"{name}: attaching changed the model's {what}")
    attachment.remove()
    _same_structure(f"{name}: attach then remove left a trace", structure, _structure(network))
    _same_values(f"{name}: attach then remove changed the model", values, _values(network))
    attachment = spec.attach(network, seed=1)
    buffers = {n: b.clone() for n, b in network.named_buffers()}
    _loss(network, attachment, _batches(network)[0]).backward()
    attachment.remove()
    attachment.remove()
    for n, buffer in network.named_buffers():
        buffer.copy_(buffers[n])
    network.zero_grad(set_to_none=True)
    _same_structure(f"{name}: removed in the middle of a step it left a trace", structure, _structure(network))
    _same_values(f"{name}: removed in the middle of a step it left other weights", values, _values(network))


def _check_eval(name: str, spec: Regularizer) -> None:
    network = _trainable(spec).eval()
    x, _ = _batches(network)[0]
    plain = network(x)
    with spec.attach(network, seed=1) as attachment:
        _that(torch.equal(network(x), plain), f"{name}: attached, the network in eval mode computes something else")
        _loss(network.train(), attachment, _batches(network)[1]).backward()
        for n, buffer in _trainable(spec).named_buffers():
            network.get_buffer(n).copy_(buffer)
        same = torch.equal(network.eval()(x), plain)
        _that(same, f"{name}: in eval mode after a training forward pass the network computes something else")


def _check_plain_weights(name: str, spec: Regularizer) -> None:
    network = _trainable(spec)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with spec.attach(network, seed=1) as attachment:
        for step in range(3):
            before = {n: p.detach().clone() for n, p in network.named_parameters()}
            optimizer.zero_grad()
            _loss(network, attachment, _batches(network)[step]).backward()
            optimizer.step()
            _expect_step(f"{name}: step {step}: the optimizer did not update the plain weights", network, before)
            attachment.after_step(Progress(step + 1, _STEPS, _EPOCH))
        before = {n: p.detach().clone() for n, p in network.named_parameters()}
        _loss(network, attachment, _batches(network)[0]).backward()
        saved = network.state_dict()
        for n, tensor in before.items():
            _that(torch.equal(saved[n], tensor), f"{name}: state_dict() within a step holds {n} with noise in it")


def _check_closure(name: str, spec: Regularizer) -> None:
    network = _trainable(spec)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with spec.attach(network, seed=1) as attachment:
        before = {n: p.detach().clone() for n, p in network.named_parameters()}

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = _loss(network, attachment, _batches(network)[0])
            value.backward()
            return value

        optimizer.step(closure)  # type: ignore[arg-type]
        attachment.after_step(Progress(1, _STEPS, _EPOCH))
        _expect_step(f"{name}: optimizer.step(closure) did not update the plain weights", network, before)


def _check_copy(name: str, spec: Regularizer) -> None:
    network = _trainable(spec)
    x, _ = _batches(network)[0]
    with spec.attach(network, seed=1) as attachment:
        _that(isinstance(attachment, Attachment), f"{name}: attach returned {type(attachment).__name__}, no Attachment")
        twin = copy.deepcopy(network)
        same = torch.equal(twin(x), _trainable(spec)(x))
        _that(same, f"{name}: a deep copy of an attached model is not a plain model (it still has noise)")


def _check_seed(name: str, spec: Regularizer) -> None:
    network, generators = _trainable(spec), _generators()
    plain = _run(_trainable(spec), None, _STEPS)
    first, again, other = (_run(copy.deepcopy(network), spec, _STEPS, seed=s) for s in (1, 1, 2))
    _same_values(f"{name}: trained twice with one seed", first, again)
    _that(generators == _generators(), f"{name}: it used or seeded a global random generator; draw from the stream")
    if spec.draws_noise:
        differs = any(not torch.equal(first[n], plain[n]) for n in first)
        _that(differs, f"{name}: says it draws noise, but training under it equals plain training bitwise")
        differs = any(not torch.equal(first[n], other[n]) for n in first)
        _that(differs, f"{name}: two seeds gave the same training bitwise; the noise ignores its seed")


def _check_resume(name: str, spec: Regularizer) -> None:
    network, twin = _trainable(spec), _trainable(spec)
    whole = _run(network, spec, _STEPS, seed=1)
    state: dict[str, Any] = {}
    _run(twin, spec, 3, seed=1, save=state)
    tensors = all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state["attachment"].items())
    _that(tensors, f"{name}: state_dict() holds other things than tensors by name: {state['attachment']!r:.200}")
    fresh = _trainable(spec)
    fresh.load_state_dict(state["model"], strict=True)
    resumed = _run(fresh, spec, _STEPS, seed=99, load=state)
    _same_values(f"{name}: resumed from its state in a fresh attachment, training", whole, resumed)


def _check_accumulation(name: str, spec: Regularizer) -> None:
    network = _trainable(spec)
    batches = _batches(network)
    parts: list[dict[str, Tensor]] = []
    with spec.attach(network, seed=1) as attachment:
        for batch in batches[:2]:
            network.zero_grad()
            _loss(network, attachment, batch).backward()
            parts.append(_gradients(network))
    network = _trainable(spec)
    with spec.attach(network, seed=1) as attachment:
        for batch in batches[:2]:
            _loss(network, attachment, batch).backward()
        for n, total in _gradients(network).items():
            same = torch.allclose(total, parts[0][n] + parts[1][n], rtol=1e-5, atol=1e-6)
            _that(same, f"{name}: two accumulated backward passes do not add up to the sum of both, in {n}")


def _check_frozen(name: str, spec: Regularizer) -> None:
    network = _trainable(spec)
    frozen = [p for n, p in network.named_parameters() if n.startswith(("conv1", "norm1"))]
    for parameter in frozen:
        parameter.requires_grad_(False)
    before, structure = [p.detach().clone() for p in frozen], _structure(network)
    _run(network, spec, 3, seed=1)
    same = all(torch.equal(p, b) for p, b in zip(frozen, before, strict=True))
    _that(same, f"{name}: frozen parameters changed")
    _same_structure(f"{name}: with frozen parameters it left a trace", structure, _structure(network))


def _check_autocast(name: str, spec: Regularizer) -> None:
    network = _trainable(spec)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        final = _run(network, spec, 3, seed=1)
    for n, tensor in final.items():
        _that(tensor.dtype != torch.bfloat16, f"{name}: under autocast {n} became {tensor.dtype}")
        _that(bool(tensor.isfinite().all()), f"{name}: under bf16 autocast {n} is not finite after 3 steps")


def _check_silence(name: str, spec: Regularizer) -> None:
    with spec.attach(_trainable(spec), seed=1) as attachment:
        penalty = torch.as_tensor(attachment.penalty())
        _that(penalty.numel() == 1 and bool(penalty.isfinite()), f"{name}: penalty() is {penalty}, expected a number")
        if not spec.draws_noise:
            return
        try:
            attachment.after_step(Progress(1, _STEPS, _EPOCH))
        except NoEffectError:
            return
    raise AssertionError(f"{name}: a step without a training forward pass went unnoticed; expected NoEffectError")


def _check_compiled(name: str, spec: Regularizer) -> None:
    eager = _run(_trainable(spec), spec, 3, seed=1)
    network = _trainable(spec)
    torch._dynamo.reset()
    try:
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
        structure = _structure(network)
        final = _run(network, spec, 3, seed=1, call=compiled)
    except Exception as error:
        raise AssertionError(
            f"{name}: under torch.compile(fullgraph=True) it failed: {type(error).__name__}: {str(error)[:400]}"
        ) from error
    finally:
        torch._dynamo.reset()
    for n, tensor in eager.items():
        same = torch.allclose(tensor, final[n], rtol=1e-3, atol=1e-5)
        _that(same, f"{name}: compiled training ends elsewhere than eager training, in {n}")
    _same_structure(f"{name}: under torch.compile it left a trace", structure, _structure(network))


# Networks, data and snapshots


class _Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm1 = nn.Linear(12, 10), nn.BatchNorm1d(10)
        self.fc2, self.norm2 = nn.Linear(10, 8, bias=False), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.fc1(x)))
        return self.head(nn.functional.gelu(self.norm2(self.fc2(x))))


class _Convolutional(nn.Module):
    """Plain, grouped, depthwise and transposed convolutions, a residual sum, in-place functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.grouped, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.norm3 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.up, self.norm4 = nn.ConvTranspose2d(8, 6, 2, groups=2), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.norm1(self.conv1(x)))
        y = nn.functional.relu(self.norm2(self.grouped(x)), inplace=True)
        y = self.norm3(self.depthwise(y))
        y += x
        y = torch.relu(self.norm4(self.up(torch.relu(y))))
        return self.head(y.mean((2, 3)))


def _dense() -> nn.Module:
    return _drawn(_Dense)


def _convolutional() -> nn.Module:
    return _drawn(_Convolutional)


def _trainable(spec: Regularizer) -> nn.Module:
    return _convolutional().train()


@torch.no_grad()
def _drawn(build: Callable[[], nn.Module]) -> nn.Module:
    """A network with every parameter and statistic random, the same each time, global generators untouched."""
    with torch.random.fork_rng(devices=[]):
        network = build()
    generator = keyed_generator(0, "testing")
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point():
            scale = 1.0 if tensor.dim() < 2 else float(tensor[0].numel()) ** -0.5
            tensor.copy_(torch.empty(tensor.shape).normal_(0.0, scale, generator=generator))
    for name, buffer in network.named_buffers():
        if name.endswith("running_var"):
            buffer.abs_().add_(0.5)
    return network.eval()


def _batches(network: nn.Module) -> list[_Batch]:
    generator = keyed_generator(1, "testing")
    shape = (12,) if isinstance(network, _Dense) else (3, 5, 5)
    return [
        (torch.randn(size, *shape, generator=generator), torch.randint(4, (size,), generator=generator))
        for size in (6, 6, 5)
    ]


def _loss(model: Any, attachment: Attachment | None, batch: _Batch) -> Tensor:
    value = _Loss(model(batch[0]), batch[1])
    return value if attachment is None else value + attachment.penalty()


def _run(
    network: nn.Module,
    spec: Regularizer | None,
    until: int,
    *,
    seed: int = 0,
    save: dict[str, Any] | None = None,
    load: dict[str, Any] | None = None,
    call: Any = None,
) -> dict[str, Tensor]:
    """Train up to step `until` of a run of `_STEPS`; return all parameters and buffers."""
    model = network if call is None else call
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    batches, first = _batches(network), 0
    with _attached(spec, model, seed) as attachment:
        if load is not None and attachment is not None:
            optimizer.load_state_dict(load["optimizer"])
            attachment.load_state_dict(load["attachment"])
            first = load["step"]
        for step in range(first, until):
            optimizer.zero_grad()
            _loss(model, attachment, batches[step % len(batches)]).backward()
            optimizer.step()
            if attachment is not None:
                attachment.after_step(Progress(step + 1, _STEPS, _EPOCH))
        if save is not None and attachment is not None:
            save.update(model=copy.deepcopy(network.state_dict()), optimizer=copy.deepcopy(optimizer.state_dict()))
            save.update(attachment=attachment.state_dict(), step=until)
    return {n: t.detach().clone() for n, t in network.state_dict().items()}


@contextmanager
def _attached(spec: Regularizer | None, model: nn.Module, seed: int) -> Iterator[Attachment | None]:
    if spec is None:
        yield None
    else:
        with spec.attach(model, seed=seed) as attachment:
            yield attachment


def _expect_step(message: str, network: nn.Module, before: dict[str, Tensor]) -> None:
    for n, parameter in network.named_parameters():
        expected = before[n] if parameter.grad is None else before[n].add(parameter.grad, alpha=-0.1)
        _that(torch.allclose(parameter, expected, rtol=0, atol=1e-7), f"{message}: {n} is not w - lr * gradient")


def _gradients(network: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


def _values(network: nn.Module) -> dict[str, Tensor]:
    """Every parameter, buffer and gradient, with the mode and hooks as numbers."""
    values = {n: t.detach().clone() for n, t in network.state_dict().items()}
    values |= {f"gradient of {n}": g for n, g in _gradients(network).items()}
    for path, module in network.named_modules():
        values[f'mode of "{path}"'] = torch.tensor(module.training)
        values[f'hooks of "{path}"'] = torch.tensor(_hook_count(module))
    values |= {f"requires_grad of {n}": torch.tensor(p.requires_grad) for n, p in network.named_parameters()}
    return values


def _same_values(what: str, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    for name in sorted(before.keys() ^ after.keys()):
        raise AssertionError(f"{what}: {name} is on one side only")
    for name, tensor in before.items():
        _that(torch.equal(tensor, after[name]), f"{what}: {name} differs")


def _structure(network: nn.Module) -> dict[str, Any]:
    return {
        "state_dict keys": list(network.state_dict()),
        "parameters": [(n, id(p)) for n, p in network.named_parameters(remove_duplicate=False)],
        "types": [(n, type(m)) for n, m in network.named_modules()] + [type(p) for p in network.parameters()],
        "flags": [p.requires_grad for p in network.parameters()] + [m.training for m in network.modules()],
        "hooks": [(n, _hook_count(m)) for n, m in network.named_modules()],
        "attributes": [(n, sorted(vars(m))) for n, m in network.named_modules()],
        "parameter hooks": [(n, p._backward_hooks is None) for n, p in network.named_parameters()],
        "global optimizer hooks": len(_optimizers._global_optimizer_pre_hooks)
        + len(_optimizers._global_optimizer_post_hooks),
    }


def _same_structure(what: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    for key, value in before.items():
        _that(value == after[key], f"{what}: {key} differ: {_first_difference(value, after[key])}")


def _first_difference(before: Any, after: Any) -> str:
    if isinstance(before, list) and isinstance(after, list):
        for one, other in zip(before, after, strict=False):
            if one != other:
                return f"{one} became {other}"
    return f"{before} became {after}"[:300]


def _hook_count(module: nn.Module) -> int:
    return sum(len(value) for key, value in vars(module).items() if "hooks" in key and isinstance(value, dict))


def _generators() -> tuple[bytes, bytes]:
    numpy_state = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), repr((numpy_state[1].tolist(), numpy_state[2:])).encode()  # type: ignore[index, union-attr]
