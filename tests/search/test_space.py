"""Spaces: ranges, draws, grids, JSON, and one line for what cannot be."""

import json
import math

import numpy as np
import pytest

from secateur.errors import UnknownNameError, UsageError
from secateur.search import STOCHASTIC_PRUNING, Choice, Float, Int, SearchSpec, Space

MIXED = Space((Float("sigma", 1e-4, 1e-2, log=True), Int("nets", 1, 5), Choice("criterion", ("magnitude", "lamp"))))
GOOD = (("accuracy", "maximize"),)


def test_the_papers_space():
    sigma, sparsity = STOCHASTIC_PRUNING.numbers
    assert sigma == Float("sigma", 1e-4, 1e-2)
    assert sparsity == Float("sparsity", 0.01, 0.99)


def test_json_gives_the_space_back():
    assert Space.from_record(json.loads(json.dumps(MIXED.record()))) == MIXED
    hash(MIXED)


def test_json_gives_the_specification_back():
    spec = SearchSpec((("accuracy", "maximize"), ("size", "minimize")), 7, "tpe", seed=3)
    assert SearchSpec.from_record(json.loads(json.dumps(spec.record()))) == spec


def test_draws_cover_the_range_evenly():
    generator = np.random.default_rng(0)
    log, whole, skewed = Float("a", 1e-4, 1.0, log=True), Int("b", 1, 3), Int("c", 1, 100, log=True)
    draws = [log.draw(generator) for _ in range(4000)]
    assert min(draws) >= 1e-4
    assert max(draws) <= 1
    # Half of them below the middle of the logarithms; deviation 0.008.
    assert abs(np.mean(np.array(draws) < 1e-2) - 0.5) < 0.04
    counts = np.bincount([whole.draw(generator) for _ in range(3000)], minlength=4)
    assert counts[0] == 0
    assert counts[1:].min() > 900
    many = [skewed.draw(generator) for _ in range(2000)]
    assert min(many) == 1
    assert max(many) == 100
    assert abs(np.mean(np.array(many) <= 10) - math.log(10.5 / 0.5) / math.log(100.5 / 0.5)) < 0.05


def test_grids():
    assert Float("a", 0, 1).points(3) == [0.0, 0.5, 1.0]
    assert Float("a", 0, 1).points(1) == [0.5]
    assert np.allclose(Float("a", 1e-4, 1e-2, log=True).points(3), [1e-4, 1e-3, 1e-2])
    assert Int("b", 1, 3).points(10) == [1, 2, 3]
    assert Int("b", 0, 9).points(2) == [2, 7]
    assert Choice("c", (0.1, 0.3)).points(10) == [0.1, 0.3]
    assert SearchSpec(GOOD, None, "grid", points=4).total(MIXED) == 4 * 4 * 2


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Space(()), "no numbers"),
        (lambda: Space((Float("a", 0, 1), Int("a", 0, 1))), 'two numbers are named "a"'),
        (lambda: Float("a", 1, 1), "the lower first"),
        (lambda: Float("a", 0, math.inf), "finite"),
        (lambda: Float("a", 0, 1, log=True), "above 0"),
        (lambda: Float("", 0, 1), "name"),
        (lambda: Int("a", 0.5, 2), "whole"),
        (lambda: Choice("a", ("x",)), "at least two"),
        (lambda: Choice("a", (1, True)), "different"),
        (lambda: Choice("a", (1.0, math.nan)), "finite"),
        (lambda: Space.from_record([{"kind": "floot", "name": "a"}]), "nearest: float"),
        (lambda: Space.from_record([{"kind": "int", "name": "a", "lo": 1}]), '"lo"'),
        (lambda: Space.from_record([{"kind": "int", "name": "a"}]), "missing"),
        (lambda: SearchSpec((), 5), "no objectives"),
        (lambda: SearchSpec((("a", "up"),), 5), "maximize or minimize"),
        (lambda: SearchSpec((*GOOD, *GOOD), 5), "differ"),
        (lambda: SearchSpec(GOOD, 0), "trials"),
        (lambda: SearchSpec(GOOD, None), "how many"),
        (lambda: SearchSpec(GOOD, 5, "nsga3"), "nearest: nsga2"),
        (lambda: SearchSpec(GOOD, 5, population=0), "population"),
        (lambda: SearchSpec(GOOD, 5, seed=-1), "seed"),
        (lambda: SearchSpec(GOOD, 5, mutation=1.5), "mutation"),
        (lambda: SearchSpec(GOOD, 33, "grid", points=4).total(MIXED), "grid of 32 points"),
        (lambda: SearchSpec.from_record({"trial": 1}), "nearest: trials"),
        (lambda: SearchSpec.from_record({"trials": 1}), "objectives"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(make, says):
    with pytest.raises((UsageError, UnknownNameError)) as caught:
        make()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
