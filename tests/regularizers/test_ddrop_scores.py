"""DDROP ranked by weight norms and by an added scale: equal to masks by hand, ranks, folding, refusals."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.core.duration import Progress
from secateur.core.targets import find_targets
from secateur.errors import UsageError
from secateur.regularizers.ddrop import DDrop
from secateur.regularizers.ddrop_scale import DDropScale
from secateur.testing import check_regularizer

WEIGHT_NORM = DDrop(keep_min=0.3, keep_max=0.9, scores="weight_norm", l1=0.0)


def _x(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _ranked(scores, low, high):
    """Keep probabilities from the text, in NumPy."""
    rank = [sum(other <= s for j, other in enumerate(scores) if j != i) for i, s in enumerate(scores)]
    return low + (high - low) * np.array(rank) / (len(scores) - 1)


class Plain(nn.Module):
    """A convolution without BatchNorm, one with, a linear layer; `factors` multiply unit outputs by hand."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc, self.head = nn.Linear(8, 10), nn.Linear(10, 3)
        self.factors = {}

    def at(self, name, y):
        factor = self.factors.get(name)
        return y if factor is None else y * factor.reshape(*factor.shape, *[1] * (y.dim() - 2))

    def forward(self, x):
        x = F.relu(self.at("conv1.weight", self.conv1(x)))
        x = F.relu(self.at("conv2.weight", self.bn2(self.conv2(x)))).mean((2, 3))
        return self.head(F.relu(self.at("fc.weight", self.fc(x))))


def _network():
    torch.manual_seed(0)
    network = Plain().train()
    nn.init.normal_(network.bn2.weight)
    return network


def _targets(network):
    return find_targets(network, exclude=["@last"])


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_weight_norm_equals_masks_by_hand(per_sample, rescale):
    network = _network()
    twin = copy.deepcopy(network)
    spec = DDrop(0.3, 0.9, per_sample=per_sample, rescale=rescale, scores="weight_norm", l1=0.0)
    with spec.attach(network, _targets(network), seed=3) as attachment:
        for samples in (6, 2):
            x = _x(samples, 2, 5, 5)
            out = network(x)
            twin.factors = {n: m.clone() for n, m in attachment._masks.items()}
            expected = twin(x)
            torch.testing.assert_close(out, expected)
            network.zero_grad()
            twin.zero_grad()
            out.square().sum().backward()
            expected.square().sum().backward()
            for p, q in zip(network.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad)
            for target in _targets(network):
                mask = twin.factors[target.name]
                assert mask.shape == (samples if per_sample else 1, target.units)
                norms = np.square(target.rows(network.get_parameter(target.name).detach()).numpy()).sum(1)
                keep = torch.tensor(_ranked(norms, 0.3, 0.9), dtype=torch.float32)
                assert bool(((mask == 0) | torch.isclose(mask, 1 / keep if rescale else torch.ones(()))).all())
                np.testing.assert_allclose(attachment.scores()[target.name].numpy(), norms, rtol=1e-5)
            attachment.after_step(Progress(1, 3, 3))
        assert {n: s.module for n, s in attachment.sites.items()} == {
            "conv1.weight": "conv1",
            "conv2.weight": "bn2",
            "fc.weight": "fc",
        }
        assert attachment.penalty() == 0.0


def test_keep_frequencies_follow_the_ranks_of_weight_norms():
    network = nn.Sequential(nn.Linear(1, 5)).train()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([0.5, -0.1, 0.3, -0.3, 0.9])[:, None])
    count = 4000
    with DDrop(scores="weight_norm", l1=0.0).attach(network, seed=1) as attachment:
        network(torch.randn(count, 1))
        kept = attachment._masks["0.weight"].double().mean(0).numpy()
    expected = _ranked(np.square([0.5, 0.1, 0.3, 0.3, 0.9]), 0.6, 1.0)
    np.testing.assert_allclose(expected, [0.9, 0.6, 0.8, 0.8, 1.0])
    assert np.all(np.abs(kept - expected) <= 4 * np.sqrt(expected * (1 - expected) / count) + 1e-9)


def test_the_units_of_a_sequence_share_one_mask_a_sample():
    network = nn.Sequential(nn.Linear(3, 20)).train()
    with WEIGHT_NORM.attach(network) as attachment:
        out = network(_x(4, 7, 3))
        dropped = attachment._masks["0.weight"] == 0
        assert torch.equal((out == 0).all(1), dropped)
        assert len({tuple(row.tolist()) for row in dropped}) > 1


def test_what_weight_norm_acts_on():
    assert DDrop().acts_on == "norm" == DDrop.acts_on
    assert WEIGHT_NORM.acts_on == "weight"
    assert DDrop(scores="weight_norm", l1=0.0) == DDrop(l1=0.0, scores="weight_norm") != DDrop(l1=0.0)
    network = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(UsageError, match="kind attention"):
        WEIGHT_NORM.attach(network)
    assert not network._forward_pre_hooks


@pytest.mark.parametrize(
    "spec",
    [
        DDrop(scores="weight_norm", l1=0.0),
        DDrop(0.2, scores="weight_norm", l1=0.0, per_sample=False, rescale=True, schedule="linear"),
        DDropScale(keep_min=0.3, schedule="cosine", per_sample=False, rescale=True, l1=0.0),
    ],
    ids=str,
)
def test_the_contract(spec):
    check_regularizer(spec, compiled=False)


def _mlp():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 12), nn.GELU(), nn.Linear(12, 4))
    return network.train(), find_targets(network, include=["0"])


