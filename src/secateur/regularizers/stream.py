"""A resumable stream of random decisions and numbers, drawn outside autograd and outside compiled graphs."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from secateur.core.seeds import keyed_seed
from secateur.errors import CheckpointError

__all__ = ["NoiseStream", "as_numbers"]


def as_numbers(decisions: Tensor, dtype: torch.dtype) -> Tensor:
    """Bool to 1 and 0 of `dtype`. By way of bytes, because torch converts bools five times slower on the CPU.

    Examples:
        >>> as_numbers(torch.tensor([True, False]), torch.float32)
        tensor([1., 0.])
    """
    return decisions.view(torch.uint8).to(dtype)


class NoiseStream:
    """Decisions, normal and uniform numbers from a private generator; the global ones are neither read nor changed.

    What is drawn lies on the stream's device, that of the targets. On the CPU it is made by numpy's SFC64: decisions
    from at most 16 random bits each (probabilities are rounded to multiples of 2^-16), which is several times faster
    than drawing floats. On other devices a `torch.Generator` of that device is used.

    Randomness: determined by the seed, the device type (a CPU and a GPU draw different numbers), the sequence of calls
    and the versions of numpy and torch. Saved and loaded between any two calls, it goes on bitwise.

    Examples:
        >>> stream = NoiseStream(seed=0)
        >>> saved = stream.state_dict()
        >>> noise = stream.normal((2, 3))
        >>> stream.load_state_dict(saved)
        >>> torch.equal(stream.normal((2, 3)), noise)
        True
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        if self.device.type == "cpu":
            self._bits = np.random.SFC64(keyed_seed(seed, "noise"))
        else:
            self._generator = torch.Generator(self.device).manual_seed(keyed_seed(seed, "noise"))

    def bernoulli(self, shape: tuple[int, ...], probability: float | Tensor) -> Tensor:
        """Bool tensor of `shape`, True with `probability` (a number, or a tensor that broadcasts to `shape`)."""
        if self.device.type != "cpu":
            return torch.rand(shape, device=self.device, generator=self._generator) < probability
        count = math.prod(shape)
        if isinstance(probability, Tensor):
            bits = self._raw(count, np.uint16).reshape(shape)
            return torch.from_numpy(bits < np.rint(probability.double().numpy() * 65536.0).astype(np.uint32))
        first, second = divmod(round(probability * 65536), 256)
        if first >= 256:
            return torch.ones(shape, dtype=torch.bool)
        # Eight bits decide all but one case in 256; those take eight more.
        bits = self._raw(count, np.uint8)
        decisions = bits < np.uint8(first)
        if second:
            undecided = np.flatnonzero(bits == np.uint8(first))
            decisions[undecided] = self._raw(undecided.size, np.uint8) < np.uint8(second)
        return torch.from_numpy(decisions.reshape(shape))

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Float32 tensor of `shape`, standard normal."""
        if self.device.type != "cpu":
            return torch.randn(shape, device=self.device, generator=self._generator)
        return torch.from_numpy(np.random.Generator(self._bits).standard_normal(shape, dtype=np.float32))

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        """Float32 tensor of `shape`, uniform in [0, 1)."""
        if self.device.type != "cpu":
            return torch.rand(shape, device=self.device, generator=self._generator)
        return torch.from_numpy(np.random.Generator(self._bits).random(shape, dtype=np.float32))

    def _raw(self, count: int, kind: type[np.unsignedinteger]) -> np.ndarray:
        return self._bits.random_raw(-(-count * np.dtype(kind).itemsize // 8)).view(kind)[:count]

    def state_dict(self) -> dict[str, Tensor]:
        if self.device.type != "cpu":
            return {"generator": self._generator.get_state()}
        state = self._bits.state
        words = np.array([*state["state"]["state"], state["has_uint32"], state["uinteger"]], dtype=np.uint64)
        return {"generator": torch.from_numpy(words.view(np.int64).copy())}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        saved = state["generator"]
        if self.device.type != "cpu":
            self._generator.set_state(saved)
            return
        if saved.dtype != torch.int64 or saved.numel() != 6:
            raise CheckpointError(
                "noise stream: the saved generator is not a CPU stream; resume on the same device type"
            )
        words = saved.numpy().view(np.uint64)
        current = self._bits.state
        current["state"]["state"] = words[:4].copy()
        current["has_uint32"], current["uinteger"] = int(words[4]), int(words[5])
        self._bits.state = current
