"""Monte-Carlo dropout: what a network trained with dropout does not know, from repeated noisy predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secateur.analysis.inputs import evaluating
from secateur.core.seeds import keyed_seed
from secateur.core.targets import unwrap
from secateur.errors import DataError, NoEffectError, UsageError
from secateur.regularizers.attachment import Attachment

__all__ = ["MCPrediction", "mc_predict"]


class MCPrediction(NamedTuple):
    """`mean` and `variance` of the outputs, `[samples, ...]`, element by element over `passes` noisy passes."""

    mean: Tensor
    variance: Tensor
    passes: int


def mc_predict(
    model: nn.Module,
    data: Tensor | Iterable[Any],
    *,
    passes: int = 50,
    seed: int = 0,
    attachments: Sequence[Attachment] = (),
    transform: Callable[[Any], Tensor] | None = None,
    precision: float | None = None,
) -> MCPrediction:
    """Mean and variance of the predictions over `passes` forward passes with dropout on and all else in eval mode.

    Noise comes from `nn.Dropout` and its relatives (the dropout inside `nn.MultiheadAttention` and recurrent layers
    too) and from `attachments`. Calls of `torch.nn.functional.dropout` in code of your own are out of reach: they stay
    as they are in eval mode. BatchNorm uses and keeps its running statistics.

    Args:
        model: what is called. It comes back as it was: modes, parameters, statistics.
        data: one tensor of inputs, or an iterable of batches: inputs, or `(inputs, labels)`.
        passes: noisy passes T for each batch, at least 2.
        seed: root seed of the noise.
        attachments: regularizers attached to `model` whose noise is to act.
        transform: from the model's output to the tensor that is averaged, for instance a softmax; default: the output.
        precision: tau; 1 / tau, the variance of the observation noise, is added to the variance.

    Returns: the mean of T passes and E[y^2] - E[y]^2 (+ 1 / tau), on the outputs' device in at least float32.

    Raises: `NoEffectError` where nothing is random, `UsageError` or `DataError` for arguments that are none.

    Randomness: `seed` and the order of the batches; the global generators come back as they were.
    Cost: `passes` forward passes; three outputs of a batch in memory besides the result, whatever `passes` is.

    Reference: Gal and Ghahramani 2016, "Dropout as a Bayesian Approximation", equations 6-9 of the supplement (the
        diagonal of the covariance).

    Examples:
        >>> net = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2))
        >>> prediction = mc_predict(net, torch.ones(3, 4), passes=10)
        >>> prediction.mean.shape, bool((prediction.variance > 0).all())
        (torch.Size([3, 2]), True)
    """
    if passes < 2:
        raise UsageError(f"mc_predict: passes is at least 2, got {passes}; one pass has no variance")
    if precision is not None and not precision > 0:
        raise UsageError(f"mc_predict: precision is positive, got {precision}")
    for attachment in attachments:
        if attachment.model is not model:
            raise UsageError(
                f"mc_predict: {type(attachment.spec).__name__} is attached to another object than the model given; "
                "give the very one it was attached to"
            )
    noisy = [m for m in unwrap(model).modules() if _drops(m)]
    if not noisy and not any(a.spec.draws_noise and a.spec.noisy_outputs for a in attachments):
        raise NoEffectError(
            f"mc_predict: {type(unwrap(model)).__name__} has no dropout module with a rate above 0 and no attachment "
            "that draws noise was given, so every pass would be the same"
        )
    found: list[tuple[Tensor, Tensor]] = []
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_private_generators(model, seed))
        stack.enter_context(_only_dropout(model, noisy))
        for index, attachment in enumerate(attachments):
            stack.enter_context(attachment.sampling(keyed_seed(seed, "mc dropout", index)))
        for batch in [data] if isinstance(data, Tensor) else data:
            inputs = batch[0] if isinstance(batch, list | tuple) and len(batch) == 2 else batch
            found.append(_moments((_output(model(inputs), transform) for _ in range(passes)), passes))
    if not found:
        raise DataError("mc_predict: the batches are empty; expected at least one")
    mean, variance = (torch.cat(parts) for parts in zip(*found, strict=True))
    return MCPrediction(mean, variance if precision is None else variance + 1.0 / precision, passes)


def _moments(values: Iterator[Tensor], passes: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of `passes` values, one at a time (Welford)."""
    mean = next(values).clone()
    squares = torch.zeros_like(mean)
    for count, value in enumerate(values, start=2):
        away = value - mean
        mean += away / count
        squares += away * (value - mean)
    return mean, squares / passes


def _output(output: Any, transform: Callable[[Any], Tensor] | None) -> Tensor:
    value = output if transform is None else transform(output)
    if not isinstance(value, Tensor) or not value.dim():
        raise UsageError(
            f"mc_predict: the model's output is a {type(value).__name__}, expected a tensor with a batch dimension; "
            "pass transform=, which makes one of it"
        )
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _drops(module: nn.Module) -> bool:
    """Its training flag turns on dropout and nothing else."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return isinstance(module, nn.MultiheadAttention | nn.RNNBase) and module.dropout > 0


@contextmanager
def _only_dropout(model: nn.Module, noisy: Sequence[nn.Module]) -> Iterator[None]:
    # The fused path of transformer layers in eval mode knows no dropout.
    fused = torch.backends.mha.get_fastpath_enabled()
    with evaluating(model):
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            for module in noisy:
                module.training = True
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def _private_generators(model: nn.Module, seed: int) -> Iterator[None]:
    """Seeded global generators within the block, of the CPU and the model's devices; the old states afterwards."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(keyed_seed(seed, "mc dropout", "modules"))
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(keyed_seed(seed, "mc dropout", "modules", index))
        yield
