"""Fine-tuning as the code released with stochastic pruning does it (`sp_paper_ft`), oddities included."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.core.masks import Masks
from secateur.core.seeds import keyed_generator, keyed_seed
from secateur.core.targets import Targets
from secateur.errors import DivergedError, UsageError
from secateur.lab import checkpoint as ckpt
from secateur.lab.data import Dataset, Loader
from secateur.lab.listener import Interrupted, Listener

__all__ = ["BASE_RATE", "fine_tune_as_published", "learning_rate", "part_loader"]

BASE_RATE = 1e-4
_BATCH, _MOMENTUM, _DECAY, _CLIP = 128, 0.9, 5e-4, 0.1
_BATCH_NORM = nn.modules.batchnorm._BatchNorm


def learning_rate(step: int, epochs: int) -> float:
    """The rate of step `step` (from 0): between 1e-4 and 0 and back in every 2 `epochs` steps.

    The schedule is a cosine over `epochs` steps, and the released code moves it on with every batch, not every epoch.

    Examples:
        >>> [round(learning_rate(step, 100), 9) for step in (0, 50, 100, 200)]
        [0.0001, 5e-05, 0.0, 0.0001]
    """
    return BASE_RATE * (1.0 + math.cos(math.pi * step / epochs)) / 2.0


def part_loader(data: Dataset, images: int, seed: int) -> Loader:
    """Batches of `images` training images drawn at random, shuffled, cropped and mirrored.

    Randomness: which images: the stream `(seed, "fine-tuning part")`; order and crops as in `Loader`.
    """
    if images > len(data.train_labels):
        raise UsageError(f"images {images}: the training set has {len(data.train_labels)}; give fewer")
    generator = keyed_generator(seed, "fine-tuning part")
    part = torch.randperm(len(data.train_labels), generator=generator)[:images]
    return Loader(
        data.train_images[part],
        data.train_labels[part],
        min(_BATCH, images),
        seed,
        normalize=data.normalize,
        augment="crop_flip",
    )


def fine_tune_as_published(
    model: nn.Module,
    loader: Loader,
    masks: Masks,
    targets: Targets,
    epochs: int,
    *,
    folder: Path,
    seed: int,
    listener: Listener | None = None,
) -> int:
    """Train `model` in place; returns the number of steps. A checkpoint an epoch goes to `folder`, to go on from.

    SGD, momentum 0.9, weight decay 5e-4, each entry of the gradient clipped to [-0.1, 0.1], the rate of
    `learning_rate`. Only `targets` and their biases are trained; BatchNorm keeps its statistics, scale and shift.

    Raises:
        DivergedError: the loss is not finite.
        Interrupted: the listener asked to stop; the state is saved.

    Reference: stochastic pruning, its released code. The paper's text has weight decay 5e-5, and a schedule over
    epochs.
    """
    listener, path = listener or Listener(), folder / "checkpoint.safetensors"
    device = next(model.parameters()).device
    frozen = _freeze(model, targets)
    # Named by where they are, because the checkpoint keeps optimizer state by name.
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=BASE_RATE, momentum=_MOMENTUM, weight_decay=_DECAY)
    steps, done = epochs * loader.steps_per_epoch, 0
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(keyed_seed(seed, "forward noise"))
        if path.is_file():
            done = _restore(path, model, optimizer)
        with masks.hold(model, optimizer):
            for step in range(done, steps):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, epochs)
                inputs, labels = (tensor.to(device) for tensor in loader.batch(step))
                loss: Tensor = nn.functional.cross_entropy(model(inputs), labels)
                if not math.isfinite(value := float(loss.detach())):
                    raise DivergedError(
                        f"the loss is {value} at step {step + 1} of {steps}; use less noise or sparsity"
                    )
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_value_(trained, _CLIP)
                optimizer.step()
                listener.advanced(step + 1, f"loss {value:.3f}")
                if listener.stop or ((step + 1) % loader.steps_per_epoch == 0 and step + 1 < steps):
                    _save(path, model, optimizer, step + 1)
                if listener.stop:
                    raise Interrupted(f"interrupted at step {step + 1} of {steps}; saved, run again to continue")
    for parameter in frozen:
        parameter.requires_grad_(True)
    model.eval()
    return steps


def _freeze(model: nn.Module, targets: Targets) -> list[nn.Parameter]:
    """Training mode where something is trained; returns the parameters that were made to need no gradient."""
    names = {name for target in targets for name in (target.name, target.bias) if name is not None}
    model.train()
    for module in model.modules():
        if isinstance(module, _BATCH_NORM):
            module.eval()
    frozen = [p for name, p in model.named_parameters() if name not in names and p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen


def _save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    moments, plain = ckpt.optimizer_state(model, optimizer)
    parts = {"model": model.state_dict(), "optimizer": moments, "rng": ckpt.global_rng()}
    tensors = {f"{part}/{name}": t for part, entries in parts.items() for name, t in entries.items()}
    ckpt.save_tensors(path, tensors, {"step": step, "optimizer": plain})


def _restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    tensors, values = ckpt.load_tensors(path)
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "rng": {}}
    with ckpt.fitting(path):
        for name, tensor in tensors.items():
            part, _, key = name.partition("/")
            parts[part][key] = tensor
        model.load_state_dict(parts["model"])
        ckpt.restore_optimizer(model, optimizer, parts["optimizer"], values["optimizer"])
        ckpt.restore_global_rng(parts["rng"])
        return int(values["step"])
