"""What the section of analyses shows: a part for each thing looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from secateur.lab.report.explore import analyses_plots as plots
from secateur.lab.report.explore.analyses_plots import cell_name, mean
from secateur.lab.report.explore.dependence import dependence
from secateur.lab.report.explore.view import View
from secateur.lab.report.tables import Table
from secateur.lab.report.words import amount, level, many, percent, points, tiny

__all__ = ["view"]

Part = Mapping[str, Any]
Shown = tuple[list[str], list[Table], list[str]]


def view(section: Mapping[str, Any], name: str) -> View:
    """Sentences, pictures, tables and notes of every part, in the order asked for."""
    lines: list[str] = []
    tables: list[Table] = []
    notes = [
        f"Weights ranked by {section['criterion']}; {many(len(section['layers']), 'layer')} with "
        f"{amount(section['weights'])} weights. Variances, gradients and second derivatives: "
        f"{many(section['images'], 'training image')}, eval mode."
    ]
    for part in section["parts"]:
        said, shown, small = _PARTS[part["what"]](part, section)
        lines += said
        tables += shown
        notes += small
    pictures = [picture for part in section["parts"] for picture in plots.pictures(part, name)]
    return View(section["title"], tuple(lines), tuple(pictures), tuple(tables), tuple(notes))


def _feature_variance(part: Part, section: Mapping[str, Any]) -> Shown:
    lines, rows = [], []
    for cell in part["cells"]:
        known = {layer: ratio for layer, ratio in cell["layers"].items() if ratio is not None}
        if not known:
            continue
        low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
        less = sum(ratio < 1 for ratio in known.values())
        if cell in _told(part["cells"]):
            lines.append(
                f"Feature variance, {cell_name(cell)}: {less} of {many(len(known), 'layer')} vary less than unpruned; "
                f'from {known[low]:.3g} times in "{low}" to {known[high]:.3g} times in "{high}".'
            )
        span = "" if cell["networks"] == 1 else f" ({cell['low']:.3g}..{cell['high']:.3g})"
        rows.append(
            (
                *_where(cell),
                str(cell["networks"]),
                f"{cell['mean']:.3g}{span}",
                f"{known[low]:.3g} ({low})",
                f"{known[high]:.3g} ({high})",
                f"{less} of {len(known)}",
            )
        )
    head = ("Sigma", "Sparsity", "Networks", "Mean over layers (networks)", "Lowest", "Highest", "Layers below 1")
    note = (
        "Feature variance: of each layer's outputs, pruned over unpruned with the same noise; networks of several "
        "seeds are averaged first, in brackets the lowest and highest of them. A ratio says nothing about accuracy."
    )
    return lines, [Table("Feature variance, pruned over unpruned", head, tuple(rows))], [note]


def _gradient_flow(part: Part, section: Mapping[str, Any]) -> Shown:
    dense = part["dense"]["all"][0]
    lines = [
        f"Gradient flow, {cell_name(cell)}: {mean(cell['all']):.3g} with the gradients of removed weights, "
        f"{mean(cell['kept']):.3g} without (whole network: {dense:.3g})."
        for cell in _told(part["cells"])
    ]
    rows = [
        (*_where(cell), str(len(cell["all"])), _mean_and_range(cell["all"]), _mean_and_range(cell["kept"]))
        for cell in [part["dense"], *part["cells"]]
    ]
    head = ("Sigma", "Sparsity", "Networks", "All positions", "Kept weights only")
    note = (
        "Gradient flow: L2 norm of the gradient of the mean loss; mean over networks (lowest..highest). With removed "
        "positions and without are two numbers, not to be compared. A large one is no promise that training goes well."
    )
    return lines, [Table("Gradient flow", head, tuple(rows))], [note]


def _weight_cdf(part: Part, section: Mapping[str, Any]) -> Shown:
    if part["shares"] is None:
        return ["Weights against sigma: every weight is zero."], [], []
    lines, rows = [], []
    for at, sigma in enumerate(part["sigmas"]):
        if not sigma or not (sigma in part["asked"] or 0.002 < part["shares"][at] < 0.998):
            continue
        known = {layer: shares[at] for layer, shares in part["layers"].items() if shares is not None}
        low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
        rows.append(
            (tiny(sigma), percent(part["shares"][at]), *(f"{percent(known[one])} ({one})" for one in (low, high)))
        )
        if sigma in part["asked"]:
            lines.append(
                f"Noise of sigma {sigma:g} is larger than {percent(part['shares'][at])} of weights: from "
                f'{percent(known[low])} of those in "{low}" to {percent(known[high])} in "{high}".'
            )
    note = f"Weights against sigma: exact counts over {amount(part['counted'])} weights that are not zero."
    table = Table("Share of weights with |w| < sigma", ("Sigma", "All", "Lowest layer", "Highest layer"), tuple(rows))
    return lines, [table], [note]


def _mask_overlap(part: Part, section: Mapping[str, Any]) -> Shown:
    if not part["cells"]:
        return ["Mask overlap: no two masks to compare; give a sigma and a sparsity above 0."], [], []
    lines = [
        f"Masks of {cell['masks']} noises, {cell_name(cell)}: two of them share {mean(cell['kept']):.3f} of what "
        f"either keeps (Jaccard), one and the mask without noise {mean(cell['with_plain']):.3f}; chance alone would "
        f"give {cell['by_chance']:.3f}."
        for cell in _told(part["cells"])
    ]
    rows = []
    for cell in part["cells"]:
        layers = cell["layers"]
        least = min(layers, key=layers.__getitem__)
        spans = [_mean_and_range(cell[key]) for key in ("kept", "removed", "with_plain")]
        rows.append((*_where(cell), str(cell["masks"]), *spans, f"{layers[least]:.3f} ({least})"))
    head = ("Sigma", "Sparsity", "Masks", "Kept, pairs", "Removed, pairs", "Kept, with plain", "Least alike layer")
    note = (
        "Mask overlap: Jaccard similarity, mean (lowest..highest). Pairs that share a mask depend on each other, so "
        "there is no interval."
    )
    return lines, [Table("Overlap of masks", head, tuple(rows))], [note]


def _collapse(part: Part, section: Mapping[str, Any]) -> Shown:
    lines, rows = [], []
    cells: dict[tuple[float, float], list[Part]] = {}
    for cell in part["cells"]:
        cells.setdefault((cell["sigma"], cell["sparsity"]), []).append(cell)
    for several in cells.values():
        named: dict[tuple[str, str], list[Part]] = {}
        for cell in several:
            for one in cell["found"]:
                named.setdefault((one["reason"], one["layer"]), []).append(one)
        for (reason, layer), found in named.items():
            kept = [one["kept"] for one in found]
            span = str(kept[0]) if min(kept) == max(kept) else f"{min(kept)}..{max(kept)}"
            share = f"{span} of {amount(found[0]['of'])}"
            rows.append((*_where(several[0]), layer, reason, f"{len(found)} of {len(several)}", share))
            if reason != "thin":
                lines.append(
                    f'Alarm, {cell_name(several[0])}: "{layer}" is {reason} in {len(found)} of '
                    f"{many(len(several), 'network')}."
                )
    if not lines:
        looked = "empty" if part["not_followed"] else "empty or disconnected"
        lines.append(f"No layer is {looked} in any of {many(len(part['cells']), 'pruned network')}.")
    if rows and all(row[3] == "thin" for row in rows):
        lines.append(
            f"{many(len({row[2] for row in rows}), 'layer')} kept less than {percent(part['thin'])} somewhere."
        )
    head = ("Sigma", "Sparsity", "Layer", "What", "Networks", "Weights kept")
    notes = [f"Collapse: empty: nothing kept; thin: less than {percent(part['thin'])}; disconnected: no path uses it."]
    if part["not_followed"]:
        notes.append(f"Paths were not followed: {part['not_followed']}.")
    return lines, [Table("Layers with too little left", head, tuple(rows))] if rows else [], notes


def _hessian(part: Part, section: Mapping[str, Any]) -> Shown:
    if not part["cells"]:
        return [f"Second order: not to be had ({part['none'] or 'nothing was removed'})."], [], []
    lines = [
        f"Second order, {level(cell['sparsity'])} removed: the loss should change by {cell['predicted']:+.3g}; "
        f"it changes by {cell['measured']:+.3g}."
        for cell in (part["cells"][0], *part["cells"][1:][-1:])
    ]
    rows = []
    for cell in part["cells"]:
        layers = cell["layers"]
        most = max(layers, key=lambda layer: abs(layers[layer]))
        numbers = (-cell["slope"], cell["value"] / 2, cell["predicted"], cell["measured"])
        rows.append((level(cell["sparsity"]), *(f"{x:+.4g}" for x in numbers), f"{layers[most] / 2:+.4g} ({most})"))
    head = ("Sparsity", "-g^T d", "d^T H d / 2", "Predicted", "Measured", "Layer with most of d^T H d / 2")
    note = (
        "Second order: d are the weights removed, without noise. It holds for small d; where prediction and "
        "measurement part, it says nothing. A layer's share has its products with the other layers in it."
    )
    return lines, [Table("Change of the loss to second order", head, tuple(rows))], [note]


def _spread(part: Part, section: Mapping[str, Any]) -> Shown:
    lines, rows = [], []
    for cell in part["cells"]:
        if cell["deviation"] is not None and cell in _told(part["cells"]):
            lines.append(
                f"Spread, {cell_name(cell)}: {percent(cell['mean'])} over {many(cell['networks'], 'noise')}, deviation "
                f"{points(cell['deviation'])} points, from {percent(cell['lowest'])} to {percent(cell['highest'])}."
            )
        ends = "no interval" if cell["low"] is None else f"{points(cell['low'])}..{points(cell['high'])}"
        deviation = "" if cell["deviation"] is None else points(cell["deviation"])
        spans = f"{points(cell['lowest'])}..{points(cell['highest'])}"
        rows.append((*_where(cell), str(cell["networks"]), percent(cell["mean"]), ends, deviation, spans))
    head = ("Sigma", "Sparsity", "Networks", "Top-1", "95 % interval", "Deviation, points", "Lowest..highest")
    methods = "; ".join(dict.fromkeys(cell["method"] for cell in part["cells"]))
    return (
        lines,
        [Table("Accuracy over noises", head, tuple(rows))],
        [f"Spread: {many(section['count'], 'image')}; intervals: {methods}. The trained network is one and the same."],
    )


def _mc_dropout(part: Part, section: Mapping[str, Any]) -> Shown:
    rows, single, last = part["rows"], part["single"], part["rows"][-1]
    noise = "its dropout" if part["noise"] == "dropout" else f"masks that drop {level(part['drop_rate'])} of units"
    lines = [
        f"Noisy predictions ({noise}), mean of {last['passes']}: {percent(last['right'] / last['count'])} right, "
        f"entropy {last['entropy']:.3f} nats (one pass without noise: {percent(single['right'] / single['count'])}, "
        f"{single['entropy']:.3f})."
    ]
    if last["entropy_wrong"] is not None and last["entropy_right"] is not None:
        lines.append(
            f"Where that mean is wrong ({many(last['count'] - last['right'], 'image')}) its entropy is "
            f"{last['entropy_wrong']:.3f} nats, where it is right {last['entropy_right']:.3f}."
        )
    found = tuple(
        (
            label,
            percent(row["right"] / row["count"]),
            *(
                "none" if row[key] is None else f"{row[key]:.4f}"
                for key in ("entropy", "entropy_right", "entropy_wrong")
            ),
        )
        for label, row in [("without noise", single), *((str(row["passes"]), row) for row in rows)]
    )
    head = ("Passes", "Top-1", "Entropy, nats", "Where right", "Where wrong")
    notes = [f"Noisy predictions: entropy of the mean softmax output, over {many(last['count'], 'image')}."]
    if part["noise"] != "dropout":
        notes.append(
            "The network has no dropout, so every pass has a unit mask of its own seed, the same for all images; a "
            "network that was not trained under such masks is hurt by them."
        )
    return lines, [Table("Mean of noisy predictions", head, found)], notes


def _told(cells: list[Part]) -> list[Part]:
    """Those that sentences are about: the highest sparsity, with the least noise and with the most."""
    top = [cell for cell in cells if cell["sparsity"] == max(c["sparsity"] for c in cells) and cell["sparsity"]]
    return [cell for cell in top if cell["sigma"] in (top[0]["sigma"], top[-1]["sigma"])]


def _where(cell: Part) -> tuple[str, str]:
    return f"{cell['sigma']:g}", level(cell["sparsity"])


def _mean_and_range(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3g}"
    return f"{mean(values):.3g} ({min(values):.3g}..{max(values):.3g})"


_PARTS: dict[str, Callable[[Part, Mapping[str, Any]], Shown]] = {
    "feature_variance": _feature_variance,
    "gradient_flow": _gradient_flow,
    "weight_cdf": _weight_cdf,
    "mask_overlap": _mask_overlap,
    "collapse": _collapse,
    "hessian": _hessian,
    "spread": _spread,
    "mc_dropout": _mc_dropout,
    "weight_dependence": lambda part, section: dependence(part),
}
