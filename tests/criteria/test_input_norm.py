"""Input norms of every layer type, against the derivative of the layer's output: what each weight multiplies."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.core.targets import find_targets
from secateur.criteria.driver import gather_evidence, score_targets
from secateur.criteria.wanda import Wanda
from secateur.errors import UsageError

NEED = frozenset({"input_norm"})

LAYERS = [
    (nn.Linear(5, 4), (5,)),
    (nn.Linear(5, 4), (3, 5)),
    (nn.Linear(5, 4), (2, 3, 5)),
    (nn.Conv1d(3, 4, 3), (3, 7)),
    (nn.Conv1d(3, 4, 4, padding="same"), (3, 7)),
    (nn.Conv2d(3, 4, 3, padding=1), (3, 5, 6)),
    (nn.Conv2d(3, 4, 3, stride=2, padding=2), (3, 6, 5)),
    (nn.Conv2d(3, 4, (3, 2), stride=(3, 2), padding=(0, 1), dilation=(1, 2)), (3, 8, 7)),
    (nn.Conv2d(3, 4, 3, padding=4), (3, 2, 2)),
    (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (3, 5, 5)),
    (nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5)),
    (nn.Conv2d(4, 8, 3, groups=4, padding=1), (4, 5, 5)),
    (nn.Conv3d(2, 3, 2, padding="valid"), (2, 3, 4, 3)),
    (nn.ConvTranspose1d(3, 4, 3), (3, 5)),
    (nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), (3, 4, 3)),
    (nn.ConvTranspose2d(4, 6, 2, groups=2, padding=1, dilation=2), (4, 4, 4)),
    (nn.ConvTranspose2d(3, 2, 4, stride=3, padding=3), (3, 2, 3)),
    (nn.ConvTranspose3d(2, 2, 2, stride=(1, 2, 1)), (2, 2, 2, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda value: str(value))
def test_it_is_the_norm_of_what_each_weight_multiplies(layer, shape):
    layer = layer.double()
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = [
        gather_evidence(layer, find_targets(layer), NEED, batches=batches)["weight"].input_norm
        for batches in ([x], list(x.split([1, 3, 1])))
    ]

    def outputs(weight):
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    # A weight reaches the outputs of its own unit only, each through the input that it multiplies there.
    jacobian = torch.autograd.functional.jacobian(outputs, layer.weight.detach())
    expected = jacobian.flatten(0, -layer.weight.dim() - 1).norm(dim=0)
    for norm in found:
        assert norm.dtype == torch.float64
        torch.testing.assert_close(norm, expected)


def test_sizes_may_change_from_batch_to_batch():
    layer = nn.Conv2d(2, 3, 3, stride=2, padding=1).double()
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, 2, h, w, generator=generator).double() for n, h, w in ((2, 5, 6), (1, 8, 3), (3, 2, 2))]
    norm = gather_evidence(layer, find_targets(layer), NEED, batches=batches)["weight"].input_norm
    columns = torch.cat([F.unfold(x, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1) for x in batches])
    torch.testing.assert_close(norm, columns.norm(dim=0).reshape(1, 2, 3, 3).expand(3, -1, -1, -1))


def test_a_layer_called_twice_and_functional_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.Linear(4, 4)

        def forward(self, x):
            return F.linear(input=self.cell(x), weight=self.cell.weight)

    network = Twice().double()
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()
    norm = gather_evidence(network, find_targets(network), NEED, batches=[x])["cell.weight"].input_norm
    inner = torch.cat([x, network.cell(x).detach()])
    torch.testing.assert_close(norm, inner.norm(dim=0).expand(4, 4))


def test_half_precision_does_not_overflow():
    layer = nn.Linear(2, 2).bfloat16()
    x = torch.full((300, 2), 3e4).bfloat16()
    norm = gather_evidence(layer, find_targets(layer), NEED, batches=[x])["weight"].input_norm
    torch.testing.assert_close(norm, x.double().norm(dim=0).expand(2, 2))


def test_an_attention_layer_is_refused_by_name():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0].mean(1))

    network, batches = Attention(), [torch.randn(2, 3, 8)]
    with pytest.raises(UsageError, match=r'"attention.in_proj_weight" cannot be scored: its input was never seen'):
        score_targets(network, find_targets(network), [Wanda()], batches=batches)
    score_targets(network, find_targets(network, ["head"]), [Wanda()], batches=batches)
