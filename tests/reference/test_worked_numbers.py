"""The sources' worked numbers, against an implementation written from their text in NumPy and nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from secateur.core.duration import Progress
from secateur.core.masks import Masks
from secateur.core.schedule import Iterative, keep_prob_at, targeted_dropout_ramp
from secateur.core.select import prune_count, select
from secateur.core.targets import find_targets
from secateur.criteria.bn_gamma import BnGamma
from secateur.criteria.driver import gather_evidence, score_targets
from secateur.criteria.magnitude import Magnitude
from secateur.criteria.mean_activation import MeanActivation
from secateur.criteria.statistics import ActivationStatistics, taylor_map
from secateur.criteria.taylor import Taylor
from secateur.regularizers.ddrop import DDrop, keep_probabilities
from secateur.regularizers.dropout import Dropout
from secateur.regularizers.stream import NoiseStream
from secateur.regularizers.targeted_dropout import TargetedDropout
from secateur.sparsify.ranking import SelectionRule, rank

DONE = Progress(1, 1, 1)

# A1: the thesis network, 128 x 128 images, each layer keeps n - int(r n).

WIDTHS = [64, 128, 256, 512]
A1 = {
    0.1: ([58, 116, 231, 461], 27_570_464, 0.1875),
    0.2: ([52, 103, 205, 410], 21_761_323, 0.3587),
    0.3: ([45, 90, 180, 359], 16_730_459, 0.5069),
    0.4: ([39, 77, 154, 308], 12_281_062, 0.6381),
    0.5: ([32, 64, 128, 256], 8_484_682, 0.7499),
    0.6: ([26, 52, 103, 205], 5_468_960, 0.8388),
    0.7: ([20, 39, 77, 154], 3_072_075, 0.9095),
    0.8: ([13, 26, 52, 103], 1_387_931, 0.9591),
    0.9: ([7, 13, 26, 52], 350_790, 0.9897),
}


def _thesis_parameters(widths):
    total, channels = 0, 3
    for out in widths[:3]:
        total, channels = total + out * channels * 9 + out, out
    return total + channels * 16 * 16 * widths[3] + widths[3] + widths[3] * 10 + 10


@pytest.mark.parametrize("rate", A1)
def test_a1_keep_counts_and_parameters(rate):
    widths, parameters, pruned = A1[rate]
    generator = np.random.default_rng(0)
    scores = {str(n): torch.tensor(generator.random(n)) for n in WIDTHS}
    kept = [int(k.sum()) for k in select(scores, rate).values()]
    # From the text alone: prune int(r n), with 0.3 * 10 = 3 in spite of floating point.
    assert kept == [n - math.floor(n * rate + 1e-9) for n in WIDTHS] == widths
    assert _thesis_parameters(kept) == parameters
    assert round(1 - parameters / _thesis_parameters(WIDTHS), 4) == pruned


def test_a1_dense_network():
    from secateur.lab.models.small import thesis_cnn

    assert _thesis_parameters(WIDTHS) == 33_930_890
    with torch.device("meta"):
        network = thesis_cnn(10, (3, 128, 128))
        cut = thesis_cnn(10, (3, 128, 128), widths=(45, 90, 180), hidden=359)
    assert sum(p.numel() for p in network.parameters()) == 33_930_890
    assert sum(p.numel() for p in cut.parameters()) == A1[0.3][1]


# B1: ranks and keep probabilities of DDROP.


def _ranks(scores):
    return [sum(other <= s for j, other in enumerate(scores) if j != i) for i, s in enumerate(scores)]


def test_b1_ranks_and_keep_probabilities():
    scores = np.array([0.5, 0.1, 0.3, 0.3, 0.9])
    assert _ranks(scores) == [3, 0, 2, 2, 4]
    expected = 0.6 + 0.4 * np.array(_ranks(scores)) / 4
    np.testing.assert_allclose(expected, [0.9, 0.6, 0.8, 0.8, 1.0])
    got = keep_probabilities(torch.tensor(scores), 0.6, 1.0).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    # The variants in circulation give other numbers, so the test above tells them apart.
    single_argsort = 0.6 + 0.4 * np.argsort(scores, kind="stable") / 4
    np.testing.assert_allclose(single_argsort, [0.7, 0.8, 0.9, 0.6, 1.0])
    divided_by_n = 0.6 + 0.4 * np.array(_ranks(scores)) / 5
    np.testing.assert_allclose(divided_by_n, [0.84, 0.6, 0.76, 0.76, 0.92])
    assert not np.allclose(got, single_argsort)
    assert not np.allclose(got, divided_by_n)


@pytest.mark.parametrize("seed", range(20))
def test_b1_on_random_scores_with_ties(seed):
    generator = np.random.default_rng(seed)
    scores = np.round(generator.normal(size=generator.integers(2, 30)), 1)
    expected = 0.2 + 0.7 * np.array(_ranks(scores)) / (len(scores) - 1)
    np.testing.assert_allclose(keep_probabilities(torch.tensor(scores), 0.2, 0.9).numpy(), expected, rtol=1e-12)


def test_b1_edges():
    assert keep_probabilities(torch.ones(7), 0.6, 1.0).tolist() == [1.0] * 7
    assert keep_probabilities(torch.ones(1), 0.6, 0.9).tolist() == pytest.approx([0.9])


def test_b2_schedule():
    assert keep_prob_at(0.6, "linear", 0.5) == pytest.approx(0.8)
    assert keep_prob_at(0.6, "cosine", 0.5) == pytest.approx(0.882843, abs=5e-7)
    for schedule in ("linear", "cosine"):
        assert keep_prob_at(0.6, schedule, 0.0) == 1.0
        assert keep_prob_at(0.6, schedule, 1.0) == pytest.approx(0.6)
        assert [keep_prob_at(1.0, schedule, t) for t in (0, 0.3, 1)] == [1.0] * 3


# C1: mean |activation|, share of zeros; x[sample, unit, position].


def _c1():
    x1 = [[[1.0, 0.0], [2.0, 1.0]], [[0.0, 0.0], [0.0, 4.0]]]
    x2 = [[[3.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]
    return np.array([x1, x2])


def _observed(acts, statistics):
    found = ActivationStatistics(statistics)
    for sample in np.split(acts, len(acts)):
        found.update(torch.tensor(sample, dtype=torch.float32), 1)
    return found


def test_c1_mean_activation_and_zero_fraction():
    acts = _c1()
    expected = np.abs(acts).mean(axis=(0, 2, 3))
    np.testing.assert_allclose(expected, [1.0, 0.5])
    found = _observed(acts, ["mean_abs", "zero_fraction"])
    np.testing.assert_allclose(found.mean_abs, expected)
    np.testing.assert_allclose((acts == 0).mean(axis=(0, 2, 3)), [0.375, 0.875])
    np.testing.assert_allclose(found.zero_fraction, [0.375, 0.875])
    by_pooled_map = (np.maximum(acts, 0).mean(axis=(2, 3)) == 0).mean(axis=0)
    np.testing.assert_allclose(by_pooled_map, [0.0, 0.5])
    assert not np.allclose(found.zero_fraction, by_pooled_map)


def test_c1_with_one_sign_flipped():
    acts = _c1()
    acts[0, 0, 0, 0] = -1.0
    found = _observed(acts, ["mean_abs"])
    np.testing.assert_allclose(found.mean_abs, [1.0, 0.5])
    pooled_first = np.abs(acts.mean(axis=(2, 3))).mean(axis=0)
    np.testing.assert_allclose(pooled_first, [0.75, 0.5])
    assert not np.allclose(found.mean_abs, pooled_first)


def test_c1_through_a_network():
    # 1x1 convolution with identity weights: its output is the input, unit by unit.
    network = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.Flatten(), nn.Linear(8, 2))
    with torch.no_grad():
        network[0].weight.copy_(torch.eye(2).reshape(2, 2, 1, 1))
    acts = _c1()
    acts[0, 0, 0, 0] = -1.0
    batches = [torch.tensor(a, dtype=torch.float32) for a in np.split(acts, 2)]
    targets = find_targets(network, exclude=["@last"])
    (scores,) = score_targets(network, targets, [MeanActivation()], batches=batches)
    np.testing.assert_allclose(scores["0.weight"], [1.0, 0.5])
    evidence = gather_evidence(network, targets, frozenset({"zero_fraction"}), batches=batches)
    np.testing.assert_allclose(evidence["0.weight"].zero_fraction, [0.375, 0.875])


# D: Targeted Dropout. The matrix is printed [in, out]; a column is a row of a torch weight.

D1 = np.array([[0.1, -0.9, 0.3], [-0.4, 0.2, 0.05], [0.7, 0.6, -0.8], [-0.2, -0.3, 0.5]])
D1_WEIGHTS = {
    0.25: {(0, 0), (1, 1), (1, 2)},
    0.5: {(0, 0), (3, 0), (1, 1), (3, 1), (0, 2), (1, 2)},
    0.75: {(0, 0), (1, 0), (3, 0), (1, 1), (2, 1), (3, 1), (0, 2), (1, 2), (3, 2)},
}
D1_UNITS = {0.5: {0}, 0.75: {0, 2}}


def _linear(matrix):
    layer = nn.Linear(*matrix.shape, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(matrix.T))
    (target,) = find_targets(layer)
    return layer, target


def _multiplier(spec, layer, target, stream=None, progress=DONE):
    found = spec.multiplier(target, layer.weight.detach(), stream or NoiseStream(0), progress)
    kept, factor = found if isinstance(found, tuple) else (torch.ones(()) if found is None else found, 1.0)
    return factor * kept.expand(layer.weight.shape).float()


@pytest.mark.parametrize("gamma", D1_WEIGHTS)
def test_d1_candidate_weights(gamma):
    layer, target = _linear(D1)
    k = int(gamma * len(D1))
    expected = {(int(i), j) for j in range(3) for i in np.argsort(np.abs(D1[:, j]), kind="stable")[:k]}
    assert expected == D1_WEIGHTS[gamma]
    dropped = _multiplier(TargetedDropout(gamma=gamma, alpha=1.0), layer, target).T == 0
    assert {(int(i), int(j)) for i, j in dropped.nonzero()} == expected
    # T2T's rule (>= the k-th) would take one more in each column.
    if gamma == 0.5:
        assert int(dropped.sum()) != 9


@pytest.mark.parametrize("gamma", D1_UNITS)
def test_d1_candidate_units(gamma):
    layer, target = _linear(D1)
    norms = np.sqrt((D1**2).sum(axis=0))
    np.testing.assert_allclose(norms, [0.83666, 1.140175, 0.991211], atol=5e-7)
    expected = set(np.argsort(norms, kind="stable")[: int(gamma * 3)].tolist())
    assert expected == D1_UNITS[gamma]
    multiplier = _multiplier(TargetedDropout(gamma=gamma, alpha=1.0, granularity="unit"), layer, target)
    assert {j for j in range(3) if bool((multiplier[j] == 0).all())} == expected
    assert bool(((multiplier == 0).all(1) | (multiplier == 1).all(1)).all())


def test_d2_ramp():
    times = [0.0, 0.1, 0.2, 0.3, 0.4, 0.7, 1.0]
    expected = [(0, 0), (0.475, 0.25), (0.95, 0.5), (0.975, 0.75), (1, 1), (1, 1), (1, 1)]
    # From the text: gamma 0 -> .95 then -> 1, each over a fifth; alpha 0 -> 1 over both.
    text = [(float(np.interp(t, [0, 0.2, 0.4], [0, 0.95, 1])), float(np.interp(t, [0, 0.4], [0, 1]))) for t in times]
    for t, want, also in zip(times, expected, text, strict=True):
        assert targeted_dropout_ramp(t) == pytest.approx(want)
        assert targeted_dropout_ramp(t) == pytest.approx(also)


def test_d2_the_ramp_reaches_the_candidates():
    layer, target = _linear(np.random.default_rng(0).normal(size=(40, 25)))
    spec = TargetedDropout(gamma=0.5, alpha=1.0, ramp=True)
    counts = []
    for step in (0, 20, 40, 100):
        multiplier = _multiplier(spec, layer, target, NoiseStream(1), Progress(step, 100, 10))
        counts.append(int((multiplier == 0).sum()))
    assert counts[0] == 0
    # At 0.2 of the run 19 of 40 are candidates, dropped with probability one half: 25 x 19 draws.
    assert abs(counts[1] - 25 * 19 / 2) < 5 * math.sqrt(25 * 19) / 2
    assert counts[2] == counts[3] == 25 * 20


@pytest.mark.parametrize(("gamma", "alpha"), [(0.75, 0.66), (0.5, 0.5), (0.33, 0.75)])
@pytest.mark.parametrize("granularity", ["weight", "unit"])
def test_d5_the_kept_fraction_tends_to_one_minus_gamma_alpha(gamma, alpha, granularity):
    layer, target = _linear(np.random.default_rng(1).normal(size=(100, 100)))
    spec = TargetedDropout(gamma=gamma, alpha=alpha, granularity=granularity)
    stream = NoiseStream(7)
    draws = 20 if granularity == "weight" else 400
    kept = np.mean([_multiplier(spec, layer, target, stream).mean().item() for _ in range(draws)])
    # 100 x 100 (or 100) entries a draw; int(gamma n) / n candidates, each an independent coin of rate alpha.
    share = int(gamma * 100 + 1e-9) / 100
    coins = draws * share * (10_000 if granularity == "weight" else 100)
    error = share * math.sqrt(alpha * (1 - alpha) / coins)
    assert abs(kept - (1 - share * alpha)) < 4 * error
    assert abs(share - gamma) < 0.01
    matched = Dropout.matched(spec)
    assert matched.drop_rate == pytest.approx(gamma * alpha)


def test_d5_the_matched_control_drops_as_much_and_keeps_the_mean():
    layer, target = _linear(np.random.default_rng(1).normal(size=(100, 100)))
    spec, stream = Dropout.matched(TargetedDropout(gamma=0.75, alpha=0.66)), NoiseStream(7)
    draws = torch.stack([_multiplier(spec, layer, target, stream) for _ in range(20)])
    rate, error = 0.495, math.sqrt(0.495 * 0.505 / draws.numel())
    assert abs(float((draws == 0).float().mean()) - rate) < 4 * error
    assert abs(float(draws.mean()) - 1) < 4 * error / (1 - rate)


@pytest.mark.parametrize("granularity", ["weight", "unit"])
def test_d6_no_candidates_or_no_rate_is_the_identity_and_certainty_is_hard_pruning(granularity):
    layer, target = _linear(np.random.default_rng(2).normal(size=(30, 20)))
    for gamma, alpha in ((0.0, 0.9), (0.9, 0.0)):
        assert bool((_multiplier(TargetedDropout(gamma, alpha, granularity), layer, target) == 1).all())
    for gamma in (0.3, 0.5, 0.9):
        hard = _multiplier(TargetedDropout(gamma, 1.0, granularity), layer, target)
        magnitudes = np.abs(layer.weight.detach().numpy())
        expected = np.ones((20, 30))
        if granularity == "weight":
            order = np.argsort(magnitudes, axis=1, kind="stable")
            np.put_along_axis(expected, order[:, : int(gamma * 30 + 1e-9)], 0, axis=1)
        else:
            norms = np.sqrt((magnitudes.astype(np.float64) ** 2).sum(1))
            expected[np.argsort(norms)[: int(gamma * 20 + 1e-9)]] = 0
        np.testing.assert_array_equal(hard.numpy(), expected)


def test_d6_hard_targeted_dropout_equals_pruning_by_our_own_ranking():
    layer, target = _linear(np.random.default_rng(3).normal(size=(30, 20)))
    hard = _multiplier(TargetedDropout(0.4, 1.0, "unit"), layer, target).bool()
    masks = rank(layer, Magnitude(), granularity="unit").masks(0.4)
    assert torch.equal(masks["weight"], hard)
    columns = rank(layer, Magnitude(), rule=SelectionRule(scope="column", min_keep=0)).masks(0.4)
    assert torch.equal(columns["weight"], _multiplier(TargetedDropout(0.4, 1.0), layer, target).bool())


# E1: global magnitude, on the weights and on perturbed weights.

A, B = [0.5, -0.2, 0.05, 1.0], [0.3, -0.6, 0.01, 0.02, 0.7, -0.1]
NOISE_A, NOISE_B = [0.1, 0.15, -0.04, 0.0], [-0.25, 0.0, 0.06, -0.03, 0.0, -0.2]


def _e1(a, b, gamma):
    network = nn.ModuleDict({"a": nn.Linear(4, 1, bias=False), "b": nn.Linear(6, 1, bias=False)})
    with torch.no_grad():
        network["a"].weight.copy_(torch.tensor([a]))
        network["b"].weight.copy_(torch.tensor([b]))
    masks = rank(network, Magnitude(), rule=SelectionRule(scope="global")).masks(gamma)
    return network, masks


@pytest.mark.parametrize(
    ("gamma", "gone"),
    [(0.3, {0.01, 0.02, 0.05}), (0.5, {0.01, 0.02, 0.05, 0.1, 0.2}), (0.7, {0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5})],
)
def test_e1_global_magnitude(gamma, gone):
    network, masks = _e1(A, B, gamma)
    values = np.abs(np.concatenate([A, B]))
    assert set(np.sort(values)[: round(gamma * 10)].tolist()) == gone
    pruned = {round(float(v), 6) for n in ("a", "b") for v in network[n].weight.detach()[~masks[f"{n}.weight"]].abs()}
    assert pruned == gone
    assert masks.kept == 10 - len(gone)


def test_e1_perturbed_weights_and_mask_transfer():
    a, b = np.array(A), np.array(B)
    noisy_a, noisy_b = a + NOISE_A, b + NOISE_B
    _, plain = _e1(A, B, 0.5)
    _, noisy = _e1(noisy_a.tolist(), noisy_b.tolist(), 0.5)
    masks = {
        k: np.concatenate([m["a.weight"][0].numpy(), m["b.weight"][0].numpy()]) for k, m in (("w", plain), ("p", noisy))
    }
    assert masks["p"].astype(int).tolist() == [1, 0, 0, 1, 0, 1, 0, 0, 1, 1]
    assert masks["w"].astype(int).tolist() == [1, 0, 0, 1, 1, 1, 0, 0, 1, 0]
    w, wp = np.concatenate([a, b]), np.concatenate([noisy_a, noisy_b])
    for weights, mask, expected in (
        (wp, "p", [0.6, 0, 0, 1, 0, -0.6, 0, 0, 0.7, -0.3]),
        (w, "p", [0.5, 0, 0, 1, 0, -0.6, 0, 0, 0.7, -0.1]),
        (wp, "w", [0.6, 0, 0, 1, 0.05, -0.6, 0, 0, 0.7, 0]),
        (w, "w", [0.5, 0, 0, 1, 0.3, -0.6, 0, 0, 0.7, 0]),
    ):
        np.testing.assert_allclose(weights * masks[mask], expected, atol=1e-12)


def test_e1_masks_applied():
    network, masks = _e1(A, B, 0.5)
    masks.apply_(network)
    np.testing.assert_allclose(network["b"].weight.detach().numpy()[0], [0.3, -0.6, 0, 0, 0.7, 0], rtol=1e-6)
    assert Masks(masks) == masks


# Taylor, network slimming, iterative pruning.


def test_taylor_worked_number():
    h, g = np.array([[1.0, 2.0], [0.0, -1.0]]), np.array([[0.5, -0.25], [1.0, 2.0]])
    assert np.abs((g * h).mean()) == 0.5
    ours = taylor_map(torch.tensor(h)[None, None], torch.tensor(g)[None, None], 1)
    assert ours.tolist() == [0.5]


def test_taylor_through_a_network():
    # One map h; the loss is the sum of g * h, so that dC/dh = g exactly.
    h, g = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[0.5, -0.25], [1.0, 2.0]])
    network = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Flatten())
    with torch.no_grad():
        network[0].weight.fill_(1.0)

    def loss(out, labels):
        return (out * g.flatten()).sum(1).mean()

    batches = [(h[None, None], torch.zeros(1)), (2 * h[None, None].repeat(3, 1, 1, 1), torch.zeros(3))]
    (scores,) = score_targets(network, find_targets(network), [Taylor(normalize=False)], batches=batches, loss=loss)
    # Three of four samples have twice the map.
    assert scores["0.weight"].tolist() == pytest.approx([(0.5 + 3 * 1.0) / 4])


def test_network_slimming_keeps_exactly_half():
    gammas = torch.tensor([0.9, 0.1, 0.5, 0.4, 0.05, 0.7])
    network = nn.Sequential(nn.Conv1d(1, 6, 1), nn.BatchNorm1d(6), nn.Flatten(), nn.Linear(6, 2))
    with torch.no_grad():
        network[1].weight.copy_(-gammas)
    ranking = rank(
        network, BnGamma(), granularity="unit", targets=find_targets(network, ["0"]), batches=[torch.ones(2, 1, 1)]
    )
    kept = ranking.masks(0.5)["0.weight"][:, 0, 0]
    assert kept.tolist() == [True, False, True, False, False, True]


def test_iterative_levels_are_powers_of_the_kept_fraction():
    levels = Iterative(sparsity=0.9, fraction=0.2).levels()
    expected = [1 - 0.8**k for k in range(1, 11)]
    np.testing.assert_allclose(levels[:-1], expected)
    assert levels[-1] == 0.9
    assert 0.8**10 > 0.1 > 0.8**11
    for n in (10, 384, 1000):
        kept = [n - prune_count(n, s) for s in levels]
        # Rounded on the total, not round by round: at most one cell from the exact geometric sequence.
        assert all(abs(k - n * 0.8**i) < 1 for i, k in enumerate(kept[:-1], start=1))
        assert kept == sorted(kept, reverse=True)


def test_ddrop_names_its_defaults_as_the_paper_sets_them():
    assert (DDrop().keep_min, DDrop().keep_max, DDrop().l1) == (0.6, 1.0, 1e-3)
