"""The final network in words: asked against achieved, the proof of the cut, accuracy, speed, files."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.lab.report.schema import Accuracy, Achieved, Change, Final, Latency, LatencyChange, Proof
from secateur.lab.report.words import NOT_MEASURED, amount, level, percent, sized, times, tiny

__all__ = ["Fact", "asked_and_got", "asked_lines", "cost_rows", "facts", "latency_ratio", "proof"]


@dataclass(frozen=True)
class Fact:
    """A name, its value in words, and whether the value is one to worry about."""

    name: str
    value: str
    bad: bool = False


def facts(final: Final) -> list[Fact]:
    """Every measured property of the final network, "not measured" where there is none."""
    memory, file, known = final.memory, final.file, final.accuracy or Accuracy()
    stages = [
        ("dense", known.dense),
        ("masked", known.masked),
        ("cut", known.cut),
        ("cut and fine-tuned", known.fine_tuned),
        ("saved and loaded again", known.reloaded),
    ]
    peak = NOT_MEASURED
    if memory is not None and memory.dense_peak_bytes is not None and memory.cut_peak_bytes is not None:
        before, after = memory.dense_peak_bytes, memory.cut_peak_bytes
        peak = f"{sized(before)} -> {sized(after)} ({times(before, after)})"
    found = [Fact("Proof of the cut", *proof(final.verify))]
    found += [Fact(f"Top-1, {name}", percent(value)) for name, value in stages]
    found.append(Fact("Latency, dense / cut", latency_ratio(final.latency)))
    found += [Fact(f"Latency, {name}", _latency(value)) for name, value in _latencies(final.latency)]
    found.append(Fact("Peak memory", peak))
    for item in final.exports or []:
        value, bad = _difference(item.max_abs_diff, item.tolerance)
        place = f"{item.path}, " if item.path else ""
        found.append(Fact(f"Export, {item.format}", f"{place}{sized(item.bytes)}; from the source: {value}", bad))
    if not final.exports:
        found.append(Fact("Export", NOT_MEASURED))
    if file is None:
        found.append(Fact("File", NOT_MEASURED))
    else:
        found.append(Fact("File", f"{file.path or 'path not recorded'}, {sized(file.bytes)}"))
        found.append(Fact("Loaded again, largest difference", tiny(file.reload_max_abs_diff)))
    return found


def proof(verify: Proof | None) -> tuple[str, bool]:
    """Largest |masked - cut|, on how many inputs, against which tolerance; and whether it fails."""
    if verify is None:
        return NOT_MEASURED, False
    value, bad = _difference(verify.max_abs_diff, verify.tolerance)
    inputs = "" if verify.inputs is None else f" on {verify.inputs:,} inputs"
    scale = "" if verify.scale is None else f", outputs up to {tiny(verify.scale)}"
    return f"largest |masked - cut|{inputs}: {value}{scale}", bad


def _difference(value: float | None, tolerance: float | None) -> tuple[str, bool]:
    if value is None:
        return NOT_MEASURED, False
    if tolerance is None:
        return f"{tiny(value)} (no tolerance recorded)", False
    bad = value > tolerance
    return f"{tiny(value)} ({'ABOVE' if bad else 'within'} tolerance {tiny(tolerance)})", bad


def latency_ratio(latency: LatencyChange | None) -> str:
    """How many times faster the cut network is, or that no difference is resolved."""
    ratio = None if latency is None else latency.ratio
    if ratio is None or ratio.median is None:
        return NOT_MEASURED
    if ratio.low is None or ratio.high is None:
        return f"{ratio.median:.2f}x (no interval measured)"
    ends = f" (95 % interval {ratio.low:.2f}..{ratio.high:.2f})"
    if ratio.resolved is False or ratio.low <= 1 <= ratio.high:
        return f"not resolved: {ratio.median:.2f}x{ends}"
    return f"{ratio.median:.2f}x {'faster' if ratio.median > 1 else 'the speed, so slower'}{ends}"


def _latencies(latency: LatencyChange | None) -> list[tuple[str, Latency | None]]:
    both = latency or LatencyChange()
    return [("dense", both.dense), ("cut", both.cut)]


def _latency(value: Latency | None) -> str:
    if value is None:
        return NOT_MEASURED
    ends = "" if value.low_ms is None or value.high_ms is None else f" ({value.low_ms:.3g}..{value.high_ms:.3g})"
    return f"{value.median_ms:.3g} ms{ends}, {value.where}"


def cost_rows(final: Final) -> list[tuple[str, str, str, str]]:
    """Asked against achieved: quantity, dense, cut, ratio."""
    achieved = final.asked_vs_achieved or Achieved()
    rows = []
    for name, change, show in (
        ("Parameters", achieved.params, amount),
        ("MACs (batch 1)", achieved.macs, amount),
        ("File bytes", achieved.bytes, sized),
    ):
        both = change or Change()
        rows.append((name, show(both.dense), show(both.cut), times(both.dense, both.cut)))
    return rows


def asked_and_got(final: Final) -> tuple[str, str]:
    """Both sparsities, of the targets, in words."""
    achieved = final.asked_vs_achieved or Achieved()
    asked = final.sparsity if achieved.sparsity_asked is None else achieved.sparsity_asked
    return NOT_MEASURED if asked is None else level(asked), percent(achieved.sparsity_got, 2)


def asked_lines(final: Final) -> list[str]:
    """Asked against achieved as lines of text."""
    asked, got = asked_and_got(final)
    lines = [f"Sparsity asked {asked}, achieved {got} of the targets"]
    for name, dense, cut, ratio in cost_rows(final):
        missing = ratio == NOT_MEASURED
        lines.append(f"{name}: {NOT_MEASURED}" if missing else f"{name}: {dense} -> {cut} ({ratio})")
    return lines
