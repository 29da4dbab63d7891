"""GraSP on the linear network of F1: Hessian-gradient product, scores, order of removal, temperature."""

from __future__ import annotations

import linear_network as f1
import numpy as np
import pytest

from secateur.core.targets import find_targets
from secateur.criteria.driver import gather_evidence, score_targets
from secateur.criteria.grasp import Grasp
from secateur.errors import UsageError
from secateur.sparsify.ranking import SelectionRule, rank


def test_f1_hessian_times_gradient():
    _, gradient, hessian = f1.derivatives()
    h1, h2 = f1.split(hessian @ gradient)
    assert h1.tolist() == [[50, 50], [-76, -76]]
    assert h2.tolist() == [[122, -16]]
    network = f1.network()
    for copies in ((1,), (3,), (2, 1, 5)):
        evidence = gather_evidence(
            network,
            find_targets(network),
            frozenset({"hessian_gradient"}),
            batches=f1.batches(copies),
            loss=f1.half_squares,
        )
        np.testing.assert_allclose(evidence["0.weight"].hessian_gradient, h1)
        np.testing.assert_allclose(evidence["1.weight"].hessian_gradient, h2)


def test_f1_scores_and_order_of_removal():
    _, gradient, hessian = f1.derivatives()
    h1, h2 = f1.split(hessian @ gradient)
    removed_first = [-f1.W1 * h1, -f1.W2 * h2]
    assert [s.tolist() for s in removed_first] == [[[-50, -100], [-76, 76]], [[-122, -32]]]
    network = f1.network()
    options = {"batches": f1.batches(), "loss": f1.half_squares}
    (scores,) = score_targets(network, find_targets(network), [Grasp(temperature=1.0)], **options)
    for score, s in zip(scores.values(), removed_first, strict=True):
        np.testing.assert_allclose(score.numpy(), -s)
    ranking = rank(network, Grasp(temperature=1.0), rule=SelectionRule(scope="global", min_keep=0), **options)
    gone = [{(n, *map(int, i)) for n, m in ranking.masks(k / 6).items() for i in (~m).nonzero()} for k in range(1, 4)]
    first, second, third = ("0.weight", 1, 1), ("1.weight", 0, 1), ("0.weight", 0, 0)
    assert gone == [{first}, {first, second}, {first, second, third}]


def test_temperature_divides_the_outputs():
    # L = (f / T - y)^2 / 2: with a = 1 / T, g = (a f - y) a f' and H = a^2 f' f'^T + (a f - y) a f''.
    f, gradient, hessian = f1.derivatives()
    residual = f - f1.Y
    slope = gradient / residual
    curvature = (hessian - np.outer(slope, slope)) / residual
    a = 1 / 200.0
    gradient, hessian = (a * f - f1.Y) * a * slope, a**2 * np.outer(slope, slope) + (a * f - f1.Y) * a * curvature
    h1, _ = f1.split(hessian @ gradient)
    network = f1.network()
    (scores,) = score_targets(network, find_targets(network), [Grasp()], batches=f1.batches(), loss=f1.half_squares)
    np.testing.assert_allclose(scores["0.weight"].numpy(), f1.W1 * h1)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_temperatures(temperature):
    with pytest.raises(UsageError, match="temperature is above 0"):
        Grasp(temperature=temperature)


def test_two_temperatures_in_one_call_are_refused():
    network = f1.network()
    with pytest.raises(UsageError, match="one temperature, got"):
        score_targets(network, find_targets(network), [Grasp(), Grasp(temperature=2.0)], batches=f1.batches())
