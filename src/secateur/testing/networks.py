"""Networks, data and a training loop small enough to check a plug-in in a second."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.duration import Progress
from secateur.core.seeds import keyed_generator
from secateur.regularizers.attachment import Attachment
from secateur.regularizers.base import Regularizer

__all__ = ["STEPS", "STEPS_PER_EPOCH", "batches", "convolutional", "dense", "loss", "run", "run_steps", "trainable"]

STEPS, STEPS_PER_EPOCH = 8, 2
Batch = tuple[Tensor, Tensor]


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


def dense() -> nn.Module:
    return _drawn(_Dense)


def convolutional() -> nn.Module:
    return _drawn(_Convolutional)


def trainable() -> nn.Module:
    return convolutional().train()


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


def batches(network: nn.Module) -> list[Batch]:
    generator = keyed_generator(1, "testing")
    shape = (12,) if isinstance(network, _Dense) else (3, 5, 5)
    return [
        (torch.randn(size, *shape, generator=generator), torch.randint(4, (size,), generator=generator))
        for size in (6, 6, 5)
    ]


def loss(model: Any, attachment: Attachment | None, batch: Batch) -> Tensor:
    value = nn.functional.cross_entropy(model(batch[0]), batch[1])
    return value if attachment is None else value + attachment.penalty()


def run(
    network: nn.Module,
    spec: Regularizer | None,
    until: int,
    *,
    seed: int = 0,
    save: dict[str, Any] | None = None,
    load: dict[str, Any] | None = None,
    call: Any = None,
) -> dict[str, Tensor]:
    """Train up to step `until` of a run of `STEPS`; return all parameters and buffers, learned ones too."""
    model = network if call is None else call
    data, first = batches(network), 0
    with _attached(spec, model, seed) as attachment:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        if load is not None and attachment is not None:
            network.load_state_dict(load["model"], strict=True)
            optimizer.load_state_dict(load["optimizer"])
            attachment.load_state_dict(load["attachment"])
            first = load["step"]
        run_steps(model, attachment, optimizer, data, range(first, until))
        if save is not None and attachment is not None:
            save.update(model=copy.deepcopy(network.state_dict()), optimizer=copy.deepcopy(optimizer.state_dict()))
            save.update(attachment=attachment.state_dict(), step=until)
        return {n: t.detach().clone() for n, t in network.state_dict().items()}


def run_steps(
    model: Any, attachment: Attachment | None, optimizer: torch.optim.Optimizer, data: list[Batch], steps: range
) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss(model, attachment, data[step % len(data)]).backward()
        optimizer.step()
        if attachment is not None:
            attachment.after_step(Progress(step + 1, STEPS, STEPS_PER_EPOCH))


@contextmanager
def _attached(spec: Regularizer | None, model: nn.Module, seed: int) -> Iterator[Attachment | None]:
    if spec is None:
        yield None
    else:
        with spec.attach(model, seed=seed) as attachment:
            yield attachment
