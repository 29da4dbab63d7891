"""A search over the numbers of stochastic pruning, on a small random network."""

import pytest
import torch
from torch import nn

from secateur.search import (
    ACCURACY_AND_GAIN,
    ACCURACY_AND_SPARSITY,
    STOCHASTIC_PRUNING,
    SearchSpec,
    accuracy_and_gain,
    accuracy_and_sparsity,
    run_search,
)
from secateur.variants import NoisyPrune, Workbench, evaluate_variants

pytest.importorskip("optuna")


@pytest.mark.parametrize("objectives", [ACCURACY_AND_SPARSITY, ACCURACY_AND_GAIN])
def test_stochastic_pruning_of_a_random_network(tmp_path, objectives):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    inputs = torch.randn(64, 6, generator=generator)
    batches = [(inputs, model(inputs).argmax(dim=1))]
    bench = Workbench(model)

    def objective(numbers):
        sigma, sparsity = numbers["sigma"], numbers["sparsity"]
        noisy = [NoisyPrune(sigma=sigma, sparsity=sparsity, seed=seed) for seed in range(2)]
        outcome = evaluate_variants(bench, [NoisyPrune(sigma=0.0, sparsity=sparsity), *noisy], batches)
        plain, *others = (float(mean) for mean in outcome.means())
        if objectives == ACCURACY_AND_SPARSITY:
            return accuracy_and_sparsity(others, sparsity)
        return accuracy_and_gain(others, plain, sparsity)

    spec = SearchSpec(objectives, 12, population=4)
    path, basis = tmp_path / "study.jsonl", {"network": bench.fingerprint()}
    result = run_search(spec, STOCHASTIC_PRUNING, objective, path, basis=basis)
    assert len(result.trials) == 12
    best = result.front()[-1]
    assert objective(dict(best.numbers)) == best.values
    series = result.hypervolume_series((0.0, -1.0))
    assert series == sorted(series)
    assert series[-1] > 0
