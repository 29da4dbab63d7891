"""A delivered network in words and as a table: what it is, what it costs, how sure that is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.lab.report.tables import Table
from secateur.lab.report.words import amount, many, percent, points, sized, times, tiny

__all__ = ["delivered_lines", "delivered_table"]


def delivered_lines(found: Mapping[str, Any], stage: str) -> list[str]:
    """What was delivered, by the stage of that key."""
    file, accuracy, difference = found["file"], found["accuracy"], found["difference"]
    interval = f"{points(difference['low'], signed=True)}..{points(difference['high'], signed=True)}"
    lines = [
        f"Delivered: {found['what']}. On {many(found['held'], 'test image')} held back "
        f"{percent(accuracy['delivered'])}, dense {percent(accuracy['dense'])}: "
        f"{points(difference['mean'], signed=True)} points ({interval}, paired).",
        f"File stages/explore-{stage}/{Path(file['path']).name}, {sized(file['bytes'])}, rebuilt from itself alone in "
        f"another process: max |saved - rebuilt| = {tiny(file['reload_max_abs_diff'])}.",
    ]
    speed = _speed(found)
    if found["cut"]:
        proof = found["max_abs_diff"]
        said = "nothing could be compared" if proof is None else f"max |masked - cut| = {tiny(proof)} on test images"
        lines.append(f"Its units are cut for real ({said}): {speed}.")
    else:
        lines.append(
            "Only weights are zero: the file is smaller because it is stored sparse; in memory the network is as large "
            f"as before and no faster (measured: {speed})."
        )
    return lines


def delivered_table(found: Mapping[str, Any]) -> Table:
    """Costs, dense and delivered."""
    dense, own = found["costs"]["dense"], found["costs"]["delivered"]
    before, after = found["latency"]["dense"], found["latency"]["delivered"]
    file = found["file"]["bytes"]
    rows = [
        (words, amount(dense[key]), amount(own[key]), times(dense[key], own[key]))
        for words, key in (("Parameters", "params"), ("Non-zero", "nonzero"), ("MACs", "macs"))
    ]
    rows.append(("File", sized(dense["bytes"]), sized(file), times(dense["bytes"], file)))
    timed = f"Latency, batch {before['batch_size']}, {many(before['threads'], 'thread')}"
    rows.append((timed, f"{before['median_ms']:.2f} ms", f"{after['median_ms']:.2f} ms", _speed(found)))
    return Table("The network delivered", ("Quantity", "Dense", "Delivered", "Ratio"), tuple(rows))


def _speed(found: Mapping[str, Any]) -> str:
    ratio = found["latency"]["ratio"]
    return f"{ratio['median']:.2f}x as fast as dense ({ratio['low']:.2f}..{ratio['high']:.2f})"
