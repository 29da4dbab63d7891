"""Put measured figures into the method cards, verbatim: `python tools/quote_evidence.py`."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO, CRITERIA, BENCH = "evidence/demo/accuracy.md", "evidence/digits-criteria/accuracy.md", "benchmarks/README.md"
METHODS = "evidence/digits-methods/accuracy.md"
TD, STANDARD = "evidence/cifar10-td-reduced/accuracy.md", "evidence/cifar10-ddrop-reduced/accuracy.md"
NONE = "Not yet measured."

# card -> rows of the demo's tables (methods) or of the criteria's table, and rows of the benchmark tables
EVIDENCE = {
    "none": (DEMO, ["magnitude alone"]),
    "dropout": (DEMO, ["magnitude alone", "dropout (units)"]),
    "targeted_dropout": (DEMO, ["magnitude alone", "Targeted Dropout (weights)", "Targeted Dropout (units)"]),
    "ddrop": (DEMO, ["magnitude alone", "DDROP"]),
    **{
        name: (CRITERIA, ["magnitude", "random", name])
        for name in ("bn_gamma", "mean_activation", "taylor", "saliency")
    },
    "magnitude": (CRITERIA, ["magnitude", "random"]),
    "random": (CRITERIA, ["magnitude", "random"]),
    **{
        name: (METHODS, ["magnitude alone", "random", *labels])
        for name, labels in {
            "lamp": ["LAMP"],
            "apoz": ["APoZ"],
            "wanda": ["Wanda"],
            "oracle": ["oracle"],
            "learned": ["variational dropout", "L0 (units)", "Smallify (units)"],
            "l0": ["L0 (units)"],
            "smallify": ["Smallify (units)"],
            "variational_dropout": ["variational dropout"],
            "l1": ["L1"],
            "irrelevance": ["irrelevance"],
            "soft_filter_pruning": ["SFP", "ASFP"],
            "pgmpf": ["PGMPF"],
            "gradual_pruning": ["gradual (weights)"],
            "mask_pool": ["mask pool"],
            "network_slimming": ["network slimming"],
            "snip": ["SNIP score", "SNIP at init", "random at init"],
            "grasp": ["GraSP score", "GraSP at init", "random at init"],
            "synflow": ["SynFlow score", "SynFlow at init", "random at init"],
        }.items()
    },
}
# What follows the first: reduced forms of published tables, with the published rows beside them.
REDUCED = {
    "targeted_dropout": (
        TD,
        [
            "none",
            "Targeted Dropout weight (.75, .90)",
            "Targeted Dropout weight, ramp (.99, .90)",
            "Targeted Dropout unit (.90, .75)",
        ],
    ),
    "dropout": (TD, ["none", "dropconnect .25"]),
    "ddrop": (STANDARD, ["plain", "Standard", "DDROP"]),
    "network_slimming": (STANDARD, ["plain", "Standard"]),
}
PAPERS = "evidence/published.md"
PUBLISHED = {
    TD: [
        "weights: none",
        "weights: Targeted Dropout (.75, .90)",
        "units: none",
        "units: Targeted Dropout (.90, .75)",
    ],
    STANDARD: ["Standard", "DDROP"],
}
COST = {
    "dropout": ["plain step", "dropout, weight", "dropout, unit"],
    "targeted_dropout": ["plain step", "targeted dropout, weight", "targeted dropout, unit"],
    "ddrop": ["plain step", "ddrop", "ddrop with L1"],
    "magnitude": ["speed-up: global_unstructured", "speed-up: ours, same rule", "extra memory: ours, same rule"],
    "lamp": ["over magnitude: lamp, global", "over magnitude: lamp, min_keep=1", "extra memory: lamp, global"],
    "mean_activation": ["plain forward", "mean \\|a\\|"],
    "mask_pool": ["plain step", "mask pool"],
    "l1": ["plain step", "l1"],
    "soft_filter_pruning": ["plain step", "soft filter pruning"],
    "pgmpf": ["plain step", "pgmpf"],
    "l0": ["plain step", "l0, unit", "l0, weight"],
    "smallify": ["plain step", "smallify, unit"],
    "variational_dropout": ["plain step", "variational dropout"],
}
ABOUT = {
    DEMO: "Digits, `digits_cnn`, paired seeds, `top1` in percent with its interval; recipe `demo`.",
    CRITERIA: "Digits, `digits_cnn`, plainly trained, units removed, `top1` in percent with its interval; recipe "
    "`digits-criteria`.",
    TD: "Tables of Targeted Dropout's paper in small, for their shape and not their level; recipe\n"
    "`cifar10-td-reduced` says how small.",
    STANDARD: "DDROP against Standard in small, inner channels ranked by |gamma|, before fine-tuning; recipe\n"
    "`cifar10-ddrop-reduced` says how small.",
    METHODS: "Digits, `digits_cnn`, five paired seeds, `top1` in percent with its interval; recipe `digits-methods`.",
}
_PUBLISHED_NOISE = [
    *(("CIFAR-10", net, "grid") for net in ("ResNet-18", "ResNet-50", "VGG-19")),
    *(("CIFAR-100", net, "grid") for net in ("ResNet-18", "ResNet-50", "VGG-19")),
    *(("CIFAR-10", net, "NSGA-II") for net in ("ResNet-18", "ResNet-50", "VGG-19")),
]
# card -> heading -> (what it is, file, rows of its tables or titles of its sections)
VARIANTS: dict[str, dict[str, list[tuple[str, str, list[str]]]]] = {
    "stochastic_pruning": {
        "Cost (measured)": [
            (
                "One copy of the weights for any number of networks; ratios as `benchmarks` prints them.",
                BENCH,
                [
                    "preparation, speed-up: deep copy and global_unstructured",
                    "preparation, speed-up: in place",
                    "extra memory, 8 variants",
                    "extra memory, 512 variants",
                    "papers' way, speed-up",
                    "speed-up: bfloat16, channels last",
                    "speed-up: float32, channels last",
                    "recall: bfloat16, channels last",
                    "recall: float32, channels last",
                ],
            )
        ],
        "Evidence": [
            (
                "ResNet-20 on CIFAR-10, weights trained by others; judged by some test images and confirmed on\n"
                "the others; recipe `cifar10-resnet20-noise`: magnitude, LAMP, masks exchanged.",
                "evidence/cifar10-resnet20-noise/findings.md",
                ["magnitude", "LAMP", "masks exchanged"],
            ),
            (
                "The same network searched with both pairs of objectives; recipe `cifar10-resnet20-search`.",
                "evidence/cifar10-resnet20-search/findings.md",
                ["accuracy and gain of noise", "accuracy and sparsity"],
            ),
            (
                "Published, for larger networks trained with the paper's recipe:",
                PAPERS,
                [f"{data}, {net}, {how}" for data, net, how in _PUBLISHED_NOISE],
            ),
        ],
    },
    "mask_guided": {
        "Cost (measured)": [],
        "Evidence": [
            (
                "Digits, a small network of the thesis's kind trained under ten masks; recipe `digits-masks`.",
                "evidence/digits-masks/findings.md",
                ["Cut along masks"],
            ),
            (
                "Published, for Imagenette at its full size:",
                PAPERS,
                ["fresh masks, dropout mask", "fresh masks, L2 norm"],
            ),
        ],
    },
}


def quote(file: str, wanted: list[str]) -> str:
    """The tables of `file` that have a wanted row, with only those rows, between the markers that the tests read.

    A row of the table of methods is wanted by its method, others also by their criterion or variant.
    """
    cells = slice(1, 2) if file in (METHODS, PAPERS) else slice(1, 4)
    blocks, table = [], []
    for line in [*(ROOT / file).read_text().splitlines(), ""]:
        if line.startswith("|"):
            table.append(line)
            continue
        rows = [r for r in table[2:] if any(cell.strip() in wanted for cell in re.split(r"(?<!\\)\|", r)[cells])]
        if rows:
            blocks.append("\n".join([*table[:2], *rows]))
        table = []
    return f"<!-- from: {file} -->\n" + "\n\n".join(blocks) + "\n<!-- end from -->\n"


def findings(file: str, titles: list[str]) -> str:
    """What those sections of an exploration say, each with its first table, between the markers that the tests read."""
    kept = []
    for part in (ROOT / file).read_text().split("\n## ")[1:]:
        title, _, body = part.partition("\n")
        if title not in titles:
            continue
        lines = body.splitlines()
        said = [line for line in lines if line.startswith("- ")]
        start = next((n for n, line in enumerate(lines) if line.startswith("|")), len(lines))
        stop = next((n for n in range(start, len(lines)) if not lines[n].startswith("|")), len(lines))
        kept.append("\n".join([*said, "", *lines[start:stop]]) if start < stop else "\n".join(said))
    return f"<!-- from: {file} -->\n" + "\n\n".join(kept) + "\n<!-- end from -->\n"


def section(text: str, heading: str, body: str) -> str:
    """`text` with the body of one second-level section replaced."""
    before, mark, rest = text.partition(f"## {heading}\n\n")
    return before + mark + body + rest[rest.index("\n## ") :]


def main() -> None:
    for path in sorted((ROOT / "docs" / "methods").glob("*.md")):
        if path.stem not in EVIDENCE:
            continue
        file, rows = EVIDENCE[path.stem]
        cost = f"{NONE}\n"
        if path.stem in COST:
            cost = "Times and ratios as `benchmarks` prints them.\n\n" + quote(BENCH, COST[path.stem])
        evidence = f"{ABOUT[file]}\n\n" + quote(file, rows)
        if file == DEMO:
            if path.stem == "ddrop":
                evidence += "\nThe demo ranks all networks by magnitude; |gamma| (`bn_gamma`) below.\n"
            evidence += "\nA random control, for units: [random](random.md).\n"
        if path.stem in REDUCED:
            file, rows = REDUCED[path.stem]
            evidence += f"\n{ABOUT[file]}\n\n{quote(file, rows)}"
            evidence += f"\nPublished, for whole networks and data:\n\n{quote(PAPERS, PUBLISHED[file])}"
        text = section(path.read_text(), "Cost (measured)", cost)
        text = section(text, "Evidence", evidence)
        path.write_text(text)
    for path in sorted((ROOT / "docs" / "variants").glob("*.md")):
        text = path.read_text()
        for heading, parts in VARIANTS[path.stem].items():
            if parts:
                text = section(
                    text, heading, "\n".join(f"{about}\n\n{_quoted(file, rows)}" for about, file, rows in parts)
                )
        path.write_text(text)


def _quoted(file: str, rows: list[str]) -> str:
    return findings(file, rows) if file.endswith("findings.md") else quote(file, rows)


if __name__ == "__main__":
    main()
