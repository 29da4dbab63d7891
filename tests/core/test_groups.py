"""Groups as data: lookup, the checks on a choice, and the masks of the masked self."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from secateur.core.groups import Group, Groups, Member, clear_entries_, unit_masks
from secateur.errors import UnknownNameError, UsageError


def identity(units: int, repeat: int = 1) -> np.ndarray:
    return np.arange(units * repeat, dtype=np.int64).reshape(units, repeat)


def conv_then_flatten() -> tuple[nn.Module, Groups]:
    """Four channels over 3x3 positions, flattened into a linear layer."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 3))
    group = Group(
        "0.weight",
        4,
        (
            Member("0.weight", 0, "producer", identity(4)),
            Member("0.bias", 0, "producer", identity(4)),
            Member("1.weight", 0, "follower", identity(4)),
            Member("1.running_mean", 0, "follower", identity(4)),
            Member("3.weight", 1, "consumer", identity(4, 9)),
        ),
    )
    last = Group("3.weight", 3, (Member("3.weight", 0, "producer", identity(3)),), blocked="it is the output")
    return model, Groups([group, last])


def test_lookup_by_any_producer() -> None:
    _, groups = conv_then_flatten()
    assert groups["0.bias"] is groups["0.weight"] is groups[0]
    assert "0.bias" in groups
    assert "1.weight" not in groups
    assert groups.names == ["0.weight", "3.weight"]
    assert groups.prunable().names == groups.inner().names == ["0.weight"]
    with pytest.raises(UnknownNameError, match=r"nearest: 0.weight"):
        groups["0.weigth"]


def test_masks_zero_what_a_cut_removes() -> None:
    model, groups = conv_then_flatten()
    masks = unit_masks(groups, {"0.bias": torch.tensor([True, False, True, True])}, model)
    assert set(masks) == {"0.weight", "0.bias", "1.weight", "3.weight"}
    assert {name: (~mask).sum().item() for name, mask in masks.items()} == {
        "0.weight": 18,
        "0.bias": 1,
        "1.weight": 1,
        "3.weight": 27,
    }
    assert not masks["3.weight"][:, 9:18].any()
    assert masks["3.weight"].sum(dim=1).tolist() == [27, 27, 27]


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (torch.ones(4), "kept is torch.float32"),
        (torch.ones(3, dtype=torch.bool), r"expected torch.bool \[4\]"),
        (torch.zeros(4, dtype=torch.bool), "none of its 4 units is kept"),
    ],
)
def test_impossible_choices_are_refused(kept: torch.Tensor, message: str) -> None:
    model, groups = conv_then_flatten()
    with pytest.raises(UsageError, match=message):
        unit_masks(groups, {"0.weight": kept}, model)


def test_blocked_groups_may_stay_whole_but_not_be_cut() -> None:
    model, groups = conv_then_flatten()
    assert unit_masks(groups, {"3.weight": torch.ones(3, dtype=torch.bool)}, model)["3.weight"].all()
    with pytest.raises(UsageError, match="must not be cut: it is the output"):
        unit_masks(groups, {"3.weight": torch.tensor([True, True, False])}, model)


def test_blocks_need_equal_counts() -> None:
    group = Group("a", 6, (), blocks=3)
    group.check_kept(torch.tensor([True, False, False, True, True, False]))
    with pytest.raises(UsageError, match="3 blocks keep 0 to 2 units"):
        group.check_kept(torch.tensor([True, True, False, False, True, False]))


def test_entries_of_a_grouped_convolution_are_cleared_in_their_group() -> None:
    conv = nn.Conv2d(6, 4, 1, groups=2)  # weight [4, 3, 1, 1]: inputs 0..2 feed outputs 0, 1; 3..5 feed 2, 3
    mask = torch.ones(conv.weight.shape, dtype=torch.bool)
    clear_entries_(mask, 1, torch.tensor([1, 5]), groups=2)
    assert mask[:, :, 0, 0].tolist() == [[True, False, True]] * 2 + [[True, True, False]] * 2
