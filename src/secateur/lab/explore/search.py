"""A search over networks made from one: the front, the network chosen from it, and recipes for every point."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from secateur.errors import SecateurError
from secateur.lab.checkpoint import write_atomically
from secateur.lab.explore.deliver import deliver
from secateur.lab.explore.problems import DIRECTIONS, Problem, make_problem, stored_bytes
from secateur.lab.explore.session import Session
from secateur.lab.explore.specs import SearchSectionSpec, seconds
from secateur.lab.listener import Interrupted
from secateur.lab.recipe import canonical_hash
from secateur.lab.store import Stage, read_json, write_json
from secateur.search import SearchResult, SearchSpec, TrialRecord, run_search

__all__ = ["begin_anew", "run"]

_GENERATIONS = 10
_ENDLESS = 1_000_000


class _Stopped(Exception):
    """A wish to stop inside a trial: a search counts deliberate errors as failed trials, and this is none."""


def run(session: Session, spec: SearchSectionSpec, folder: Path) -> dict[str, Any]:
    """All trials, the front with its accuracy on images held back, the network delivered."""
    problem = make_problem(session, spec)
    dense = problem.share(session.network)
    result = _searched(session, spec, problem)
    if not result.front():
        reason = result.failed[0].reason if result.failed else "no trial was finished"
        raise SecateurError(f"search: all {len(result.trials)} trials failed; the first: {reason}")
    # Trials of equal worth are one point.
    distinct = {tuple(_values(trial).values()): trial for trial in reversed(result.front())}
    front = sorted(distinct.values(), key=lambda trial: (-_values(trial)["accuracy"], trial.trial))
    points: list[dict[str, Any]] = []
    book = folder / "front.json"
    known = read_json(book, "delete it to measure the front again") if book.is_file() else {}
    for number, trial in enumerate(front):
        session.listener.check_stop()
        session.listener.advanced(number, f"front point {number + 1} of {len(front)} on images held back")
        # A study that was begun anew has other trials of the same numbers.
        made = canonical_hash([trial.trial, trial.numbers, trial.values, trial.extras])
        if made not in known:
            right, count = session.accuracy(problem.make(trial.numbers, trial.extras).network, session.held)
            known[made] = right / count
            write_json(book, known)
        path = _recipe(session, spec, trial, number, folder)
        points.append({**trial.record(), "held_accuracy": known[made], "recipe": path.name})
    if "latency" in spec.objectives:
        # In a trial a network is timed alone, whatever else the machine does then; here all are timed in turn.
        networks = [problem.make(trial.numbers, trial.extras).network for trial in front]
        for point, latency in zip(points, problem.latencies(networks), strict=True):
            point["latency_again"] = latency
        del networks
    chosen, why = _choose(spec, points, dense)
    return {
        "notes": problem.notes,
        "objectives": list(spec.objectives),
        "directions": [DIRECTIONS[name] for name in spec.objectives],
        "names": list(result.space.names),
        "optuna": result.optuna,
        "judged": session.counts[0],
        "held": session.counts[1],
        "dense": dense,
        "trials": [trial.record() for trial in result.trials],
        "front": points,
        "hypervolume": _hypervolumes(session, spec, result),
        "chosen": chosen,
        "why": why,
        "delivered": deliver(session, problem, front[chosen].numbers, front[chosen].extras, folder),
    }


def _searched(session: Session, spec: SearchSectionSpec, problem: Problem) -> SearchResult:
    listener, started = session.listener, time.monotonic()
    limit = None if spec.budget is None else seconds(spec.budget)
    trials = spec.trials
    if trials is None and limit is not None:
        trials = _ENDLESS
    elif trials is None and spec.sampler != "grid":
        trials = _GENERATIONS * spec.population
    finished = 0

    def stop() -> bool:
        # At least one trial, however short the time.
        return listener.stop or (limit is not None and finished > 0 and time.monotonic() - started > limit)

    def told(trial: TrialRecord) -> None:
        nonlocal finished
        finished += 1
        known = "" if trials in (None, _ENDLESS) else f" of {trials}"
        listener.advanced(trial.trial + 1, f"trial {trial.trial + 1}{known}")

    def objective(numbers: dict[str, Any]) -> dict[str, Any]:
        try:
            return problem.values(numbers, spec.objectives)
        except Interrupted as error:
            raise _Stopped(str(error)) from error

    asked = SearchSpec(
        tuple((name, DIRECTIONS[name]) for name in spec.objectives),
        None if spec.sampler == "grid" and spec.trials is None else trials,
        spec.sampler,
        seed=spec.seed,
        population=spec.population,
    )
    basis = {
        "network": session.bench().fingerprint(),
        "images": session.judged_fingerprint,
        "vary": spec.vary,
        "variants": spec.variants,
        "criterion": dict(spec.criterion),
    }
    try:
        result = run_search(
            asked,
            problem.space(spec),
            objective,
            storage=spec.storage or _newest(session.study(spec)),
            study=spec.study,
            on_trial=told,
            should_stop=stop,
            basis=basis,
        )
    except _Stopped as stopped:
        raise Interrupted(str(stopped)) from None
    listener.check_stop()
    if (earlier := len(result.trials) - finished) > 0:
        listener.message(f"{earlier} of {len(result.trials)} trials were there already, or are other workers'")
    return result


def begin_anew(session: Session, spec: SearchSectionSpec) -> None:
    """Let a search that has no storage of its own begin anew; what others are at, or have left, stays where it is."""
    study = session.study(spec)
    if spec.storage is None and study.folder.is_dir() and (newest := _newest(study)).exists():
        with study.work():
            newest.with_name(f"study-{_number(newest) + 1}.sqlite").touch()


def _newest(study: Stage) -> Path:
    """The file with the trials of a search: the last that was begun."""
    with study.work():
        return max(study.folder.glob("study-*.sqlite"), key=_number, default=study.folder / "study-1.sqlite")


def _number(path: Path) -> int:
    return int(path.stem.partition("-")[2])


def _values(trial: TrialRecord) -> dict[str, float]:
    assert trial.values is not None
    return dict(trial.values)


def _choose(spec: SearchSectionSpec, points: list[dict[str, Any]], dense: float) -> tuple[int, str]:
    """Which point of the front to deliver, the first being the most accurate, and why it."""
    second = next(name for name in spec.objectives if name != "accuracy")
    sign = 1.0 if DIRECTIONS[second] == "maximize" else -1.0

    def worth(number: int) -> float:
        point = points[number]
        return sign * point.get(f"{second}_again", point["values"][second])

    good = [n for n, point in enumerate(points) if point["values"]["accuracy"] >= dense - spec.tolerance]
    allowed = f"{100 * spec.tolerance:.2f} points of the dense network's accuracy on the images judged by"
    if good:
        return max(good, key=worth), f"the best {second} on the front within {allowed}"
    return 0, f"the highest accuracy: no point of the front is within {allowed}"


def _hypervolumes(session: Session, spec: SearchSectionSpec, result: SearchResult) -> dict[str, Any] | None:
    """How much the front covers after each trial, up to a network that is never right and saves nothing."""
    if len(spec.objectives) > 3:
        return None
    worst = {"accuracy": 0.0, "sparsity": 0.0, "gain": 0.0, "latency": 1.0}
    worst["bytes"] = float(stored_bytes(session.network))
    reference = [worst[name] for name in spec.objectives]
    return {"reference": reference, "series": result.hypervolume_series(reference)}


def _recipe(session: Session, spec: SearchSectionSpec, trial: TrialRecord, number: int, folder: Path) -> Path:
    """A recipe that makes this point of the front again."""
    recipe = session.recipe.resolved()
    own = {"kind": "deliver", **spec.model_dump(mode="json", include={"vary", "criterion", "variants"})}
    recipe["name"] = f"{recipe['name']}-{number}"[:100]
    recipe["explore"] = [{**own, "numbers": dict(trial.numbers)}]
    if session.recipe.weights is not None:
        # It lies in another folder than the recipe it comes from, and nothing is trained.
        recipe["weights"]["file"] = str(session.weights_path)
        for name in ("train", "regularizer", "train_exclude"):
            del recipe[name]
    text = io.StringIO()
    YAML().dump(recipe, text)
    path = folder / f"point-{number}.yaml"
    write_atomically(path, text.getvalue().encode())
    return path
