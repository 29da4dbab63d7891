"""A network as a file other runtimes read, proven to compute what its source computes before it is kept.

ONNX Runtime sends telemetry by default from version 1.29 on; `ORT_DISABLE_TELEMETRY=1` is set, unless the
environment already says otherwise, before it is imported here, because later is too late.
"""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur._version import __version__
from secateur.analysis.inputs import Inputs, as_args, batch_of, evaluating, with_batch
from secateur.core.targets import unwrap
from secateur.errors import ExportError, MissingExtraError, SecateurError, StorageError, UsageError

__all__ = ["ExportReport", "OrtModule", "export_onnx", "export_torch", "onnx_callable"]

# Two rows at export: with one, the tracer would take the batch for the constant 1.
_TRACED_BATCH = 2
_BATCHES = (1, _TRACED_BATCH, 5)


@dataclass(frozen=True)
class ExportReport:
    """What was exported and how close it is to its source.

    Args:
        format: "onnx" or "torch" (`torch.export`, `.pt2`).
        path: the file.
        bytes: its size.
        max_abs_diff: largest absolute difference of any output entry between file and source.
        tolerance: the largest that would have been accepted.
        batch_sizes: batch sizes compared; only one of them was seen at export.
        versions: of everything that took part.
    """

    format: Literal["onnx", "torch"]
    path: str
    bytes: int
    max_abs_diff: float
    tolerance: float
    batch_sizes: tuple[int, ...]
    versions: dict[str, str]

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.bytes} bytes, max |source - {self.format}| = {self.max_abs_diff:.2g} "
            f"(tolerance {self.tolerance:.2g}) at batch sizes {', '.join(map(str, self.batch_sizes))}"
        )


def export_onnx(
    model: nn.Module,
    example_input: Inputs,
    path: str | os.PathLike[str],
    *,
    tolerance: float = 1e-4,
    dynamic_batch: bool = True,
) -> ExportReport:
    """Export `model` in eval mode to one ONNX file, and check it in ONNX Runtime against its source.

    The file appears at `path` only once the check has passed; before that an older file there is untouched.

    Args:
        model: network on any device with real weights; left as found.
        example_input: real inputs, tensor `[batch, ...]` or tuple of positional arguments; at least 5 rows
            make every batch size of the check a different input.
        tolerance: largest accepted |difference|, in units of max(1, largest |output| of the source).
        dynamic_batch: leave the batch size open (dimension 0). Without it only the example's own is allowed.

    Raises:
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
        ExportError: the network cannot be exported, or the file computes something else.
        StorageError: `path` cannot be written.
    """
    runtime = _import_onnxruntime()
    model, args, batches = _prepare(model, example_input, dynamic_batch)

    def write(target: Path) -> None:
        import torch.onnx

        program = torch.onnx.export(
            model,
            args,
            dynamo=True,
            dynamic_shapes=_dynamic_shapes(example_input, dynamic_batch),
            verbose=False,
        )
        assert program is not None  # None only comes from the exporter that dynamo=True replaces
        # One file: weights beside the graph would have to be moved, hashed and lost together.
        program.save(target, external_data=False)

    with _committed(Path(path)) as partial:
        with evaluating(model):
            _exporting("onnx", model, write, partial)
        session = _exporting("onnx", model, lambda target: OrtModule(target), partial)
        return _checked("onnx", model, session, example_input, batches, tolerance, partial, Path(path), runtime)


def export_torch(
    model: nn.Module,
    example_input: Inputs,
    path: str | os.PathLike[str],
    *,
    tolerance: float = 1e-5,
    dynamic_batch: bool = True,
) -> ExportReport:
    """Export `model` in eval mode with `torch.export` to a `.pt2` file, reload that, and compare the two.

    Written without the sample inputs, the one thing `torch.export.save` pickles for a plain network. Reading
    is another matter: `torch.export.load` runs whatever pickle a file contains, so load `.pt2` files only
    from people you trust. Here it reads back nothing but what was just written.

    Arguments and errors are those of `export_onnx`.
    """
    model, args, batches = _prepare(model, example_input, dynamic_batch)

    def write(target: Path) -> None:
        program = torch.export.export(model, args, dynamic_shapes=_dynamic_shapes(example_input, dynamic_batch))
        program.example_inputs = None
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        target.write_bytes(buffer.getbuffer())

    def load(target: Path) -> Callable[..., Any]:
        return torch.export.load(io.BytesIO(target.read_bytes())).module()

    with _committed(Path(path)) as partial:
        with evaluating(model):
            _exporting("torch", model, write, partial)
        reloaded = _exporting("torch", model, load, partial)
        return _checked("torch", model, reloaded, example_input, batches, tolerance, partial, Path(path), {})


