"""What trial k tries: proposals that depend on (seed, k) and on the trials finished so far, on nothing else."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from secateur.search.space import Choice, Int, Number, Space
from secateur.search.spec import SearchSpec

__all__ = ["distribution", "sampler_for"]


def distribution(number: Number) -> BaseDistribution:
    """The library's word for a number's range."""
    if isinstance(number, Choice):
        return CategoricalDistribution(number.values)
    if isinstance(number, Int):
        return IntDistribution(number.low, number.high, log=number.log)
    return FloatDistribution(number.low, number.high, log=number.log)


def sampler_for(spec: SearchSpec, space: Space, slot: int, given: dict[str, Any] | None = None) -> BaseSampler:
    """A new sampler for every trial: its state is derived from (seed, trial), never carried over.

    So a search that was stopped goes on exactly as it would have. The library's samplers keep a generator in memory
    that no storage holds, and would begin anew with the numbers they began with.

    Args:
        slot: which of the trials asked for.
        given: the numbers, if they were already proposed, to a worker that did not finish.
    """
    stream = np.random.SeedSequence(spec.seed, spawn_key=(slot,))
    if given is not None and spec.sampler != "nsga2":
        return _Given(given)
    if spec.sampler == "random":
        generator = np.random.default_rng(stream)
        return _Given({number.name: number.draw(generator) for number in space.numbers})
    if spec.sampler == "grid":
        return _Given(_grid_point(spec, space, slot))
    first, second = (int(word) for word in stream.generate_state(2))
    if spec.sampler == "tpe":
        return TPESampler(
            n_startup_trials=spec.startup,
            n_ei_candidates=spec.candidates,
            multivariate=spec.multivariate,
            constant_liar=True,
            seed=first,
        )
    return _NSGA2(spec, space, first, second, given)


def _grid_point(spec: SearchSpec, space: Space, slot: int) -> dict[str, Any]:
    columns = [number.points(spec.points) for number in space.numbers]
    grid = list(itertools.product(*columns))
    order = np.random.default_rng(np.random.SeedSequence(spec.seed)).permutation(len(grid))
    return dict(zip(space.names, grid[int(order[slot])], strict=True))


class _Given(BaseSampler):
    """Numbers that are already known."""

    def __init__(self, numbers: dict[str, Any]) -> None:
        self._numbers = numbers

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._numbers[param_name]


class _NSGA2(NSGAIISampler):
    """The library's, with a state that a restart does not change."""

    def __init__(
        self, spec: SearchSpec, space: Space, seed: int, mutation_seed: int, given: dict[str, Any] | None
    ) -> None:
        super().__init__(
            population_size=spec.population,
            mutation_prob=spec.mutation,
            crossover_prob=spec.crossover,
            swapping_prob=spec.swap,
            seed=seed,
        )
        self._given = given
        self._space = {number.name: distribution(number) for number in space.numbers}
        # The library seeds crossover and mutation alike; begun anew for each trial, they would draw the same numbers.
        self._mutations = RandomSampler(seed=mutation_seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(self._space)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        # Asked for in any case: it enters the trial in a generation.
        drawn = super().sample_relative(study, trial, search_space)
        return drawn if self._given is None else dict(self._given)

    def get_parent_population(self, study: Study, generation: int) -> list[FrozenTrial]:
        # The library returns them by rank when it selects them and by number when it looks them up again.
        return sorted(super().get_parent_population(study, generation), key=lambda parent: parent.number)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._mutations.sample_independent(study, trial, param_name, param_distribution)