def test_the_scale_multiplies_and_is_ranked():
    network, targets = _mlp()
    twin = copy.deepcopy(network)
    spec = DDropScale(keep_min=0.3, keep_max=0.9, l1=0.125)
    with spec.attach(network, targets, seed=2) as attachment:
        (name,) = attachment.learned
        assert name == "0.ddrop_scale"
        scale = attachment.learned[name]
        assert scale.tolist() == [1.0] * 12
        with torch.no_grad():
            scale.copy_(_x(12))
        x = _x(5, 4)
        out = network(x)
        mask = attachment._masks["0.weight"]
        hand = scale.detach().clone().requires_grad_(True)
        expected = twin[2](F.gelu(twin[0](x) * hand * mask))
        torch.testing.assert_close(out, expected)
        penalty = attachment.penalty()
        assert float(penalty.detach()) == pytest.approx(0.125 * float(scale.detach().abs().sum()))
        (out.sum() + penalty).backward()
        (expected.sum() + 0.125 * hand.abs().sum()).backward()
        torch.testing.assert_close(scale.grad, hand.grad)
        keep = attachment._keep()[targets[0].name]
        np.testing.assert_allclose(keep, _ranked(scale.detach().abs().numpy(), 0.3, 0.9), rtol=1e-6)
        assert torch.equal(attachment.scores()["0.weight"], scale.detach().abs())
        network.eval()
        torch.testing.assert_close(network(x), twin[2](F.gelu(twin[0](x) * scale)))


def test_a_fresh_scale_keeps_everything_at_keep_max_one():
    network, targets = _mlp()
    x = _x(5, 4)
    plain = network(x)
    with DDropScale(keep_min=0.1).attach(network, targets):
        assert torch.equal(network(x), plain)


@pytest.mark.parametrize("where", ["linear", "conv", "transposed", "batch norm"])
def test_finalize_folds_into_weight_and_bias(where):
    torch.manual_seed(0)
    network, x = {
        "linear": (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), _x(5, 4)),
        "conv": (nn.Sequential(nn.Conv2d(2, 6, 3, bias=False), nn.ReLU(), nn.Conv2d(6, 3, 1)), _x(5, 2, 6, 6)),
        "transposed": (
            nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2), nn.ReLU(), nn.Conv2d(6, 3, 1)),
            _x(5, 4, 3, 3),
        ),
        "batch norm": (nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)), _x(5, 4)),
    }[where]
    keys = list(network.state_dict())
    attachment = DDropScale().attach(network.train())
    network(x)
    for scale in attachment.learned.values():
        nn.init.normal_(scale)
    network.eval()
    before = network(x).detach()
    plain = copy.deepcopy(network)(x)
    assert not torch.allclose(before, plain)
    assert attachment.finalize() is None
    torch.testing.assert_close(network(x), before, rtol=1e-4, atol=1e-6)
    assert list(network.state_dict()) == keys
    assert attachment.learned == {}


def test_scales_that_never_acted():
    network, targets = _mlp()
    state = copy.deepcopy(network.state_dict())
    attachment = DDropScale().attach(network, targets)
    attachment.finalize()
    assert all(torch.equal(network.state_dict()[n], t) for n, t in state.items())
    attachment = DDropScale().attach(network, targets)
    nn.init.normal_(attachment.learned["0.ddrop_scale"])
    with pytest.raises(UsageError, match="no forward pass has been made"):
        attachment.finalize()
    attachment.remove()


def test_scales_act_in_evaluation_before_any_training_pass():
    network, targets = _mlp()
    network.eval()
    x = _x(5, 4)
    with DDropScale().attach(network, targets) as attachment, torch.no_grad():
        attachment.learned["0.ddrop_scale"].mul_(2.0)
        expected = network[2](F.gelu(2 * F.linear(x, network[0].weight, network[0].bias)))
        torch.testing.assert_close(network(x), expected)


def test_layers_that_cannot_be_folded_are_refused():
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    network[2].weight = network[0].weight
    with pytest.raises(UsageError, match=r"tied to 2\.weight"):
        DDropScale().attach(network)
    assert not network._forward_pre_hooks
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False)).train()
    with DDropScale().attach(network), pytest.raises(UsageError, match="has no scale of its own"):
        network(_x(3, 4))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DDrop(scores="norm"), "ddrop scores"),
        (lambda: DDrop(scores="weight_norm"), "set l1=0"),
        (lambda: DDropScale(keep_min=0.9, keep_max=0.5), "ddrop_scale: expected 0 <= keep_min"),
        (lambda: DDropScale(l1=-1.0), "ddrop_scale: l1"),
        (lambda: DDropScale(schedule="cubic"), "schedule"),
    ],
)
def test_impossible_settings(make, words):
    with pytest.raises(UsageError, match=words):
        make()


def test_two_transformer_blocks_trained_and_folded():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    network = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train()
    targets = find_targets(network, include=["*.linear1"])
    attachment = DDropScale(keep_min=0.5, l1=0.01).attach(network, targets, seed=1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    for step in range(4):
        optimizer.zero_grad()
        (network(_x(3, 5, 8, seed=step)).square().mean() + attachment.penalty()).backward()
        optimizer.step()
        attachment.after_step(Progress(step + 1, 4, 2))
    network.eval()
    x = _x(3, 5, 8)
    before = network(x).detach()
    assert all(bool((s != 1).any()) for s in attachment.learned.values())
    attachment.finalize()
    torch.testing.assert_close(network(x), before, rtol=1e-4, atol=1e-5)
