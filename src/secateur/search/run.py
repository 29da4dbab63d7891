"""The loop: ask for numbers, try them, tell what they were worth."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from secateur.errors import MissingExtraError, SecateurError, UsageError
from secateur.search.result import SearchResult, TrialRecord
from secateur.search.space import Space
from secateur.search.spec import SearchSpec

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

    from secateur.search.claims import Watch

__all__ = ["run_search"]

Objective = Callable[[dict[str, Any]], Mapping[str, Any]]

_POLL = (0.05, 1.0)


def run_search(
    spec: SearchSpec,
    space: Space,
    objective: Objective,
    storage: str | os.PathLike[str] | None = None,
    study: str | None = None,
    on_trial: Callable[[TrialRecord], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    *,
    basis: str | Mapping[str, Any] | None = None,
    heartbeat: float = 10.0,
) -> SearchResult:
    """Search until the study holds the trials asked for, alone or as one of several workers.

    Args:
        spec: the sampler, the objectives and how many trials there are to be in all.
        space: the numbers searched over.
        objective: from numbers to `{objective: value}`; anything else it returns is kept with the trial, if it is
            JSON. A `SecateurError` it raises, or a value that is not finite, makes a failed trial: it counts, it keeps
            the reason, and it is not on the front. Any other exception ends this worker, and the trial is free again.
        storage: a SQLite file, a journal file (`.jsonl`, `.journal`, `.log`: for file systems without sound locks),
            the URL of a database server, or None for memory. A study that is there is gone on with.
        study: its name in the storage; None is "search".
        on_trial: called with each trial this worker finished.
        should_stop: asked before each trial and while waiting; True ends this worker.
        basis: what the values depend on besides the numbers (network, data): kept with the study and compared.
        heartbeat: seconds between signs of life. A worker without one for six times as long is taken for dead, and
            so is at once one whose process on this machine has ended: its trial is given to another worker.

    Returns: all finished trials of the study. It returns when none is left to try or running elsewhere, or when
        `should_stop` says so.

    Raises: `MissingExtraError` without optuna; `CheckpointError` for a study begun with another recipe, naming what
        differs; `StorageError` for a storage that does not answer; `SecateurError` if every trial failed.

    Randomness: see `SearchSpec`.

    Cost: the objective's; the storage is written to about ten times a trial.
    """
    try:
        import optuna

        from secateur.search.claims import Watch, filled, free_slot, working
        from secateur.search.storage import open_study
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("secateur"):
            raise
        raise MissingExtraError("a search", "search") from error
    total = spec.total(space)
    if not heartbeat > 0:
        raise UsageError(f"search: heartbeat: got {heartbeat!r}, expected seconds, above 0")
    fingerprint = spec.fingerprint(space, basis)
    with (
        open_study(storage, study or "search", fingerprint, spec.directions) as found,
        working(heartbeat) as mark,
    ):
        worker = _Worker(spec, space, objective, on_trial, heartbeat, mark)
        watch, pause = Watch(found, heartbeat), _POLL[0]
        while not (should_stop is not None and should_stop()):
            attempts = found.get_trials(deepcopy=False)
            if watch.release(attempts):
                continue
            if len([slot for slot in filled(attempts) if slot < total]) >= total:
                break
            if free_slot(attempts, total) is not None:
                worker.attempt(found, total, watch)
                pause = _POLL[0]
            else:
                time.sleep(pause)
                pause = min(2 * pause, _POLL[1])
        slots = filled(found.get_trials(deepcopy=False))
    trials = tuple(_record(spec, space, slots[slot]) for slot in sorted(slots) if slot < total)
    if trials and len(trials) == total and all(trial.failed for trial in trials):
        raise SecateurError(f"search: all {total} trials failed; the first: {trials[0].reason}")
    return SearchResult(spec, space, trials, total, optuna.__version__)


class _Worker:
    """Tries numbers, one trial after the other."""

    def __init__(
        self,
        spec: SearchSpec,
        space: Space,
        objective: Objective,
        on_trial: Callable[[TrialRecord], None] | None,
        heartbeat: float,
        mark: dict[str, Any],
    ) -> None:
        self._spec, self._space, self._objective = spec, space, objective
        self._on_trial, self._heartbeat, self._mark = on_trial, heartbeat, mark

    def attempt(self, study: Study, total: int, watch: Watch) -> None:
        """Try one slot, if there is one left."""
        from optuna.exceptions import UpdateFinishedTrialError

        from secateur.search.claims import Heartbeat, claim, give_up

        trial = study.ask()
        try:
            trial.set_user_attr("worker", self._mark)
            slot = claim(study, trial, total, watch)
            if slot is None:
                return
            with Heartbeat(trial, self._heartbeat):
                numbers = self._propose(study, trial, slot)
                returned, reason = self._try(numbers)
            told = self._tell(study, trial, returned, reason)
        except UpdateFinishedTrialError:
            # This worker was taken for dead; the trial is another one's now.
            return
        except BaseException:
            give_up(study, trial.number)
            raise
        if told is not None and self._on_trial is not None:
            self._on_trial(_record(self._spec, self._space, told))

    def _propose(self, study: Study, trial: Trial, slot: int) -> dict[str, Any]:
        from secateur.search.claims import broken_off
        from secateur.search.samplers import sampler_for
        from secateur.search.space import Choice, Int

        given = broken_off(study.get_trials(deepcopy=False), slot, self._space.names)
        study.sampler = sampler_for(self._spec, self._space, slot, given)
        numbers: dict[str, Any] = {}
        for number in self._space.numbers:
            if isinstance(number, Choice):
                numbers[number.name] = trial.suggest_categorical(number.name, number.values)
            elif isinstance(number, Int):
                numbers[number.name] = trial.suggest_int(number.name, number.low, number.high, log=number.log)
            else:
                numbers[number.name] = trial.suggest_float(number.name, number.low, number.high, log=number.log)
        return numbers

    def _try(self, numbers: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
        try:
            returned = dict(self._objective(dict(numbers)))
        except SecateurError as error:
            return {}, f"{type(error).__name__}: {error}"
        for name in self._spec.names:
            if name not in returned:
                raise UsageError(f'search: the objective returned {sorted(returned)}, expected "{name}" among them')
            try:
                returned[name] = float(returned[name])
            except (TypeError, ValueError) as error:
                raise UsageError(f'search: objective "{name}" is {returned[name]!r}, expected a number') from error
        bad = [f"{name} is {returned[name]}" for name in self._spec.names if not math.isfinite(returned[name])]
        return returned, ", ".join(bad) or None

    def _tell(self, study: Study, trial: Trial, returned: dict[str, Any], reason: str | None) -> FrozenTrial | None:
        """The trial as it is stored now; None if it was given up meanwhile."""
        from optuna.trial import TrialState

        extras = {name: value for name, value in returned.items() if name not in self._spec.names}
        if extras:
            trial.set_user_attr("extras", {str(name): _plain(value) for name, value in extras.items()})
        if reason is not None:
            # With a reason the trial counts, also should this be the last that is written.
            trial.set_user_attr("reason", reason)
            return study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        values = [returned[name] for name in self._spec.names]
        told = study.tell(trial, values, state=TrialState.COMPLETE, skip_if_finished=True)
        return told if told.state == TrialState.COMPLETE else None


def _plain(value: Any) -> Any:
    """For JSON: scalars of numpy and torch as numbers, what is not finite as None."""
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if not isinstance(value, str | int | float | None):
        if not hasattr(value, "item"):
            raise UsageError(
                f"search: the objective returned a {type(value).__name__}, expected numbers, strings, lists"
            )
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _record(spec: SearchSpec, space: Space, attempt: FrozenTrial) -> TrialRecord:
    from optuna.trial import TrialState

    attributes, duration = attempt.user_attrs, attempt.duration
    done = attempt.state == TrialState.COMPLETE
    return TrialRecord(
        int(attributes["slot"]),
        # Storages return them in an order of their own.
        {name: attempt.params[name] for name in space.names},
        dict(zip(spec.names, attempt.values, strict=True)) if done else None,
        attributes.get("extras", {}),
        attributes.get("reason"),
        attributes.get("worker", {}).get("id", ""),
        0.0 if duration is None else duration.total_seconds(),
    )
