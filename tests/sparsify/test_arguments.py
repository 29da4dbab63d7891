"""Arguments of the wrong kind are one line that says what was expected."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.criteria.learned import Learned
from secateur.criteria.magnitude import Magnitude
from secateur.errors import UsageError
from secateur.lab.oneshot import prune_units_, prune_weights
from secateur.regularizers.none import NoRegularizer
from secateur.regularizers.targeted_dropout import TargetedDropout
from secateur.sparsify.ranking import rank, rank_units
from secateur.sparsify.rounds import prune_in_rounds
from secateur.sparsify.sparsifier import Sparsifier

INPUTS = torch.linspace(-1, 1, 12).reshape(3, 4)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


CALLS = {
    "prune_weights": lambda sparsity=0.5, **given: prune_weights(network(), sparsity, **given),
    "prune_units_": lambda sparsity=0.5, **given: prune_units_(network(), sparsity, INPUTS, **given),
    "prune_in_rounds": lambda sparsity=0.5, criterion=Magnitude(), **given: prune_in_rounds(
        network(), criterion, sparsity, 2, **given
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"criterion": "magnitud"},
            r'criterion is the text "magnitud", expected an instance .*; nearest: Magnitude\(\)',
        ),
        ({"criterion": "?"}, 'criterion is the text "\\?", expected .*; see secateur methods'),
        ({"criterion": Magnitude}, r"criterion is the class Magnitude, expected an instance .*; Magnitude\(...\)"),
        ({"criterion": NoRegularizer()}, "criterion is of type NoRegularizer, expected an instance of a Criterion"),
        ({"criterion": nn.Linear}, "criterion is the class Linear, expected"),
        ({"criterion": 0}, "criterion is of type int, expected"),
        ({"targets": ["0.weight"]}, "targets is of type list, expected Targets; make them with find_targets"),
        ({"targets": "0.weight"}, 'targets is the text "0.weight", expected Targets'),
        ({"sparsity": "0.5"}, r'sparsity is the text "0.5", expected a number in \[0, 1\)'),
        ({"sparsity": None}, "sparsity is of type NoneType"),
        ({"sparsity": True}, "sparsity is of type bool"),
    ],
)
def test_pruning_says_what_it_was_given(call, given, message):
    with pytest.raises(UsageError, match=f"^{call}: {message}") as caught:
        CALLS[call](**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("regularizer", "message"),
    [
        (TargetedDropout, r"regularizer is the class TargetedDropout, expected an instance .*; TargetedDropout\(...\)"),
        ("targeted", r'regularizer is the text "targeted", .*nearest: TargetedDropout\(\)'),
        (Magnitude(), "regularizer is of type Magnitude, expected an instance of a Regularizer"),
    ],
)
def test_a_sparsifier_says_what_it_was_given(regularizer, message):
    with pytest.raises(UsageError, match=f"^Sparsifier: {message}"):
        Sparsifier(network(), regularizer, steps=2)


def test_a_sparsifier_wants_targets_too():
    with pytest.raises(UsageError, match=r"^Sparsifier: targets is of type list, expected Targets"):
        Sparsifier(network(), TargetedDropout(), steps=2, targets=["0.weight"])


def test_learned_scores_rank_weights_and_units():
    by_weight = {"0.weight": torch.arange(24.0).reshape(6, 4), "2.weight": torch.arange(12.0).reshape(2, 6)}
    masks = prune_weights(network(), 0.5, criterion=Learned(), learned=by_weight)
    assert masks["0.weight"].flatten().tolist() == [False] * 12 + [True] * 12
    assert masks["2.weight"].flatten().tolist() == [False] * 6 + [True] * 6
    net = network()
    expected = net[0].weight[[0, 2, 4]].detach().clone()
    by_unit = {"0.weight": torch.tensor([5.0, 0.0, 4.0, 1.0, 3.0, 2.0]), "2.weight": torch.ones(2)}
    prune_units_(net, 0.5, INPUTS, criterion=Learned(), learned=by_unit, multiple_of=1)
    assert torch.equal(net[0].weight, expected)
    with pytest.raises(UsageError, match="learned"):
        prune_weights(network(), 0.5, criterion=Learned())


def test_rankings_want_a_criterion_not_its_name():
    with pytest.raises(UsageError, match=r"rank: criterion is .*magnitude"):
        rank(network(), "magnitude")
    with pytest.raises(UsageError, match=r"rank_units: criterion is"):
        rank_units(network(), Magnitude, None)
