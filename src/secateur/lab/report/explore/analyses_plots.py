"""The pictures of the section of analyses, a function for each part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from secateur.core.statistics import wilson
from secateur.lab.report.explore.charts import Series, chart, sparsity_ticks, stretched
from secateur.lab.report.explore.dependence import dependence_pictures
from secateur.lab.report.picture import Picture
from secateur.lab.report.words import level, percent

__all__ = ["cell_name", "mean", "pictures"]

Part = Mapping[str, Any]
_SPARSITY = "removed, % (spaced by log of what is kept)"
# Layers with names along an axis; more have only their number.
_NAMED = 8
_LETTERS = 9


def pictures(part: Part, name: str) -> list[Picture]:
    """Those of one part; none where there is nothing to draw."""
    return _PARTS[part["what"]](part, f"{name}-{part['what'].replace('_', '-')}")


def cell_name(cell: Part) -> str:
    """Which networks it is of, in words."""
    noise = f"sigma {cell['sigma']:g}" if cell["sigma"] else "without noise"
    return f"{level(cell['sparsity'])} {noise}"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _feature_variance(part: Part, name: str) -> list[Picture]:
    found = []
    sigmas = list(dict.fromkeys(cell["sigma"] for cell in part["cells"]))
    for number, sigma in enumerate(sigmas, start=1):
        cells = [cell for cell in part["cells"] if cell["sigma"] == sigma and cell["sparsity"]]
        layers = list(cells[0]["layers"]) if cells else []
        series = []
        for cell in cells:
            known = [(at, cell["layers"][one]) for at, one in enumerate(layers) if cell["layers"][one]]
            series.append(Series(level(cell["sparsity"]), [at for at, _ in known], [ratio for _, ratio in known]))
        if not any(one.xs for one in series):
            continue
        said = f"noise of sigma {sigma:g}" if sigma else "without noise"
        found.append(
            chart(
                name if len(sigmas) == 1 else f"{name}-{number}",
                f"Feature variance, {said}",
                series,
                ("layer", "pruned over unpruned"),
                "A line for each sparsity. Below 1 (dotted) a layer's outputs vary less than unpruned, above 1 more; "
                "where they do not vary at all there is no point. Layers are in the network's order.",
                scales=("linear", "log"),
                ticks=_layer_ticks(layers),
                level_at=1.0,
            )
        )
    return found


def _layer_ticks(layers: Sequence[str]) -> tuple[list[float], list[str]]:
    short = [one if len(one) <= _LETTERS else "..." + one[3 - _LETTERS :] for one in layers]
    if len(layers) <= _NAMED and len(set(short)) == len(short) and sum(map(len, short)) <= 48:
        return list(range(len(layers))), short
    step = max(1, -(-len(layers) // 12))
    return list(range(0, len(layers), step)), [str(at + 1) for at in range(0, len(layers), step)]


def _gradient_flow(part: Part, name: str) -> list[Picture]:
    cells, dense = part["cells"], part["dense"]["all"][0]
    found = []
    for key, title in (("all", "all positions"), ("kept", "kept weights only")):
        series = []
        for sigma in dict.fromkeys(cell["sigma"] for cell in cells):
            of = [cell for cell in cells if cell["sigma"] == sigma]
            series.append(_over_sparsity(f"sigma {sigma:g}" if sigma else "no noise", of, key, control=not sigma))
        found.append(
            chart(
                f"{name}-{key}",
                f"Gradient flow, {title}",
                series,
                (_SPARSITY, "norm of the mean gradient"),
                "Mean over networks, bars from the lowest to the highest. Dotted: the whole network.",
                scales=("linear", _log_if_positive([y for one in series for y in one.ys])),
                ticks=sparsity_ticks([cell["sparsity"] for cell in cells]),
                level_at=dense or None,
            )
        )
    return found


def _over_sparsity(label: str, cells: Sequence[Part], key: str, control: bool = False) -> Series:
    xs = [stretched(cell["sparsity"]) for cell in cells]
    several = any(len(cell[key]) > 1 for cell in cells)
    low = [min(cell[key]) for cell in cells] if several else []
    high = [max(cell[key]) for cell in cells] if several else []
    role: Any = "control" if control else "one of many"
    return Series(label, xs, [mean(cell[key]) for cell in cells], low, high, role)


def _weight_cdf(part: Part, name: str) -> list[Picture]:
    if part["shares"] is None:
        return []
    # Where nothing changes any more there is nothing to see.
    inside = [at for at, sigma in enumerate(part["sigmas"]) if sigma and 0.002 < part["shares"][at] < 0.998]
    if not inside:
        return []
    shown = [at for at in range(max(0, inside[0] - 1), min(len(part["sigmas"]), inside[-1] + 2)) if part["sigmas"][at]]
    xs = [part["sigmas"][at] for at in shown]
    known = {layer: [100 * shares[at] for at in shown] for layer, shares in part["layers"].items() if shares}
    middle = len(shown) // 2
    ends = {min(known, key=lambda one: known[one][middle]), max(known, key=lambda one: known[one][middle])}
    series = [Series("", xs, ys, role="faint") for layer, ys in known.items() if layer not in ends]
    series += [Series(layer, xs, known[layer]) for layer in known if layer in ends]
    series.append(Series("all layers", xs, [100 * part["shares"][at] for at in shown], role="control"))
    return [
        chart(
            name,
            "Weights smaller than the noise",
            series,
            ("sigma", "weights with |w| < sigma, %"),
            "Vertical: the sigmas asked for. Named are the layers lowest and highest at the middle of the axis; faint "
            "are the others.",
            scales=("log", "linear"),
            marks=[sigma for sigma in part["asked"] if xs[0] <= sigma <= xs[-1]],
        )
    ]


def _mask_overlap(part: Part, name: str) -> list[Picture]:
    if not part["cells"]:
        return []
    series = []
    for sigma in dict.fromkeys(cell["sigma"] for cell in part["cells"]):
        cells = [cell for cell in part["cells"] if cell["sigma"] == sigma]
        series.append(_over_sparsity(f"sigma {sigma:g}", cells, "kept"))
    chance = {cell["sparsity"]: cell["by_chance"] for cell in part["cells"]}
    xs = [stretched(sparsity) for sparsity in chance]
    series.append(Series("by chance", xs, list(chance.values()), role="control"))
    return [
        chart(
            name,
            "Overlap of masks of several noises",
            series,
            (_SPARSITY, "Jaccard similarity of what is kept"),
            "Mean over pairs of masks, bars from the lowest pair to the highest. By chance: masks that know nothing.",
            ticks=sparsity_ticks(list(chance)),
        )
    ]


def _hessian(part: Part, name: str) -> list[Picture]:
    cells = part["cells"]
    if not cells:
        return []
    xs = [stretched(cell["sparsity"]) for cell in cells]
    lines = {
        "measured": ([cell["measured"] for cell in cells], "control"),
        "predicted": ([cell["predicted"] for cell in cells], "one of many"),
        "d^T H d / 2 alone": ([cell["value"] / 2 for cell in cells], "one of many"),
    }
    series = [Series(label, xs, ys, role=role) for label, (ys, role) in lines.items()]  # type: ignore[arg-type]
    return [
        chart(
            name,
            "Change of the loss, to second order",
            series,
            (_SPARSITY, "change of the loss, nats"),
            "Predicted: by gradient and Hessian at the whole network's weights, the removed ones as the step.",
            scales=("linear", _log_if_positive([y for one in series for y in one.ys])),
            ticks=sparsity_ticks([cell["sparsity"] for cell in cells]),
        )
    ]


def _spread(part: Part, name: str) -> list[Picture]:
    series = []
    for sigma in dict.fromkeys(cell["sigma"] for cell in part["cells"]):
        cells = [cell for cell in part["cells"] if cell["sigma"] == sigma]
        low, high = ([None if cell[k] is None else 100 * cell[k] for cell in cells] for k in ("low", "high"))
        xs, ys = [stretched(cell["sparsity"]) for cell in cells], [100 * cell["mean"] for cell in cells]
        role: Any = "one of many" if sigma else "control"
        series.append(Series(f"sigma {sigma:g}" if sigma else "no noise", xs, ys, low, high, role=role))
    methods = "; ".join(dict.fromkeys(cell["method"] for cell in part["cells"]))
    return [
        chart(
            name,
            "Accuracy over noises",
            series,
            (_SPARSITY, "top-1, %"),
            f"Mean over networks; bars are 95 % intervals ({methods}).",
            ticks=sparsity_ticks([cell["sparsity"] for cell in part["cells"]]),
        )
    ]


def _mc_dropout(part: Part, name: str) -> list[Picture]:
    rows, single = part["rows"], part["single"]
    xs = [row["passes"] for row in rows]
    ends = [wilson(row["right"], row["count"]) for row in rows]
    ticks = ([float(x) for x in xs], [str(x) for x in xs])
    lines = []
    for key, label in (("entropy", "all images"), ("entropy_right", "right"), ("entropy_wrong", "wrong")):
        if all(row[key] is not None for row in rows):
            lines.append(
                Series(label, xs, [row[key] for row in rows], role="control" if key == "entropy" else "one of many")
            )
    accuracy = Series(
        "mean of the passes",
        xs,
        [100 * row["right"] / row["count"] for row in rows],
        [100 * low for low, _ in ends],
        [100 * high for _, high in ends],
    )
    dotted = "Dotted: one pass without noise"
    return [
        chart(
            f"{name}-entropy",
            "Predictive entropy",
            lines,
            ("noisy passes", "entropy of the mean, nats"),
            f"Mean over images. {dotted}, all images. Right and wrong by the mean prediction of so many passes.",
            scales=("log", "linear"),
            ticks=ticks,
            level_at=single["entropy"],
        ),
        chart(
            f"{name}-accuracy",
            "Accuracy of the mean prediction",
            [accuracy],
            ("noisy passes", "top-1, %"),
            f"Bars: 95 % Wilson intervals over images. {dotted}.",
            scales=("log", "linear"),
            ticks=ticks,
            level_at=100 * single["right"] / single["count"],
        ),
    ]


def _collapse(part: Part, name: str) -> list[Picture]:
    found = []
    sigmas = list(dict.fromkeys(cell["sigma"] for cell in part["cells"]))
    for number, sigma in enumerate(sigmas, start=1):
        cells = [c for c in part["cells"] if c["sigma"] == sigma and c["sparsity"] and "layers" in c]
        series, layers = [], list(cells[0]["layers"]) if cells else []
        for sparsity in dict.fromkeys(cell["sparsity"] for cell in cells):
            same = [cell["layers"] for cell in cells if cell["sparsity"] == sparsity]
            kept = [[100 * shares[layer] for shares in same] for layer in layers]
            # Nothing has no place on a log scale.
            at = [index for index, values in enumerate(kept) if max(values) > 0]
            low, high = ([end(kept[index]) or None for index in at] if len(same) > 1 else [] for end in (min, max))
            series.append(Series(level(sparsity), at, [mean(kept[index]) for index in at], low, high))
        if not any(one.xs for one in series):
            continue
        said = f"noise of sigma {sigma:g}" if sigma else "without noise"
        thin = f" Dotted: {percent(part['thin'])}." if part["thin"] else ""
        bars = " Bars: the lowest and highest of the networks." if any(one.low for one in series) else ""
        found.append(
            chart(
                name if len(sigmas) == 1 else f"{name}-{number}",
                f"What layers keep, {said}",
                series,
                ("layer", "weights kept, %"),
                f"A line for each sparsity; where nothing is kept there is no point.{thin}{bars}",
                scales=("linear", "log"),
                ticks=_layer_ticks(layers),
                level_at=100 * part["thin"] or None,
            )
        )
    return found


def _log_if_positive(values: Sequence[float]) -> str:
    return "log" if values and min(values) > 0 else "linear"


_PARTS: dict[str, Callable[[Part, str], list[Picture]]] = {
    "feature_variance": _feature_variance,
    "gradient_flow": _gradient_flow,
    "weight_cdf": _weight_cdf,
    "mask_overlap": _mask_overlap,
    "collapse": _collapse,
    "hessian": _hessian,
    "spread": _spread,
    "mc_dropout": _mc_dropout,
    "weight_dependence": dependence_pictures,
}
