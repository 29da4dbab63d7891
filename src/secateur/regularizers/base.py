"""The contract of a regularizer. Imports no torch until something is attached."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

    from secateur.core.duration import Progress
    from secateur.core.targets import Target, Targets
    from secateur.regularizers.attachment import Attachment
    from secateur.regularizers.stream import NoiseStream

__all__ = ["Regularizer", "WeightNoise"]


class Regularizer(ABC):
    """A train-time method. Subclasses are frozen dataclasses that hold hyper-parameters only.

    Class attributes:
        acts_on: which targets it attaches to by default: `"weight"` or `"norm"` (BatchNorm scales).
        draws_noise: it perturbs every training forward pass, so a step without one is an error.
        noisy_outputs: that perturbation is seen in what the network computes, not in its gradients alone.
        learns: it adds parameters of its own (`Attachment.learned`) while attached. The optimizer must be built
            after attaching; eval mode is then no identity, and `finalize` folds them into the weights.
        phase, granularities, state, summary, paper, cost: for tables and cards.
    """

    acts_on: ClassVar[Literal["weight", "norm"]] = "weight"
    draws_noise: ClassVar[bool] = True
    noisy_outputs: ClassVar[bool] = True
    learns: ClassVar[bool] = False
    granularities: ClassVar[tuple[str, ...]] = ()
    state: ClassVar[str] = "noise stream"
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    cost: ClassVar[str] = ""

    @abstractmethod
    def attach(self, model: nn.Module, targets: Targets | None = None, *, seed: int = 0) -> Attachment:
        """Start acting on `model` whenever it runs forward in training mode with gradients enabled.

        Args:
            model: the object your loop calls; the compiled model if you compile it. Before `DistributedDataParallel`
                wraps it: compile, attach, wrap, build the optimizer. (What adds no parameters may also be attached to
                the wrapper.)
            targets: default: all targets of kind `acts_on`.
            seed: root seed of the noise stream, the same in all processes.

        In several processes (`torch.distributed`) that train one network, noise of weights and units is the same in
        all of them, and noise of samples differs, as in one process with the whole batch. Gradients are regularized
        before they are averaged. Processes must make the same number of forward passes, with equal parts of a batch
        where masks are drawn for each sample; their states are then equal, so one of them is saved.
        """


class WeightNoise(Regularizer):
    """A regularizer that multiplies weights by fresh random numbers each step; write `multiplier` only.

    The forward pass runs on multiplied weights, and gradients are multiplied alike: exactly the gradient of the loss at
    the multiplied weights. Between the forward pass and the optimizer step the multiplied weights are in the weights'
    place, without any change to the model's graph or keys; large layers with one number for each unit have products
    in the graph instead. Plain weights are updated.
    """

    granularities: ClassVar[tuple[str, ...]] = ("weight", "unit")

    @abstractmethod
    def multiplier(
        self, target: Target, weight: Tensor, stream: NoiseStream, progress: Progress
    ) -> Tensor | tuple[Tensor, float] | None:
        """What to multiply `weight` by in this step.

        Args:
            target: name and shape; `target.rows`, `target.unrows` and `target.spread` translate units.
            weight: the parameter, detached; do not change it.
            stream: where random numbers come from (`bernoulli`, `normal`, `uniform`); resumes bitwise.
            progress: where the run stands: `fraction` and `epoch_fraction` in [0, 1], `step`, `steps`, `epoch`.

        Returns: a tensor of finite numbers that broadcasts against `weight` (0 = dropped), or None for no change.
            Where a number is either 0 or always the same, return bools (True = kept), alone or as `(bools, factor)`:
            they are kept in a bit a weight until the step is over, numbers in a copy of the weights.
        """

    def attach(self, model: nn.Module, targets: Targets | None = None, *, seed: int = 0) -> Attachment:
        from secateur.regularizers.weight_swap import WeightSwap

        return WeightSwap(self, model, targets, seed)
