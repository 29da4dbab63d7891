"""The greedy oracle: a loop of deep copies finds the same, dead units cost nothing, a stopped search goes on."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.core.targets import find_targets
from secateur.criteria.oracle import Oracle
from secateur.errors import CheckpointError, SecateurError, UsageError
from secateur.sparsify.ranking import SelectionRule, rank, rank_units
from secateur.surgery.engine import trace_groups
from secateur.testing import check_criterion
from secateur.testing.snapshots import same_structure, same_values, structure, values
from secateur.variants import Workbench, variant_from
from secateur.variants.evaluate import right_or_wrong
from secateur.variants.greedy import greedy_oracle, negative_cross_entropy
from secateur.variants.kinds import DropUnits


def _net(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
    nn.init.normal_(net[3].weight)
    nn.init.normal_(net[3].bias)
    return net.eval()


def _batches(sizes=(17, 8)):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator)) for n in sizes]


def _bench(net):
    return Workbench(net, find_targets(net, exclude=["5"]), batches=_batches())


@torch.no_grad()
def _by_deep_copies(net, batches, steps, min_keep):
    """The same search over copies of the network, units set to zero by hand."""
    left, found = {"0.weight": list(range(5)), "2.weight": list(range(4))}, []
    net = copy.deepcopy(net).double()
    for _ in range(steps):
        tried = []
        for layer, units in left.items():
            for unit in units if len(units) > min_keep else ():
                changed = copy.deepcopy(net)
                # Behind the second layer there is a BatchNorm, whose scale and shift it is.
                place = changed[0] if layer == "0.weight" else changed[3]
                place.weight[unit], place.bias[unit] = 0.0, 0.0
                loss = sum(
                    float(nn.functional.cross_entropy(changed(x.double()), y, reduction="sum")) for x, y in batches
                )
                tried.append((loss / sum(len(y) for _, y in batches), layer, unit, changed))
        loss, layer, unit, net = min(tried, key=lambda t: t[0])
        left[layer].remove(unit)
        found.append((layer, unit, -loss))
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("min_keep", [1, 2])
def test_it_is_a_loop_of_deep_copies(seed, min_keep):
    net, batches = _net(seed), _batches()
    steps = 9 - 2 * min_keep
    found = greedy_oracle(_bench(net), iter(batches), min_keep=min_keep)
    expected = _by_deep_copies(net, batches, steps, min_keep)
    assert found.order == tuple((layer, unit) for layer, unit, _ in expected)
    assert [s.score for s in found.steps] == pytest.approx([score for _, _, score in expected], abs=1e-6)
    with torch.no_grad():
        whole = torch.cat([negative_cross_entropy(net(x), y) for x, y in batches])
    assert found.whole == pytest.approx(float(whole.double().mean()))
    assert found.units == {"0.weight": 5, "2.weight": 4}
    # Its own score, made anew from the order alone.
    with _bench(net).variant(found.variant(3)) as model, torch.no_grad():
        again = torch.cat([negative_cross_entropy(model(x), y) for x, y in batches])
    assert found.steps[2].score == pytest.approx(float(again.double().mean()))


def test_c3_dropping_a_dead_unit_changes_nothing_and_where_all_others_help_it_goes_first():
    # Classes are told apart by the sign of one number, which both live units carry; unit 1 never fires.
    net = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 2, bias=False))
    net[0].weight.data = torch.tensor([[1.0], [2.0], [-1.0]])
    net[0].bias.data = torch.tensor([0.0, -50.0, 0.0])
    net[2].weight.data = torch.tensor([[1.0, 5.0, -1.0], [-1.0, 5.0, 1.0]])
    x = torch.linspace(-2, 2, 20)[:, None]
    batches = [(x, (x[:, 0] < 0).long())]
    bench = Workbench(net, find_targets(net, ["0"]), batches=batches)
    with torch.no_grad():
        before = net(x)
        with bench.variant(DropUnits((("0", 1),))) as model:
            assert torch.equal(model(x), before)
    found = greedy_oracle(bench, batches)
    assert found.order[0] == ("0.weight", 1)
    assert found.steps[0].score == found.whole
    assert all(step.score < found.whole for step in found.steps[1:])


def test_equal_scores_go_to_the_earlier_layer_and_the_lower_index():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    bench = Workbench(net, find_targets(net, exclude=["4"]), batches=_batches())
    found = greedy_oracle(bench, _batches())
    assert found.order == (("0.weight", 0), ("0.weight", 1), ("2.weight", 0), ("2.weight", 1))
    assert greedy_oracle(bench, _batches(), layers=["2", "0"]).order[0] == ("2.weight", 0)


def test_when_it_stops():
    bench, batches = _bench(_net()), _batches()
    whole = greedy_oracle(bench, batches)
    assert len(whole.steps) == 7
    assert greedy_oracle(bench, batches, steps=0).order == ()
    assert greedy_oracle(bench, batches, steps=2).order == whole.order[:2]
    # A third of 9 is 3 left; a tenth of 9 is 1, but each layer keeps one.
    assert greedy_oracle(bench, batches, until=1 / 3).order == whole.order[:6]
    assert greedy_oracle(bench, batches, until=0.1).order == whole.order
    # 9 + 8 passes for two of nine units, and one for the network itself, of 25 examples each.
    assert greedy_oracle(bench, batches, steps=2).cost.examples == 25 * (1 + 9 + 8)
    assert whole.rows()[0] == {"dropped": 1, "layer": whole.order[0][0], "unit": whole.order[0][1]} | {
        "score": whole.steps[0].score
    }


def test_a_stopped_search_goes_on_and_a_longer_one_begins_with_it(tmp_path):
    bench, batches, book = _bench(_net()), _batches(), tmp_path / "greedy.jsonl"
    whole = greedy_oracle(bench, batches)

    def stop(tried, of):
        assert of >= tried
        if tried > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        greedy_oracle(bench, batches, journal=book, progress=stop)
    with book.open("ab") as file:
        file.write(b'{"step": 9, "lay')
    again = greedy_oracle(bench, batches, journal=book)
    assert again.steps == whole.steps
    assert again.whole == whole.whole
    assert 0 < again.cost.examples < whole.cost.examples
    third = greedy_oracle(bench, batches, steps=3, journal=book)
    assert third.order == whole.order[:3]
    assert third.cost.examples == 0
    with pytest.raises(CheckpointError, match="differs in min_keep"):
        greedy_oracle(bench, batches, journal=book, min_keep=2)
    with pytest.raises(CheckpointError, match="differs in data"):
        greedy_oracle(bench, _batches((9, 8)), journal=book)
    with pytest.raises(CheckpointError, match="differs in score"):
        greedy_oracle(bench, batches, journal=book, score=right_or_wrong)
    assert greedy_oracle(bench, batches, score=right_or_wrong, steps=1).whole <= 1.0


def test_statistics_are_renewed_for_every_removal(tmp_path):
    bench, batches = _bench(_net()), _batches()
    options = {"steps": 2, "recalibrate": batches, "journal": tmp_path / "greedy.jsonl"}
    found = greedy_oracle(bench, batches, **options)
    assert found.cost.recalibration == found.cost.examples
    assert found.whole != greedy_oracle(bench, batches, steps=0).whole
    assert greedy_oracle(bench, batches, **options).steps == found.steps
    with pytest.raises(CheckpointError, match="differs in recalibrate"):
        greedy_oracle(bench, batches, steps=2, journal=tmp_path / "greedy.jsonl")


def test_the_network_comes_back():
    net = _net().train()
    shape, state = structure(net), copy.deepcopy(values(net))
    greedy_oracle(_bench(net), _batches(), steps=2)
    same_structure("after", shape, structure(net))
    same_values("after", state, values(net))


def test_the_criterion_follows_the_order():
    net, batches = _net(), _batches()
    bench = _bench(net)
    found = greedy_oracle(bench, batches)
    rule = SelectionRule(scope="global")
    for dropped in range(1, 7):
        masks = rank(net, found.criterion(), granularity="unit", rule=rule, targets=bench.targets).masks(dropped / 9)
        gone = {(n, u) for n, m in masks.items() for u in np.flatnonzero(~m[:, 0].numpy()).tolist()}
        assert gone == set(found.order[:dropped])
    groups = trace_groups(net, batches[0][0])
    kept = rank_units(net, found.criterion(), groups, rule=rule, targets=bench.targets).kept(3 / 9)
    assert sum(int((~keep).sum()) for keep in kept.values()) == 3
    check_criterion(found.criterion())
    assert found.criterion().wanted() == frozenset()
    assert Oracle().wanted() == {"ablation_loss"}
    half = rank(net.half(), found.criterion(), granularity="unit", rule=rule, targets=bench.targets)
    assert all(cell.dtype == torch.float32 for cell in half.cells.values())


@given(st.lists(st.tuples(st.sampled_from(["0", "2", "a.b"]), st.integers(0, 9)), unique=True, max_size=6))
@settings(deadline=None, max_examples=30)
def test_sets_of_units_are_records(units):
    variant = DropUnits(tuple(units))
    assert variant_from(json.loads(json.dumps(variant.record()))) == variant
    assert DropUnits(tuple(reversed(units))) == variant
    assert hash(DropUnits(tuple(reversed(units)))) == hash(variant)


def test_refusals():
    bench, batches = _bench(_net()), _batches()
    for options, message in [
        ({"steps": 1, "until": 0.5}, "give one"),
        ({"steps": 8}, "between 0 and 7"),
        ({"until": 1.0}, r"in \[0, 1\)"),
        ({"min_keep": -1}, "at least 0"),
        ({"layers": []}, "no layers"),
        ({"layers": ["9"]}, 'unknown layer "9"'),
    ]:
        with pytest.raises(SecateurError, match=message):
            greedy_oracle(bench, batches, **options)
    with pytest.raises(UsageError, match="repeat"):
        DropUnits((("0", 1), ("0", 1)))
    with pytest.raises(UsageError, match="at least 0"):
        DropUnits((("0", -1),))
    with pytest.raises(UsageError, match="pairs"):
        DropUnits((("0", 1, 2),))
    with pytest.raises(UsageError, match="units 0 to 4, got 5"), bench.variant(DropUnits((("0", 5),))):
        pass
    with pytest.raises(UsageError, match="no order"):
        greedy_oracle(bench, batches, steps=0).criterion()
    with pytest.raises(UsageError, match="none of 9"):
        greedy_oracle(bench, batches, steps=1).variant(9)
    with pytest.raises(UsageError, match="twice"):
        Oracle((("0", 1), ("0", 1)))
    with pytest.raises(UsageError, match="another network"):
        rank(_net(), Oracle((("0", 7),)), granularity="unit")
