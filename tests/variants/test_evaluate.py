"""Evaluating variants together equals building each network and evaluating it alone; journals; memory; errors."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

from secateur.core.statistics import paired_examples
from secateur.errors import CheckpointError, DataError, SecateurError, StorageError, UsageError
from secateur.variants import DropUnit, NoisyPrune, UnitMasks, Workbench, evaluate_variants
from secateur.variants.kinds import LayerSparsity

VARIANTS = [
    NoisyPrune(0.0, 0.0),
    *(NoisyPrune(sigma, sparsity, seed) for sigma in (0.0, 0.05) for sparsity in (0.3, 0.8) for seed in (0, 1)),
    *(UnitMasks(0.4, seed) for seed in range(3)),
    DropUnit("0", 1),
    LayerSparsity("3", 0.5, "lamp"),
]


def _net(dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten()),
        nn.Linear(16, 3),
    ).to(dtype)
    for name in ("weight", "bias", "running_mean"):
        nn.init.normal_(getattr(net[1], name))
    return net.eval()


def _data(n=50, dtype=torch.float32, size=8):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 2, 6, 6, generator=generator).to(dtype)
    return [(x[i : i + size], torch.arange(n)[i : i + size] % 3) for i in range(0, n, size)]


def _alone(network, variant, batches):
    """A network of its own for one variant, evaluated by a plain loop."""
    built = copy.deepcopy(network)
    with Workbench(copy.deepcopy(network), batches=batches).variant(variant) as model:
        built.load_state_dict(model.state_dict())
    with torch.no_grad():
        return torch.cat([built(x).argmax(1) == y for x, y in batches]).numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hold", [1, 1 << 30], ids=["a batch at a time", "all at once"])
def test_together_is_what_each_is_alone(dtype, hold):
    network, batches = _net(dtype), _data(dtype=dtype)
    network.train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    outcome = evaluate_variants(Workbench(network, batches=batches), VARIANTS, batches, hold=hold)
    assert outcome.values.shape == (len(VARIANTS), 50)
    reference = copy.deepcopy(network).eval()
    for variant in VARIANTS:
        assert np.array_equal(outcome.of(variant), _alone(reference, variant, batches)), variant
    assert network.training
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert outcome.cost.examples == 50 * len(VARIANTS)
    assert len(set(outcome.means())) > 3


def test_data_is_read_once_and_equal_variants_are_evaluated_once():
    read = []

    def once():
        for batch in _data():
            read.append(1)
            yield batch

    same = [NoisyPrune(0.1, 0.5, 1), NoisyPrune(0.1, 0.5, 2), NoisyPrune(0.1, 0.5, 1)]
    outcome = evaluate_variants(Workbench(_net()), same, once(), hold=1)
    assert len(read) == len(_data())
    assert outcome.variants == tuple(same)
    assert np.array_equal(outcome.values[0], outcome.values[2])
    assert outcome.cost.examples == 2 * 50


def test_memory_does_not_grow_with_the_number_of_variants():
    network = _net()
    bench = Workbench(network)
    evaluate_variants(bench, [NoisyPrune(0.1, 0.5, s) for s in range(3)], _data(16))
    copies = {name: tensor.data_ptr() for name, tensor in bench._copies.items()}
    evaluate_variants(bench, [NoisyPrune(0.1, 0.5, s) for s in range(40)], _data(16))
    assert {name: tensor.data_ptr() for name, tensor in bench._copies.items()} == copies
    assert copies.keys() == {t.name for t in bench.targets}


def test_batchnorm_statistics_can_be_renewed_for_each_variant():
    network, batches = _net(), _data()
    variant = NoisyPrune(0.3, 0.5, 2)
    outcome = evaluate_variants(Workbench(network), [variant, variant], batches, recalibrate=batches)
    built = copy.deepcopy(network)
    with Workbench(copy.deepcopy(network)).variant(variant) as model:
        built.load_state_dict(model.state_dict())
    with torch.no_grad():
        # The mean over batches of their means and unbiased variances, as torch's cumulative average has it.
        outs = [built[0](x) for x, _ in batches]
        built[1].running_mean.copy_(torch.stack([o.mean((0, 2, 3)) for o in outs]).mean(0))
        built[1].running_var.copy_(torch.stack([o.var((0, 2, 3)) for o in outs]).mean(0))
        expected = torch.cat([built(x).argmax(1) == y for x, y in batches]).numpy()
    assert np.array_equal(outcome.values[0], expected)
    assert (outcome.cost.examples, outcome.cost.recalibration) == (50, 50)
    assert network[1].num_batches_tracked == 0


def test_a_stopped_evaluation_goes_on_from_its_journal(tmp_path):
    network, batches = _net(), _data()
    whole = evaluate_variants(Workbench(network, batches=batches), VARIANTS, batches, hold=1)
    path = tmp_path / "runs" / "journal.jsonl"

    class Stop(Exception):
        pass

    def stop(done, total):
        if done >= 60:
            raise Stop

    with pytest.raises(Stop):
        evaluate_variants(Workbench(network, batches=batches), VARIANTS, batches, hold=1, journal=path, progress=stop)
    known = len(path.read_text().splitlines()) - 1
    assert known == 8
    with path.open("ab") as file:
        file.write(b'{"variant": "cut o')
    again = evaluate_variants(Workbench(network, batches=batches), VARIANTS, batches, hold=1, journal=path)
    assert np.array_equal(again.values, whole.values)
    assert again.cost.made == len(VARIANTS) * len(batches) - known
    assert (
        evaluate_variants(Workbench(network, batches=batches), VARIANTS, batches, hold=1, journal=path).cost.made == 0
    )


def test_a_journal_of_another_evaluation_is_refused(tmp_path):
    path, batches = tmp_path / "journal.jsonl", _data()
    evaluate_variants(Workbench(_net()), VARIANTS[:2], batches, journal=path)
    other = _net()
    with torch.no_grad():
        other[0].weight[0] += 1
    content = path.read_bytes()
    with pytest.raises(CheckpointError, match="differs in network"):
        evaluate_variants(Workbench(other), VARIANTS[:2], batches, journal=path)
    with pytest.raises(CheckpointError, match="differs in score"):
        evaluate_variants(Workbench(_net()), VARIANTS[:2], batches, journal=path, score=_margin)
    assert path.read_bytes() == content
    # Other data: nothing of the old is taken for it.
    fresh = evaluate_variants(Workbench(_net()), VARIANTS[:2], _data(20), journal=path)
    assert fresh.cost.made == 2
    lines = content.splitlines()
    path.write_bytes(lines[0] + b"\n" + b'{"variant": 3}\n')
    with pytest.raises(CheckpointError, match=":2: not a line"):
        evaluate_variants(Workbench(_net()), VARIANTS[:2], batches, journal=path)


@pytest.mark.parametrize("score", ["bool", "float32"])
@pytest.mark.parametrize("wrong", [-1, 0, 7, 49, 51, 400, "50", 50.0, None])
def test_a_wrong_count_in_a_journal_is_refused_with_its_line(tmp_path, score, wrong):
    path, options = tmp_path / "journal.jsonl", {"score": _margin} if score == "float32" else {}
    evaluate_variants(Workbench(_net()), VARIANTS[:2], _data(), journal=path, **options)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert (lines[2]["count"], lines[2]["dtype"]) == (50, score)
    lines[2]["count"] = wrong
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(CheckpointError, match=r"journal.jsonl:3: not a line of an evaluation \(.*start over$"):
        evaluate_variants(Workbench(_net()), VARIANTS[:2], _data(), journal=path, **options)


@pytest.mark.parametrize(
    "line", ["[1]", "3", '{"variant": "a", "part": 0, "count": 1, "dtype": "int", "values": "gA=="}']
)
@pytest.mark.parametrize("number", [1, 2])
def test_what_is_no_line_of_a_journal_is_refused(tmp_path, line, number):
    path = tmp_path / "journal.jsonl"
    evaluate_variants(Workbench(_net()), VARIANTS[:1], _data(), journal=path)
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(CheckpointError, match=r"journal\.jsonl"):
        evaluate_variants(Workbench(_net()), VARIANTS[:1], _data(), journal=path)


def test_a_journal_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "journal.jsonl"):
        with pytest.raises(StorageError) as caught:
            evaluate_variants(Workbench(_net()), VARIANTS[:1], _data(), journal=path)
        assert str(caught.value).startswith(f"journal: cannot read or write {path}: ")
        assert "\n" not in str(caught.value)


def _margin(outputs, labels):
    top = outputs.gather(1, labels[:, None])[:, 0]
    return top - outputs.mean(1)


def test_any_score_an_example_and_its_journal(tmp_path):
    batches = _data()
    first = evaluate_variants(Workbench(_net()), VARIANTS[:3], batches, score=_margin, journal=tmp_path / "j")
    again = evaluate_variants(Workbench(_net()), VARIANTS[:3], batches, score=_margin, journal=tmp_path / "j")
    assert first.values.dtype == np.float32
    assert np.array_equal(first.values, again.values)
    assert first.difference(VARIANTS[0], VARIANTS[1]).method == "paired t over examples"
    assert first.spread().low <= first.spread().mean <= first.spread().high


def test_differences_are_paired_and_rows_say_what_they_are_of():
    batches = _data()
    outcome = evaluate_variants(Workbench(_net()), VARIANTS[:4], batches)
    a, b = VARIANTS[0], VARIANTS[3]
    found = outcome.difference(a, b)
    assert found == paired_examples(outcome.of(a), outcome.of(b))
    assert found.mean == pytest.approx(float(outcome.means()[0] - outcome.means()[3]))
    rows = json.loads(json.dumps(outcome.rows()))
    assert [row["count"] for row in rows] == [50] * 4
    assert rows[3]["sparsity"] == b.sparsity
    assert outcome.spread().interval.n == 4
    with pytest.raises(UsageError, match="was not evaluated"):
        outcome.of(NoisyPrune(0.9, 0.9))


def test_what_is_refused():
    bench, batches = Workbench(_net()), _data()
    with pytest.raises(UsageError, match="none to evaluate"):
        evaluate_variants(bench, [], batches)
    with pytest.raises(DataError, match=r"^evaluation: the batches are empty"):
        evaluate_variants(bench, VARIANTS[:1], [])
    with pytest.raises(DataError, match=r"^recalibration: the batches are empty"):
        evaluate_variants(bench, VARIANTS[:1], batches, recalibrate=[])
    with pytest.raises(UsageError, match=r"^evaluation: batches need labels"):
        evaluate_variants(bench, VARIANTS[:1], [batches[0][0]])
    with pytest.raises(DataError, match=r"noisy_prune\(.*not a number for 50 of 50"):
        evaluate_variants(bench, VARIANTS[:1], batches, score=lambda o, y: o[:, 0] * float("nan"))
    with pytest.raises(UsageError, match=r"score gave shape \[\], expected one value an example \[8\]"):
        evaluate_variants(bench, VARIANTS[:1], batches, score=lambda o, y: o.mean())
    with pytest.raises(SecateurError, match="inputs"):
        evaluate_variants(bench, [NoisyPrune(0.1, 0.5, criterion="taylor")], batches)


def test_outputs_that_are_not_finite_are_wrong():
    network = _net()
    with torch.no_grad():
        network[5].weight.fill_(float("inf"))
    outcome = evaluate_variants(Workbench(network), [NoisyPrune(0.0, 0.0)], _data())
    assert outcome.means().tolist() == [0.0]
