"""The contract of a regularizer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from secateur.core.duration import Progress
from secateur.errors import NoEffectError, UsageError
from secateur.regularizers.attachment import Attachment
from secateur.regularizers.base import Regularizer
from secateur.testing.networks import STEPS, STEPS_PER_EPOCH, batches, dense, loss, run, run_steps, trainable
from secateur.testing.snapshots import (
    check_spec,
    expect_step,
    generators,
    gradients,
    same_structure,
    same_values,
    structure,
    that,
    values,
)

__all__ = ["check_regularizer"]


def check_regularizer(regularizer: Regularizer, *, compiled: bool = True) -> None:
    """Check everything the contract of a regularizer promises.

    It is a frozen dataclass of plain values. Attaching and removing leaves keys, parameters and their order, types,
    hooks and flags as they were, in the middle of a step too. Attached, it is the identity in eval mode bitwise; the
    optimizer (with a closure too), `state_dict()` and copies see plain weights; its noise depends on its seed alone
    and leaves the global generators alone; it resumes bitwise; it works with gradient accumulation, frozen
    parameters, bf16 autocast and `torch.compile(fullgraph=True)`; attached to a compiled model that has already run, it
    acts or raises `NoEffectError`. A method that `learns` adds parameters while
    attached, says so when the optimizer does not train them, and folds them: after `finalize` the network in eval mode
    computes what it computed attached.

    Args:
        regularizer: the instance to check. Choose hyper-parameters that act (no drop rate of 0).
        compiled: also check under `torch.compile`, which takes several seconds.

    Raises: `AssertionError` for the first promise that is broken.
    """
    name = check_spec(regularizer)
    for check in (
        _check_silence,
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
    ):
        check(name, regularizer)
    if compiled:
        _check_compiled(name, regularizer)


def _check_trace(name: str, spec: Regularizer) -> None:
    network = trainable()
    shape, state = structure(network), values(network)
    attachment = spec.attach(network, seed=1)
    attached = structure(network, without=attachment.learned)
    for what in ("state_dict keys", "parameters", "types", "flags"):
        that(attached[what] == shape[what], f"{name}: attaching changed the model's {what}")
    that(bool(attachment.learned) == spec.learns, f"{name}: learns is {spec.learns}, learned {[*attachment.learned]}")
    attachment.remove()
    same_structure(f"{name}: attach then remove left a trace", shape, structure(network))
    same_values(f"{name}: attach then remove changed the model", state, values(network))
    attachment = spec.attach(network, seed=1)
    buffers = {n: b.clone() for n, b in network.named_buffers()}
    loss(network, attachment, batches(network)[0]).backward()
    attachment.remove()
    attachment.remove()
    for n, buffer in network.named_buffers():
        buffer.copy_(buffers[n])
    network.zero_grad(set_to_none=True)
    same_structure(f"{name}: removed in the middle of a step it left a trace", shape, structure(network))
    same_values(f"{name}: removed in the middle of a step it left other weights", state, values(network))


def _check_eval(name: str, spec: Regularizer) -> None:
    if spec.learns:
        _check_folding(name, spec)
        return
    network = trainable().eval()
    x, _ = batches(network)[0]
    plain = network(x)
    with spec.attach(network, seed=1) as attachment:
        that(torch.equal(network(x), plain), f"{name}: attached, the network in eval mode computes something else")
        loss(network.train(), attachment, batches(network)[1]).backward()
        for n, buffer in trainable().named_buffers():
            network.get_buffer(n).copy_(buffer)
        same = torch.equal(network.eval()(x), plain)
        that(same, f"{name}: in eval mode after a training forward pass the network computes something else")


def _check_folding(name: str, spec: Regularizer) -> None:
    network = trainable()
    data = batches(network)
    x, shape = data[0][0], structure(network.eval())
    attachment = spec.attach(network.train(), seed=1)
    run_steps(network, attachment, torch.optim.SGD(network.parameters(), lr=0.1), data, range(3))
    network.eval()
    gated, again = network(x), network(x)
    that(torch.equal(gated, again), f"{name}: in eval mode the attached network gives two answers to one question")
    attachment.finalize()
    network.zero_grad(set_to_none=True)
    same_structure(f"{name}: finalize left a trace", shape, structure(network))
    close = torch.allclose(network(x), gated, rtol=1e-4, atol=1e-5)
    that(close, f"{name}: after finalize the network in eval mode computes something else than attached")
    network = trainable()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with spec.attach(network, seed=1) as attachment:
        loss(network, attachment, batches(network)[0]).backward()
        try:
            optimizer.step()
        except UsageError:
            return
    raise AssertionError(f"{name}: an optimizer built before attaching went unnoticed; use Attachment.learn")


def _check_plain_weights(name: str, spec: Regularizer) -> None:
    network = trainable()
    with spec.attach(network, seed=1) as attachment:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for step in range(3):
            before = {n: p.detach().clone() for n, p in network.named_parameters()}
            optimizer.zero_grad()
            loss(network, attachment, batches(network)[step]).backward()
            optimizer.step()
            expect_step(f"{name}: step {step}: the optimizer did not update the plain weights", network, before)
            attachment.after_step(Progress(step + 1, STEPS, STEPS_PER_EPOCH))
        before = {n: p.detach().clone() for n, p in network.named_parameters()}
        loss(network, attachment, batches(network)[0]).backward()
        saved = network.state_dict()
        for n, tensor in before.items():
            that(torch.equal(saved[n], tensor), f"{name}: state_dict() within a step holds {n} with noise in it")


def _check_closure(name: str, spec: Regularizer) -> None:
    network = trainable()
    with spec.attach(network, seed=1) as attachment:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        before = {n: p.detach().clone() for n, p in network.named_parameters()}

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss(network, attachment, batches(network)[0])
            value.backward()
            return value

        optimizer.step(closure)
        message = f"{name}: optimizer.step(closure) did not update the plain weights"
        expect_step(message, network, before)
        # A method may move what it has added itself (to keep it within bounds).
        ours = attachment.learned
        attachment.after_step(Progress(1, STEPS, STEPS_PER_EPOCH))
        if spec.draws_noise:  # others may prune here
            expect_step(message, network, before, without=ours)


def _check_copy(name: str, spec: Regularizer) -> None:
    network = trainable()
    x, _ = batches(network)[0]
    with spec.attach(network, seed=1) as attachment:
        that(isinstance(attachment, Attachment), f"{name}: attach returned {type(attachment).__name__}, no Attachment")
        twin = copy.deepcopy(network)
        same = torch.equal(twin(x), trainable()(x))
        that(same, f"{name}: a deep copy of an attached model is not a plain model (it still has noise)")


def _check_seed(name: str, spec: Regularizer) -> None:
    network, untouched = trainable(), generators()
    plain = run(trainable(), None, STEPS)
    first, again, other = (run(copy.deepcopy(network), spec, STEPS, seed=s) for s in (1, 1, 2))
    same_values(f"{name}: trained twice with one seed", first, again)
    that(untouched == generators(), f"{name}: it used or seeded a global random generator; draw from the stream")
    if spec.draws_noise:
        differs = any(not torch.equal(first[n], plain[n]) for n in plain)
        way_out = "or say draws_noise = False, if it draws none"
        what = "says it draws noise, but training under it equals plain training bitwise"
        that(differs, f"{name}: {what}; choose settings that act, {way_out}")
        differs = any(not torch.equal(first[n], other[n]) for n in first)
        what = "two seeds gave the same training bitwise; the noise ignores its seed"
        that(differs, f"{name}: {what}; draw it from the attachment's stream, {way_out}")


def _check_resume(name: str, spec: Regularizer) -> None:
    network, twin = trainable(), trainable()
    whole = run(network, spec, STEPS, seed=1)
    state: dict[str, Any] = {}
    run(twin, spec, 3, seed=1, save=state)
    tensors = all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state["attachment"].items())
    that(tensors, f"{name}: state_dict() holds other things than tensors by name: {state['attachment']!r:.200}")
    resumed = run(trainable(), spec, STEPS, seed=99, load=state)
    same_values(f"{name}: resumed from its state in a fresh attachment, training", whole, resumed)


def _check_accumulation(name: str, spec: Regularizer) -> None:
    network = trainable()
    data = batches(network)
    parts: list[dict[str, Tensor]] = []
    with spec.attach(network, seed=1) as attachment:
        for batch in data[:2]:
            network.zero_grad()
            loss(network, attachment, batch).backward()
            parts.append(gradients(network))
    network = trainable()
    with spec.attach(network, seed=1) as attachment:
        for batch in data[:2]:
            loss(network, attachment, batch).backward()
        for n, total in gradients(network).items():
            same = torch.allclose(total, parts[0][n] + parts[1][n], rtol=1e-5, atol=1e-6)
            that(same, f"{name}: two accumulated backward passes do not add up to the sum of both, in {n}")


def _check_frozen(name: str, spec: Regularizer) -> None:
    network = trainable()
    frozen = [p for n, p in network.named_parameters() if n.startswith(("conv1", "norm1"))]
    for parameter in frozen:
        parameter.requires_grad_(False)
    before, shape = [p.detach().clone() for p in frozen], structure(network)
    run(network, spec, 3, seed=1)
    same = all(torch.equal(p, b) for p, b in zip(frozen, before, strict=True))
    that(same, f"{name}: frozen parameters changed")
    same_structure(f"{name}: with frozen parameters it left a trace", shape, structure(network))


def _check_autocast(name: str, spec: Regularizer) -> None:
    network = trainable()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        final = run(network, spec, 3, seed=1)
    for n, tensor in final.items():
        that(tensor.dtype != torch.bfloat16, f"{name}: under autocast {n} became {tensor.dtype}")
        that(bool(tensor.isfinite().all()), f"{name}: under bf16 autocast {n} is not finite after 3 steps")


def _check_silence(name: str, spec: Regularizer) -> None:
    with spec.attach(trainable(), seed=1) as attachment:
        penalty = torch.as_tensor(attachment.penalty())
        that(penalty.numel() == 1 and bool(penalty.isfinite()), f"{name}: penalty() is {penalty}, expected a number")
        if not spec.draws_noise:
            return
        try:
            attachment.after_step(Progress(1, STEPS, STEPS_PER_EPOCH))
        except NoEffectError:
            return
    raise AssertionError(f"{name}: a step without a training forward pass went unnoticed; expected NoEffectError")


def _check_compiled(name: str, spec: Regularizer) -> None:
    eager = run(dense().train(), spec, 3, seed=1)
    for ran_before in (False, True):
        network = dense().train()
        state = copy.deepcopy(network.state_dict())
        torch._dynamo.reset()
        try:
            compiled: Any = torch.compile(network, backend="aot_eager", fullgraph=True)
            if ran_before:
                # Its graph does not look for hooks any more.
                loss(compiled, None, batches(network)[0]).backward()
                network.load_state_dict(state)
            shape = structure(network)
            final = run(network, spec, 3, seed=1, call=compiled)
        except NoEffectError as error:
            that(ran_before, f"{name}: under torch.compile it says: {error}")
            final = eager
        except Exception as error:
            raise AssertionError(
                f"{name}: under torch.compile(fullgraph=True) it failed: {type(error).__name__}: {str(error)[:400]}"
            ) from error
        finally:
            torch._dynamo.reset()
        for n, tensor in eager.items():
            same = torch.allclose(tensor, final[n], rtol=1e-3, atol=1e-5)
            ended = "compiled training ends elsewhere than eager training"
            if ran_before:
                ended = "attached to a compiled model that ran before, it neither acts fully nor raises NoEffectError"
            that(same, f"{name}: {ended}: {n} differs")
        same_structure(f"{name}: under torch.compile it left a trace", shape, structure(network))
