"""Fronts, crowding and hypervolumes, against the printed example, brute force, the library and Monte Carlo."""

import numpy as np
import pytest

from secateur.errors import UsageError
from secateur.search import (
    ACCURACY_AND_GAIN,
    accuracy_and_gain,
    accuracy_and_sparsity,
    crowding,
    front,
    hypervolume,
    hypervolume_series,
)

UP = ["maximize", "maximize"]
EXAMPLE = [(90, 0.5), (80, 0.8), (70, 0.7), (60, 0.9), (90, 0.4)]


def test_worked_example():
    assert front(EXAMPLE, UP) == [0, 1, 3]
    distances = crowding([EXAMPLE[i] for i in (0, 1, 3)])
    assert distances[1] == pytest.approx((90 - 60) / 30 + (0.9 - 0.5) / 0.4)
    assert np.isinf(distances[[0, 2]]).all()


def test_equal_points_are_all_kept():
    assert front([(1, 1), (1, 1), (0, 2), (0, 1)], UP) == [0, 1, 2]
    assert front([], UP) == []
    assert front([(3,), (1,), (3,)], ["maximize"]) == [0, 2]


@pytest.mark.parametrize("directions", [["maximize", "minimize"], ["minimize", "maximize", "maximize"]])
def test_front_is_the_librarys(directions):
    optuna = pytest.importorskip("optuna")
    points = np.random.default_rng(0).integers(0, 12, (80, len(directions))).astype(float)
    study = optuna.create_study(directions=directions)
    for point in points.tolist():
        study.add_trial(optuna.trial.create_trial(values=point))
    assert front(points, directions) == [trial.number for trial in study.best_trials]


def test_crowding_where_nothing_differs():
    assert np.isinf(crowding([(1, 2)])).all()
    assert crowding([(1, 1), (1, 1), (1, 1)]).tolist() == [0, 0, 0]
    assert len(crowding([])) == 0
    # The second objective is the same for all and adds nothing.
    assert crowding([(0, 5), (1, 5), (4, 5)])[1] == 1


@pytest.mark.parametrize("directions", [["maximize", "minimize"], ["minimize", "maximize", "maximize"]])
def test_hypervolume_is_what_random_points_say(directions):
    generator = np.random.default_rng(1)
    points = generator.random((25, len(directions)))
    points[-1] = points[0]
    sign = np.array([1.0 if d == "maximize" else -1.0 for d in directions])
    # The reference cuts some points off.
    reference = np.where(sign > 0, 0.2, 0.8)
    samples = generator.random((200_000, len(directions)))
    beyond = ((samples - reference) * sign > 0).all(axis=1)
    covered = np.zeros(len(samples), bool)
    for point in points:
        covered |= ((point - samples) * sign >= 0).all(axis=1)
    share = float((covered & beyond).mean())
    deviation = np.sqrt(share * (1 - share) / len(samples))
    exact = hypervolume(points, reference.tolist(), directions)
    assert abs(exact - share) < 4 * deviation
    series = hypervolume_series(points, reference.tolist(), directions)
    assert series[-1] == pytest.approx(exact)
    assert series == sorted(series)
    assert series[4] == pytest.approx(hypervolume(points[:5], reference.tolist(), directions))


def test_hypervolume_by_hand():
    assert hypervolume([(1, 2), (2, 1)], (0, 0), UP) == 3
    assert hypervolume([(1, 2), (2, 1), (-1, 5), (0.5, 0.5)], (0, 0), UP) == 3
    assert hypervolume([], (0, 0), UP) == 0
    assert hypervolume([(1, 1, 2), (2, 2, 1)], (0, 0, 0), ["maximize"] * 3) == 2 + 4 - 1
    assert hypervolume_series([], (0, 0), UP) == []


def test_refusals():
    for bad, says in [
        (lambda: front([(1, 2)], ["maximize"]), "shape"),
        (lambda: front([(1, np.nan)], UP), "finite"),
        (lambda: front([(1, 2)], ["maximize", "up"]), "direction"),
        (lambda: hypervolume([(1,)], (0,), ["maximize"]), "2 or 3"),
        (lambda: accuracy_and_sparsity([], 0.5), "at least one"),
        (lambda: accuracy_and_gain([0.5], 0.4, 50), "fraction"),
    ]:
        with pytest.raises(UsageError, match=says):
            bad()


def test_the_papers_objectives():
    assert accuracy_and_sparsity([88.0, 90.0], 0.9) == {"accuracy": 89.0, "sparsity": 0.9}
    assert accuracy_and_gain([80.0], 30.0, 0.5) == {"accuracy": 80.0, "gain": 25.0}
    # A loss stays what it is: a small sparsity must not make it look smaller.
    assert accuracy_and_gain([20.0], 30.0, 0.5) == {"accuracy": 20.0, "gain": -10.0}
    assert accuracy_and_gain([30.0], 30.0, 0.5)["gain"] == 0
    assert [name for name, _ in ACCURACY_AND_GAIN] == list(accuracy_and_gain([1.0], 0.0, 1.0))
