"""Commands that list what there is: methods, models, recipes, this installation."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Annotated, Any

import typer

from secateur._version import __version__
from secateur.cli.console import errors_to_exit, out_json, table
from secateur.errors import UnknownNameError

__all__ = ["add_to"]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, errors too.")]


def add_to(app: typer.Typer) -> None:
    """Register this file's commands."""
    app.command()(methods)
    app.command()(models)
    app.command()(doctor)


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, in full.")] = None, json_: Json = False
) -> None:
    """List criteria and regularizers, or explain one. Example: secateur methods targeted_dropout"""
    with errors_to_exit(json_):
        from secateur.lab.cards import method_rows

        rows = method_rows()
        if name is not None:
            _explain(name, rows, json_)
            return
        from secateur.criteria import CRITERIA
        from secateur.lab.plugins import broken_entries
        from secateur.regularizers import REGULARIZERS

        broken = broken_entries(REGULARIZERS, CRITERIA)
        if json_:
            out_json({"methods": rows, "broken": broken})
        else:
            columns = ("name", "phase", "needs", "granularities", "state", "cost", "paper")
            table("", columns, [[_cell(row[c]) for c in columns] for row in rows])
            for entry in broken:
                typer.echo(f"broken: {_broken(entry)}")


def _cell(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def _broken(entry: dict[str, str]) -> str:
    return f"{entry['kind']} {entry['name']} ({entry['entry']}): {entry['reason']}"


def _explain(name: str, rows: list[dict[str, Any]], as_json: bool) -> None:
    from secateur.criteria import CRITERIA
    from secateur.lab.plugins import method_class
    from secateur.regularizers import REGULARIZERS

    row = next((r for r in rows if r["name"] == name), None)
    if row is None:
        for registry in (REGULARIZERS, CRITERIA):
            if name in registry.names():
                method_class(registry, name)  # it is broken: this says why
        raise UnknownNameError("method", name, [r["name"] for r in rows])
    kind = (CRITERIA if row["kind"] == "criterion" else REGULARIZERS).load(name)
    parameters = {f.name: repr(f.default) for f in fields(kind) if f.init}
    if as_json:
        out_json({**row, "parameters": parameters, "description": inspect.getdoc(kind)})
        return
    typer.echo(f"{name} ({row['kind']}): {row['summary']}\n")
    typer.echo(inspect.getdoc(kind) or "")
    typer.echo("\nIn a recipe: {name: " + name + "".join(f", {k}: {v}" for k, v in parameters.items()) + "}")


def models(json_: Json = False) -> None:
    """List the built-in networks; torchvision:NAME and timm:NAME work too."""
    with errors_to_exit(json_):
        from secateur.lab.models import CATALOG

        rows: list[dict[str, Any]] = [
            {
                "name": name,
                "summary": info.summary,
                "in_shape": list(info.in_shape),
                "num_classes": info.num_classes,
            }
            for name, info in CATALOG.items()
        ]
        if json_:
            out_json({"models": rows})
        else:
            shown = [(r["name"], "x".join(map(str, r["in_shape"])), r["num_classes"], r["summary"]) for r in rows]
            table("", ("name", "input", "classes", "summary"), shown)


def doctor(json_: Json = False) -> None:
    """Show versions, devices, extras and the data folder; start here when something is odd."""
    with errors_to_exit(json_):
        import os
        import platform

        import torch

        from secateur.analysis.latency import device_name
        from secateur.criteria import CRITERIA
        from secateur.lab.models import MODELS
        from secateur.lab.plugins import broken_entries
        from secateur.lab.provenance import PACKAGES, installed
        from secateur.regularizers import REGULARIZERS

        extras = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "timm": ("timm",)}
        found: dict[str, Any] = {
            "python": platform.python_version(),
            "packages": {"secateur": __version__, **{name: installed(name) for name in PACKAGES}},
            "devices": [device_name("cpu"), *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))],
            "threads": torch.get_num_threads(),
            "extras": {extra: all(installed(p) for p in needed) for extra, needed in extras.items()},
            "data_dir": os.environ.get("SECATEUR_DATA_DIR"),
            "broken": broken_entries(REGULARIZERS, CRITERIA, MODELS),
        }
        if json_:
            out_json(found)
            return
        rows = [("python", found["python"])]
        rows += [(name, v or "not installed") for name, v in found["packages"].items()]
        rows += [("device", d) for d in found["devices"]]
        rows += [("threads", str(found["threads"])), ("data folder", found["data_dir"] or "$SECATEUR_DATA_DIR not set")]
        for extra, there in found["extras"].items():
            rows.append((f"extra [{extra}]", "ready" if there else f"pip install 'secateur[{extra}]'"))
        rows += [("broken entry", _broken(entry)) for entry in found["broken"]]
        table("", ("what", "found"), rows)
