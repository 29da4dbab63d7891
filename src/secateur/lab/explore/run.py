"""An exploration from start to report: the network, then every section that is not done yet."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from secateur.analysis.latency import device_name
from secateur.errors import CheckpointError, StorageError
from secateur.lab.context import Options
from secateur.lab.explore.checks import check_session
from secateur.lab.explore.recipe import ExploreRecipe
from secateur.lab.explore.session import Session
from secateur.lab.listener import Listener
from secateur.lab.provenance import provenance
from secateur.lab.recipe_file import write_recipe
from secateur.lab.store import Planned, locked, write_json

__all__ = ["check_exploration", "exploration_folder", "explore", "plan_exploration"]


def exploration_folder(recipe: ExploreRecipe, options: Options) -> Path:
    """Where an exploration's results go: the same recipe, the same folder."""
    return options.out / f"{recipe.name}-{recipe.hash}"


def plan_exploration(recipe: ExploreRecipe, options: Options) -> list[Planned]:
    """The stages an exploration would go through, without doing any (data are read, nothing is written)."""
    session = Session(recipe, options)
    check_session(session)
    planned = []
    if session.training is not None:
        planned.append(Planned("train the network", session.training.key, session.training.done))
    for section in recipe.explore:
        stage = session.stage(section)
        planned.append(Planned(section.title or section.kind, stage.key, stage.done))
    return planned


def check_exploration(result: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` unless a result has what every report reads; a section's own is read by its view."""
    try:
        network = result["network"]
        whole = network["held_images"] > 0 and all(s["kind"] and s["title"] and s["stage"] for s in result["sections"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"not the result of an exploration ({error!r} is missing or malformed)") from error
    if not whole:
        raise CheckpointError("not the result of an exploration (a section or the images held back are empty)")


def explore(recipe: ExploreRecipe, options: Options, listener: Listener | None = None) -> dict[str, Any]:
    """Run an exploration, resuming whatever an earlier run left, and write result and report.

    Returns: the result, as stored in `result.json`, with `"folder"` added.

    Raises: `BusyError` if another process runs the same recipe in the same output folder.
    """
    from secateur.lab.report.explore.render import write_exploration

    listener = listener or Listener()
    folder = exploration_folder(recipe, options)
    started = time.perf_counter()
    session = Session(recipe, options, listener)
    # Before there is a folder: what cannot work leaves none.
    check_session(session)
    with locked(folder, wait=0):
        origin = provenance(device_name(session.context.runtime.device), torch.get_num_threads())
        write_json(folder / "env.json", origin)
        try:
            write_recipe(recipe, folder / "recipe.yaml")
        except OSError as error:
            raise StorageError(f"cannot write {folder / 'recipe.yaml'}: {error.strerror}") from error
        if not options.resume:
            _forget(session)
        trained = _train(session)
        session.check_outputs()
        sections = [_section(session, section) for section in recipe.explore]
        judged, held = session.counts
        dense = session.accuracy(session.network, session.held)
        result = {
            "schema": 1,
            "kind": "exploration",
            "name": recipe.name,
            "recipe_hash": recipe.hash,
            "recipe": recipe.resolved(),
            "provenance": origin,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "network": {
                "model": recipe.model.name,
                "weights": None if recipe.weights is None else recipe.weights.file,
                "source": session.source,
                "trained": trained,
                "judged_images": judged,
                "held_images": held,
                "held_right": dense[0],
            },
            "sections": sections,
            "wall_seconds": time.perf_counter() - started,
        }
        write_json(folder / "result.json", result)
        listener.message("writing the report")
        write_exploration(result, folder / "report")
    return {**result, "folder": str(folder)}


def _train(session: Session) -> dict[str, Any] | None:
    stage = session.training
    if stage is None:
        return None
    cached = stage.done
    session.listener.stage_started("train the network", session.steps)
    trained = session.train()
    session.listener.stage_finished("train the network", cached)
    assert trained is not None
    return {name: trained[name] for name in ("steps", "seconds", "final_loss", "top1")}


def _section(session: Session, section: Any) -> dict[str, Any]:
    session.listener.check_stop()
    stage, title = session.stage(section), section.title or section.kind
    session.listener.stage_started(title, 0)
    cached = stage.done
    with stage.work():
        if not stage.done:
            started = time.perf_counter()
            found = importlib.import_module(f"secateur.lab.explore.{section.kind}").run(session, section, stage.folder)
            stage.finish({**found, "seconds": time.perf_counter() - started})
        result = stage.result(seconds=float)
    session.listener.stage_finished(title, cached)
    return {
        "kind": section.kind,
        "title": title,
        "stage": stage.key,
        "spec": section.model_dump(mode="json"),
        **result,
    }


def _forget(session: Session) -> None:
    from secateur.lab.explore.search import begin_anew

    if session.training is not None:
        session.training.forget()
    for section in session.recipe.explore:
        session.stage(section).forget()
        if section.kind == "search":
            begin_anew(session, section)
