"""The training loop. Every step depends on the state and the step number alone, so any step can be resumed."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.core.duration import Duration, Progress
from secateur.core.masks import Masks
from secateur.core.seeds import keyed_seed
from secateur.core.targets import Targets
from secateur.errors import DivergedError, StorageError, UsageError
from secateur.lab import checkpoint as ckpt
from secateur.lab.data import Loader
from secateur.lab.evaluate import Evaluation
from secateur.lab.listener import Interrupted, Listener
from secateur.lab.recipe import LearningRateSpec, OptimizerSpec, TrainSpec
from secateur.lab.runtime import Runtime
from secateur.regularizers.base import Regularizer
from secateur.sparsify.sparsifier import Sparsifier

__all__ = ["TrainResult", "learning_rate", "make_optimizer", "train"]


@dataclass(frozen=True)
class TrainResult:
    """What a training did.

    Args:
        history: one entry per evaluation.
        scores: what the method has learned about its targets, for the criterion `learned`; mostly empty.
    """

    steps: int
    seconds: float
    final_loss: float
    history: list[dict[str, Any]]
    scores: dict[str, Tensor]


def make_optimizer(model: nn.Module, spec: OptimizerSpec, undecayed: Collection[str] = ()) -> Optimizer:
    """The optimizer a recipe asks for, over all trainable parameters, by name; `undecayed` ones without decay."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise UsageError(f"{type(model).__name__}: every parameter is frozen, so there is nothing to train")
    spared = {n for n, p in named if n in undecayed or (p.dim() <= 1 and not spec.decay_norms)}
    groups: list[dict[str, Any]] = [
        {"params": [(n, p) for n, p in named if n not in spared], "weight_decay": spec.weight_decay},
        {"params": [(n, p) for n, p in named if n in spared], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if spec.name == "sgd":
        return torch.optim.SGD(groups, lr=spec.lr, momentum=spec.momentum, nesterov=spec.nesterov)
    kind = torch.optim.Adam if spec.name == "adam" else torch.optim.AdamW
    return kind(groups, lr=spec.lr)


def learning_rate(spec: LearningRateSpec, base: float, step: int, steps: int, steps_per_epoch: int) -> float:
    """Learning rate of step `step` (from 0) of `steps`."""
    warmup = Duration.parse(spec.warmup).steps(steps_per_epoch, steps)
    if step < warmup:
        return base * (step + 1) / (warmup + 1)
    if spec.name == "cosine":
        return base * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    passed = sum(step >= Duration.parse(m).steps(steps_per_epoch, steps) for m in spec.milestones)
    return base * spec.factor**passed


def train(
    model: nn.Module,
    loader: Loader,
    spec: TrainSpec,
    *,
    runtime: Runtime,
    regularizer: Regularizer,
    folder: Path,
    seed: int,
    evaluation: Callable[[nn.Module], Evaluation],
    targets: Targets | None = None,
    masks: Masks | None = None,
    first_step: int = 0,
    snapshot_at: int | None = None,
    listener: Listener | None = None,
) -> TrainResult:
    """Train `model` in place under a regularizer; checkpoints go to `folder` and are resumed from there.

    Args:
        masks: held at zero throughout, if given.
        first_step: start here in the schedules and the data, when the weights are those of that step.
        snapshot_at: keep the network as it is after this step, in `folder`'s `snapshot.safetensors`.

    Raises:
        DivergedError: the loss is not finite; the last good checkpoint stays in `folder`.
        Interrupted: the listener asked to stop; the state is saved.

    Randomness: global generators are forked and put back. On the CPU with the same number of threads, a
    resumed run ends with bitwise the same weights as an uninterrupted one.
    """
    listener = listener or Listener()
    model.to(runtime.device)
    steps = Duration.parse(spec.duration).steps(loader.steps_per_epoch)
    if steps < 1:
        raise UsageError(f"train.duration {spec.duration} is less than one step of {loader.steps_per_epoch} an epoch")
    sparsifier = Sparsifier(
        model, regularizer, steps=steps, steps_per_epoch=loader.steps_per_epoch, targets=targets, seed=seed
    )
    sparsifier.progress = Progress(first_step, steps, loader.steps_per_epoch)
    save_every = max(1, Duration.parse(spec.checkpoint_every).steps(loader.steps_per_epoch, steps))
    evaluate_every = max(1, Duration.parse(spec.evaluate_every).steps(loader.steps_per_epoch, steps))
    devices = [runtime.device] if runtime.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), sparsifier:
        # Attached before the optimizer is built, because a method may add parameters to learn.
        optimizer = make_optimizer(model, spec.optimizer, sparsifier.learned())
        engine, engine_optimizer = runtime.setup(model, optimizer)
        state = _State(folder, model, optimizer, sparsifier, spec, first_step)
        torch.manual_seed(keyed_seed(seed, "forward noise"))
        state.restore()
        hold = masks.hold(model, optimizer) if masks is not None else None
        model.train()
        for step in range(state.step, steps):
            if state.out_of_patience():
                break
            started = time.perf_counter()
            rate = learning_rate(spec.lr_schedule, spec.optimizer.lr, step, steps, loader.steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = rate
            inputs, labels = runtime.to_device(*loader.batch(step))
            loss: Tensor = nn.functional.cross_entropy(engine(inputs), labels) + sparsifier.penalty()
            value = float(loss.detach())
            if not math.isfinite(value):
                raise DivergedError(_diverged(f"the loss is {value}", step, loader.steps_per_epoch, rate, state))
            optimizer.zero_grad()
            runtime.backward(loss)
            if spec.grad_clip is not None:
                if hold is not None:
                    hold.zero_gradients_()
                runtime.clip(engine, engine_optimizer, spec.grad_clip)
            engine_optimizer.step()
            sparsifier.after_step()
            state.running.append(value)
            state.step, state.seconds = step + 1, state.seconds + time.perf_counter() - started
            if state.step % evaluate_every == 0 or state.step == steps:
                measured = evaluation(model)
                if not math.isfinite(measured.loss):
                    what = f"the loss on held-out data is {measured.loss}"
                    raise DivergedError(_diverged(what, step, loader.steps_per_epoch, rate, state))
                state.note(loader.steps_per_epoch, measured, rate)
            if state.step == snapshot_at:
                plain = {n: t for n, t in model.state_dict().items() if n not in sparsifier.learned()}
                ckpt.save_tensors(folder / "snapshot.safetensors", plain, {"step": state.step})
            listener.advanced(state.step, f"loss {value:.3f}")
            if listener.stop:
                state.save()
                raise Interrupted(f"interrupted at step {state.step} of {steps}; saved, run again to continue")
            if state.step % save_every == 0 and state.step < steps:
                state.save()
        if snapshot_at is not None and state.step < snapshot_at:
            raise UsageError(
                f"training ran out of patience at step {state.step}, before step {snapshot_at} that a loop rewinds to; "
                "rewind to an earlier one"
            )
        state.keep()
        if hold is not None:
            hold.remove()
        scores = {name: score.detach().cpu().clone() for name, score in sparsifier.scores().items()}
        sparsifier.finalize()
    return TrainResult(state.step - first_step, state.seconds, state.history[-1]["loss"], state.history, scores)


def _diverged(what: str, step: int, steps_per_epoch: int, rate: float, state: _State) -> str:
    return (
        f"{what} at step {step + 1} (epoch {step // steps_per_epoch + 1}), learning rate {rate:g}; "
        f"{state.kept()}; lower the learning rate or clip gradients (train.grad_clip)"
    )


class _State:
    """Everything that changes while training, and its checkpoint."""

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: Optimizer,
        sparsifier: Sparsifier,
        spec: TrainSpec,
        first_step: int,
    ) -> None:
        self._patience, self._keeps_best = spec.patience, spec.keep == "best"
        self._best: dict[str, Tensor] = {}
        self.path = folder / "checkpoint.safetensors"
        self._metrics = folder / "metrics.jsonl"
        self._model, self._optimizer, self._sparsifier = model, optimizer, sparsifier
        self.step = self.saved_step = first_step
        self.seconds = 0.0
        self.history: list[dict[str, Any]] = []
        self.running: list[float] = []  # losses since the last evaluation

    def kept(self) -> str:
        """What there is to go back to, in words."""
        if not self.saved_step:
            return "no checkpoint had been written yet"
        return f"the last good checkpoint (step {self.saved_step}) is in {self.path}"

    def note(self, steps_per_epoch: int, measured: Evaluation, rate: float) -> None:
        entry = {
            "step": self.step,
            "epoch": self.step // steps_per_epoch,
            "loss": sum(self.running) / len(self.running),
            "top1": measured.top1,
            "eval_loss": measured.loss,
            "lr": rate,
        }
        self.history.append(entry)
        self.running = []
        if self._keeps_best and self._evaluations_since_best() == 0:
            self._best = {name: t.detach().clone() for name, t in self._model.state_dict().items()}
        self._write_metrics("a", json.dumps(entry) + "\n")

    def _evaluations_since_best(self) -> int:
        losses = [entry["eval_loss"] for entry in self.history]
        return len(losses) - 1 - losses.index(min(losses))

    def out_of_patience(self) -> bool:
        """Whether the held-out loss has not fallen for as many evaluations as the recipe allows."""
        return self._patience is not None and bool(self.history) and self._evaluations_since_best() >= self._patience

    def keep(self) -> None:
        """Put back the best weights, if the recipe wants them rather than the last."""
        if self._best:
            self._model.load_state_dict(self._best)

    def _write_metrics(self, mode: str, text: str) -> None:
        try:
            with self._metrics.open(mode, encoding="utf-8") as stream:
                stream.write(text)
        except OSError as error:
            raise StorageError(
                f"cannot write {self._metrics}: {error.strerror or error}; free space or choose another --out"
            ) from error

    def save(self) -> None:
        """Write the checkpoint; raise `DivergedError` instead if a weight is not finite, and keep the last good one."""
        for name, tensor in self._model.state_dict().items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise DivergedError(
                    f'"{name}" is not finite after step {self.step}; {self.kept()}; lower the learning rate or clip '
                    "gradients (train.grad_clip)"
                )
        moments, plain = ckpt.optimizer_state(self._model, self._optimizer)
        parts = {
            "model": self._model.state_dict(),
            "optimizer": moments,
            "sparsifier": self._sparsifier.state_dict(),
            "rng": ckpt.global_rng(),
            "best": self._best,
        }
        tensors = {f"{part}/{name}": t for part, entries in parts.items() for name, t in entries.items()}
        values = {"step": self.step, "seconds": self.seconds, "history": self.history, "running": self.running}
        values["optimizer"] = plain
        ckpt.save_tensors(self.path, tensors, values)
        self.saved_step = self.step

    def restore(self) -> None:
        """Continue from the checkpoint if there is one; metrics written after it are dropped."""
        if self.path.is_file():
            tensors, values = ckpt.load_tensors(self.path)
            with ckpt.fitting(self.path):
                self._take(tensors, values)
        self._write_metrics("w", "".join(json.dumps(entry) + "\n" for entry in self.history))

    def _take(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "sparsifier": {}, "rng": {}, "best": {}}
        for name, tensor in tensors.items():
            part, _, key = name.partition("/")
            parts[part][key] = tensor
        self._model.load_state_dict(parts["model"])
        ckpt.restore_optimizer(self._model, self._optimizer, parts["optimizer"], values["optimizer"])
        self._sparsifier.load_state_dict(parts["sparsifier"])
        ckpt.restore_global_rng(parts["rng"])
        self._best = parts["best"]
        self.step = self.saved_step = int(values["step"])
        self.seconds, self.history = float(values["seconds"]), list(values["history"])
        self.running = list(values["running"])