class OrtModule:
    """An ONNX file as a callable on CPU tensors, for checks and for latency inside ONNX Runtime.

    Called with the tensors in the order the file lists its inputs; returns one tensor, or a tuple where there
    are several outputs. Inputs and outputs are shared with numpy, not copied.

    Args:
        path: ONNX file.
        threads: intra-op threads of the session; torch's own setting does not reach it.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int = 1) -> None:
        if threads < 1:
            raise UsageError(f"threads={threads} is too few; expected at least 1")
        _import_onnxruntime()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Threads that spin while their session is idle would slow down whichever session has its turn.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.path, self.threads = str(path), threads
        self._session = onnxruntime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        self._names = [argument.name for argument in self._session.get_inputs()]

    def __call__(self, *tensors: Tensor) -> Any:
        feed = {name: t.detach().cpu().numpy() for name, t in zip(self._names, tensors, strict=True)}
        outputs = tuple(torch.as_tensor(value) for value in self._session.run(None, feed))
        return outputs[0] if len(outputs) == 1 else outputs


def onnx_callable(path: str | os.PathLike[str], threads: int = 1) -> OrtModule:
    """The ONNX file at `path` as a callable on tensors, to be timed beside others by `measure_latency`.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        ExportError: the file is missing or is no valid ONNX network.
    """
    try:
        return OrtModule(path, threads)
    except SecateurError:
        raise
    except Exception as error:
        raise ExportError(f'"{path}" does not load in onnxruntime: {_first_line(error)}') from error


def _import_onnxruntime() -> dict[str, str]:
    """Import what the `onnx` extra brings; returns its versions."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    names = ("onnx", "onnxscript", "onnxruntime")
    try:
        for name in names:
            importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError("ONNX export", "onnx") from error
    return {name: importlib.import_module(name).__version__ for name in names}


def _prepare(
    model: nn.Module, example_input: Inputs, dynamic_batch: bool
) -> tuple[nn.Module, tuple[Any, ...], tuple[int, ...]]:
    model = unwrap(model)
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise UsageError(f"{type(model).__name__} is on meta, without weights to export; load it first")
    args = as_args(example_input)
    batch = batch_of(args)
    return (model, with_batch(args, _TRACED_BATCH), _BATCHES) if dynamic_batch else (model, args, (batch,))


def _dynamic_shapes(example_input: Inputs, dynamic_batch: bool) -> tuple[dict[int, Any] | None, ...] | None:
    if not dynamic_batch:
        return None
    args = as_args(example_input)
    rows = batch_of(args)
    batch = torch.export.Dim("batch")
    return tuple({0: batch} if isinstance(a, Tensor) and a.ndim and a.shape[0] == rows else None for a in args)


def _exporting(kind: str, model: nn.Module, step: Callable[[Path], Any], target: Path) -> Any:
    """Run one step of an export; exporters raise everything under the sun, here it becomes one line."""
    try:
        return step(target)
    except (SecateurError, OSError):
        raise
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} cannot be exported to {kind}: {_first_line(error)}; "
            "if its batch size is fixed, export with dynamic_batch=False"
        ) from error


def _checked(
    kind: Literal["onnx", "torch"],
    model: nn.Module,
    exported: Callable[..., Any],
    example_input: Inputs,
    batches: tuple[int, ...],
    tolerance: float,
    partial: Path,
    path: Path,
    versions: dict[str, str],
) -> ExportReport:
    worst, scale = 0.0, 1.0
    for batch in batches:
        args = with_batch(as_args(example_input), batch)
        with evaluating(model), torch.no_grad():
            expected = _leaves(model(*args))
            got = _leaves(_exporting(kind, model, lambda _, a=args: exported(*a), partial))  # type: ignore[misc]
        shapes, wanted = ([tuple(t.shape) for t in leaves] for leaves in (got, expected))
        if shapes != wanted:
            raise ExportError(
                f"{kind} export of {type(model).__name__} at batch size {batch}: outputs {shapes}, "
                f"expected {wanted}; nothing was kept"
            )
        for have, want in zip(got, expected, strict=True):
            if not want.numel():
                continue
            # `amax` keeps NaN, which must fail the check rather than slip through a comparison.
            difference = float((have - want).abs().amax())
            worst = difference if difference != difference else max(worst, difference)
            scale = max(scale, float(want.abs().amax()))
    limit = tolerance * scale
    if not worst <= limit:
        raise ExportError(
            f"{kind} export of {type(model).__name__} computes something else: max |source - {kind}| = "
            f"{worst:.3g}, expected at most {limit:.3g}; nothing was kept; look for operations that differ "
            "between runtimes, or raise tolerance"
        )
    return ExportReport(
        format=kind,
        path=str(path),
        bytes=partial.stat().st_size,
        max_abs_diff=worst,
        tolerance=limit,
        batch_sizes=batches,
        versions={"torch": torch.__version__, "secateur": __version__, **versions},
    )


def _leaves(output: Any) -> list[Tensor]:
    return [t.detach().cpu().double() for t in tree_leaves(output) if isinstance(t, Tensor)]


@contextmanager
def _committed(path: Path) -> Iterator[Path]:
    """A hidden file beside `path` that takes its name when the block succeeds and vanishes when it fails."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(21, "is a directory", str(path))
        partial.touch()
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    except OSError as error:
        raise StorageError(
            f'"{path}" cannot be written: {error.strerror or error}; choose a folder you may write to, with room left'
        ) from error
    finally:
        _discard(partial)


def _discard(partial: Path) -> None:
    try:
        partial.unlink(missing_ok=True)
    except OSError:
        # The folder could not be used at all, and that error is already on its way.
        return


def _first_line(error: BaseException) -> str:
    """The most telling line of an exception: the last cause's first line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
