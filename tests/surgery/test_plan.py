"""Plans as data, and rounding widths up."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from surgery_networks import network, some_kept

from secateur.errors import CheckpointError, NoEffectError, UnknownNameError, UsageError
from secateur.surgery import Plan, align, fingerprint, make_plan, trace_groups


def example() -> Plan:
    model, inputs = network("grouped")
    groups = trace_groups(model, inputs)
    return make_plan(model, groups, some_kept(groups, 0))


def test_json_round_trip_is_exact_and_plain() -> None:
    plan = example()
    assert Plan.from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json()) == plan.to_dict()
    assert {e.attribute for e in plan.edits} == {
        "in_channels",
        "out_channels",
        "num_features",
        "num_parameters",
        "in_features",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: "no json {", "not JSON"),
        (lambda d: [1], "expected a JSON object"),
        (lambda d: d | {"schema": 99}, "schema 99, expected 1"),
        (lambda d: {k: v for k, v in d.items() if k != "cuts"}, "malformed"),
        (lambda d: d | {"cuts": [["0.weight", 0, [2, 1], 1]]}, "ascending"),
        (lambda d: d | {"cuts": [["0.weight", 0, [], 1]]}, "not empty"),
        (lambda d: d | {"cuts": [["0.weight", -1, [1], 1]]}, "whole number"),
        (lambda d: d | {"edits": [["0", "forward", 3]]}, "not one a cut changes"),
        (lambda d: d | {"edits": [["0", "out_channels", "x"]]}, "whole number"),
    ],
)
def test_malformed_plans_are_one_line(change: object, message: str) -> None:
    changed = change(example().to_dict())  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message) as error:
        Plan.from_json(changed if isinstance(changed, str) else json.dumps(changed))
    assert "\n" not in str(error.value)


def test_impossible_choices_are_refused() -> None:
    model, inputs = network("mlp")
    groups = trace_groups(model, inputs)
    all_kept = torch.ones(12, dtype=torch.bool)
    with pytest.raises(NoEffectError, match="removes nothing"):
        make_plan(model, groups, {"0.weight": all_kept})
    with pytest.raises(NoEffectError):
        make_plan(model, groups, {})
    with pytest.raises(UsageError, match="none of its 12 units"):
        make_plan(model, groups, {"0.weight": ~all_kept})
    with pytest.raises(UnknownNameError, match=r"0\.weight"):
        make_plan(model, groups, {"0.wait": all_kept})
    with pytest.raises(UsageError, match="output of the network"):
        make_plan(model, groups, {"4.weight": torch.tensor([True, False, True, True])})
    with pytest.raises(UsageError, match="given twice"):
        make_plan(model, groups, {"0.weight": torch.arange(12) > 3, "0.bias": torch.arange(12) > 5})


def test_groups_that_meet_in_one_dimension_are_cut_together() -> None:
    model, inputs = network("concat")
    groups = trace_groups(model, inputs)
    kept = {"a.weight": torch.arange(6) < 2, "b.weight": torch.arange(4) > 1}
    plan = make_plan(model, groups, kept)
    (cut,) = [c for c in plan.cuts if (c.path, c.dim) == ("c.weight", 1)]
    assert cut.kept == (0, 1, 2, 3, 4, 11, 12)
    assert ("c", "in_channels", 7) in plan.edits


def test_fingerprint_tells_shapes_and_names_apart_but_not_values() -> None:
    assert fingerprint(network("mlp", 0)[0]) == fingerprint(network("mlp", 1)[0])
    assert len({fingerprint(network(n)[0]) for n in ("mlp", "mlp_layer_norm", "residual", "tied")}) == 4


@settings(max_examples=100, deadline=None)
@given(
    width=st.integers(1, 40),
    blocks=st.sampled_from([1, 2, 3, 4]),
    multiple=st.integers(1, 20),
    seed=st.integers(0, 2**31),
    fraction=st.floats(0, 1),
)
def test_align_adds_the_best_and_never_drops(
    width: int, blocks: int, multiple: int, seed: int, fraction: float
) -> None:
    units = width * blocks
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 5, (units,), generator=generator).float()
    each = max(1, round(fraction * width))
    rank = torch.rand(blocks, width, generator=generator).argsort(1).argsort(1)
    kept = (rank < each).reshape(-1)
    result = align(kept, scores, multiple, blocks=blocks)
    assert bool((result | ~kept).all())
    assert len(set(result.reshape(blocks, -1).sum(1).tolist())) == 1
    count = int(result.sum())
    if units < multiple or int(kept.sum()) % multiple == 0:
        assert torch.equal(result, kept)
    else:
        assert count % multiple == 0 or count == units
        if blocks == 1:
            assert count == min(units, -(-int(kept.sum()) // multiple) * multiple)
    added, left = result & ~kept, ~result
    for a, b, s in zip(added.view(blocks, -1), left.view(blocks, -1), scores.view(blocks, -1), strict=True):
        assert not a.any() or not b.any() or s[a].min() >= s[b].max()


def test_align_refuses_what_does_not_fit() -> None:
    with pytest.raises(UsageError, match="as many scores"):
        align(torch.ones(4, dtype=torch.bool), torch.ones(3))
    with pytest.raises(UsageError, match="blocks=3 for 4 units"):
        align(torch.ones(4, dtype=torch.bool), torch.ones(4), 2, blocks=3)
