"""What a network costs: parameters, multiply-accumulates and file bytes, and asked against achieved.

MACs follow one convention, stated everywhere: batch 1, the given input shape, half of what
`torch.utils.flop_counter` counts, that is matrix products, convolutions and attention; no normalization,
activation, bias or pooling.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateur.analysis.inputs import Inputs, as_args, evaluating, with_batch
from secateur.core.targets import unwrap
from secateur.errors import UsageError

__all__ = ["AskedAchieved", "Cost", "asked_vs_achieved", "compare_costs", "measure_cost", "safetensors_bytes"]

# Safetensors stores tensors by descending alignment of these types (its own enumeration), then by name; the
# order decides how many digits the offsets in the header take.
_DTYPE_NAMES = {
    torch.bool: (0, "BOOL"),
    torch.uint8: (1, "U8"),
    torch.int8: (2, "I8"),
    torch.float8_e5m2: (3, "F8_E5M2"),
    torch.float8_e4m3fn: (4, "F8_E4M3"),
    torch.int16: (5, "I16"),
    torch.uint16: (6, "U16"),
    torch.float16: (7, "F16"),
    torch.bfloat16: (8, "BF16"),
    torch.int32: (9, "I32"),
    torch.uint32: (10, "U32"),
    torch.float32: (11, "F32"),
    torch.complex64: (12, "C64"),
    torch.float64: (13, "F64"),
    torch.int64: (14, "I64"),
    torch.uint64: (15, "U64"),
}


@dataclass(frozen=True)
class Cost:
    """Cost of one network; plain numbers, so `dataclasses.asdict` gives JSON.

    Args:
        params: parameters, trainable or not, tied tensors once.
        nonzero: parameters that are not zero. On `meta`, where there are no values, all of them.
        macs: multiply-accumulates of one forward pass at batch 1. Zeros are multiplied like any other number.
        effective_macs: each product's MACs times the density of its weight: what a runtime that skips every
            zero would do. Never a speed-up: dense runtimes skip none. Products without a weight (attention
            scores) count in full.
        bytes: size of the network's state as a safetensors file without metadata, tied tensors once.
        input_shapes: shape of every tensor argument the MACs belong to.
    """

    params: int
    nonzero: int
    macs: int
    effective_macs: int
    bytes: int
    input_shapes: tuple[tuple[int, ...], ...]


def measure_cost(model: nn.Module, example_input: Inputs) -> Cost:
    """Cost of `model` on the first row of `example_input`, on whatever device both live (`meta` included).

    Training flags, hooks, gradients and global switches are as before afterwards. Wrappers of `torch.compile`
    and data parallelism are looked through.

    Args:
        example_input: a tensor `[batch, ...]`, or a tuple of positional arguments.

    Cost:
        One forward pass at batch 1 and one pass over the parameters.

    Examples:
        >>> measure_cost(nn.Linear(20, 5), torch.randn(2, 20)).macs
        100
    """
    model = unwrap(model)
    args = with_batch(as_args(example_input), 1)
    macs, effective = _count_macs(model, args)
    parameters = list(model.parameters())
    return Cost(
        params=sum(p.numel() for p in parameters),
        nonzero=sum(_nonzero(p.detach()) for p in parameters),
        macs=macs,
        effective_macs=effective,
        bytes=safetensors_bytes(model),
        input_shapes=tuple(tuple(a.shape) for a in args if isinstance(a, Tensor)),
    )


def compare_costs(dense: Cost, pruned: Cost) -> dict[str, float]:
    """How many times smaller `pruned` is than `dense`: every value is dense / pruned, 1.0 = no gain.

    Keys: `compression` (parameters still there), `nonzero_compression`, `mac_reduction`,
    `effective_mac_reduction`, `byte_reduction`. Infinite where nothing is left.

    Raises:
        UsageError: the two were measured on different input shapes.
    """
    if dense.input_shapes != pruned.input_shapes:
        raise UsageError(
            f"costs of different inputs do not compare: {dense.input_shapes} and {pruned.input_shapes}; "
            "measure both on the same example input"
        )
    return {
        "compression": _times(dense.params, pruned.params),
        "nonzero_compression": _times(dense.nonzero, pruned.nonzero),
        "mac_reduction": _times(dense.macs, pruned.macs),
        "effective_mac_reduction": _times(dense.effective_macs, pruned.effective_macs),
        "byte_reduction": _times(dense.bytes, pruned.bytes),
    }


@dataclass(frozen=True)
class AskedAchieved:
    """Sparsity asked for, and the fraction really removed of everything it may be taken to mean.

    Args:
        asked: sparsity asked over the targets, in [0, 1).
        targets: fraction of target entries removed (zeroed or cut).
        parameters: fraction of all parameters that are gone or zero.
        stored: fraction of all parameters physically gone.
        macs: fraction of multiply-accumulates a dense runtime no longer does.
        effective_macs: the same for a runtime that would skip every zero.
        bytes: fraction of the file that is gone.
    """

    asked: float
    targets: float
    parameters: float
    stored: float
    macs: float
    effective_macs: float
    bytes: float

    def __str__(self) -> str:
        rows = [
            ("asked, of the targets", self.asked),
            ("achieved, of the targets", self.targets),
            ("of all parameters, gone or zero", self.parameters),
            ("of all parameters, gone", self.stored),
            ("of the MACs", self.macs),
            ("of the MACs, zeros skipped", self.effective_macs),
            ("of the file's bytes", self.bytes),
        ]
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}} {100 * value:6.2f} %" for label, value in rows)


def asked_vs_achieved(
    asked: float, *, targets_kept: int, targets_total: int, dense: Cost, pruned: Cost
) -> AskedAchieved:
    """Set the sparsity asked for beside what was achieved.

    Args:
        asked: sparsity asked over the targets, in [0, 1).
        targets_kept, targets_total: target entries kept and there at first (`Masks.kept()`, `.total()`).
        dense, pruned: costs before and after, on the same input shape.

    Examples:
        >>> net = nn.Linear(4, 2, bias=False)
        >>> before = measure_cost(net, torch.ones(1, 4))
        >>> _ = net.weight.data[:, :2].zero_()
        >>> after = measure_cost(net, torch.ones(1, 4))
        >>> record = asked_vs_achieved(0.5, targets_kept=4, targets_total=8, dense=before, pruned=after)
        >>> record.targets, record.parameters, record.macs, record.effective_macs
        (0.5, 0.5, 0.0, 0.5)
    """
    if not 0 <= asked < 1:
        raise UsageError(f"asked sparsity {asked} is out of range; expected 0 <= sparsity < 1")
    if not 0 <= targets_kept <= targets_total or targets_total == 0:
        raise UsageError(f"{targets_kept} of {targets_total} target entries kept is impossible")
    compare_costs(dense, pruned)
    return AskedAchieved(
        asked=asked,
        targets=_removed(targets_total, targets_kept),
        parameters=_removed(dense.params, pruned.nonzero),
        stored=_removed(dense.params, pruned.params),
        macs=_removed(dense.macs, pruned.macs),
        effective_macs=_removed(dense.macs, pruned.effective_macs),
        bytes=_removed(dense.bytes, pruned.bytes),
    )


def safetensors_bytes(model: nn.Module) -> int:
    """Size in bytes of `model.state_dict()` as a safetensors file (no metadata), computed without writing it.

    Tied tensors are stored once, under their first name. Works on `meta`.

    Raises:
        UsageError: a tensor's type has no place in the format.
    """
    first: dict[tuple[Any, ...], str] = {}
    tensors: list[tuple[int, str, str, Tensor]] = []
    for name, value in unwrap(model).state_dict().items():
        if not isinstance(value, Tensor):
            continue
        if value.dtype not in _DTYPE_NAMES:
            raise UsageError(f'"{name}" is {value.dtype}, which safetensors cannot store')
        if value.numel() and first.setdefault(_identity(value), name) != name:
            continue
        rank, dtype = _DTYPE_NAMES[value.dtype]
        tensors.append((-rank, name, dtype, value))
    header: dict[str, dict[str, Any]] = {}
    offset = 0
    for _, name, dtype, value in sorted(tensors, key=lambda item: (item[0], item[1].encode())):
        end = offset + value.numel() * value.element_size()
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + math.ceil(len(text) / 8) * 8 + offset


def _count_macs(model: nn.Module, args: tuple[Any, ...]) -> tuple[int, int]:
    """MACs of one forward pass, and the same weighted by the density of each product's weight."""
    # Not at the top: it takes a fifteenth of `import torch`'s time, which `import secateur` must not add.
    from torch.utils.flop_counter import FlopCounterMode, flop_registry

    storages = {_storage(p) for p in model.parameters()}
    densities: dict[tuple[Any, ...], float] = {}
    effective = 0.0

    def density(packet: Any, operands: tuple[Any, ...]) -> float:
        # The second operand of a convolution is its weight even when a parametrization computed it; elsewhere
        # a weight is known by the parameter it is a view of. One-dimensional operands are biases.
        weights = [t for t in operands if isinstance(t, Tensor) and t.ndim >= 2 and _storage(t) in storages]
        if packet is torch.ops.aten.convolution:
            weights = [operands[1]]
        for weight in weights:
            key = _identity(weight)
            if key not in densities or key[0] not in storages:
                densities[key] = _nonzero(weight) / max(weight.numel(), 1)
        return min((densities[_identity(w)] for w in weights), default=1.0)

    def counted(packet: Any, formula: Callable[..., int]) -> Callable[..., int]:
        def count(*operands: Any, out_val: Any = None, **kwargs: Any) -> int:
            nonlocal effective
            flops = formula(*operands, out_val=out_val, **kwargs)
            effective += flops / 2 * density(packet, operands)
            return flops

        count._get_raw = True  # type: ignore[attr-defined]
        return count

    counter = FlopCounterMode(
        display=False,
        custom_mapping={packet: counted(packet, formula) for packet, formula in flop_registry.items()},
    )
    with evaluating(model), torch.no_grad(), _countable_kernels(), counter:
        model(*args)
    return counter.get_total_flops() // 2, round(effective)


@contextmanager
def _countable_kernels() -> Iterator[None]:
    """Switch off fused kernels that no formula knows: attention's fast path, oneDNN's and cuDNN's RNNs."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    cudnn = torch.backends.cudnn.enabled
    # `torch.backends.mkldnn.flags` would do, but it also sets a TF32 switch, which warns without Intel GPUs.
    one_dnn = torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.cudnn.enabled = False
    torch._C._set_mkldnn_enabled(False)
    try:
        # One attention kernel among several, because which of them are counted depends on torch's version.
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch._C._set_mkldnn_enabled(one_dnn)
        torch.backends.cudnn.enabled = cudnn
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return (_storage(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


def _nonzero(tensor: Tensor) -> int:
    return tensor.numel() if tensor.is_meta else int(torch.count_nonzero(tensor))


def _times(dense: int, pruned: int) -> float:
    if pruned == 0:
        return 1.0 if dense == 0 else math.inf
    return dense / pruned


def _removed(dense: int, pruned: int) -> float:
    return 1 - pruned / dense if dense else 0.0
