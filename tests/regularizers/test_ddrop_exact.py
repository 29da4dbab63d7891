"""DDROP at work equals the same masks written into the graph by hand; its penalty, schedule and edges."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.core.duration import Progress
from secateur.core.schedule import keep_prob_at
from secateur.core.targets import find_targets
from secateur.errors import UsageError
from secateur.regularizers.ddrop import DDrop, keep_probabilities


class Net(nn.Module):
    """A residual network with a BatchNorm after a linear layer too; `masks` multiply BatchNorm outputs by hand."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv1, self.bn1 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.fc, self.bn3 = nn.Linear(6, 10), nn.BatchNorm1d(10)
        self.head = nn.Linear(10, 3)
        self.masks = None

    def _bn(self, name, x):
        y = getattr(self, name)(x)
        if self.masks is None:
            return y
        mask = self.masks[f"{name}.weight"]
        return y * mask.reshape(*mask.shape, *[1] * (y.dim() - 2))

    def forward(self, x):
        x = F.relu(self._bn("bn0", self.stem(x)), inplace=True)
        y = self._bn("bn2", self.conv2(F.relu(self._bn("bn1", self.conv1(x)))))
        y += x
        return self.head(F.relu(self._bn("bn3", self.fc(F.relu(y).mean((2, 3))))))


def _network():
    torch.manual_seed(0)
    network = Net()
    for name, parameter in network.named_parameters():
        if name.startswith("bn"):
            nn.init.normal_(parameter)
    return network.train()


def _data(n=6):
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 2, 5, 5, generator=generator), torch.arange(n) % 3


def _masks(attachment):
    return {name: mask.clone() for name, mask in attachment._masks.items()}


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_forward_backward_and_statistics_equal_the_in_graph_reference(per_sample, rescale):
    network = _network().double()
    twin = copy.deepcopy(network)
    spec = DDrop(keep_min=0.3, keep_max=0.9, per_sample=per_sample, rescale=rescale, l1=0.01)
    with spec.attach(network, seed=3) as attachment:
        # The last batch of an epoch is smaller.
        for n in (6, 6, 2):
            x, y = _data(n)
            x = x.double()
            network.zero_grad()
            out = network(x)
            masks = _masks(attachment)
            (F.cross_entropy(out, y) + attachment.penalty()).backward()
            assert {m.shape[0] for m in masks.values()} == {n if per_sample else 1}
            twin.masks = masks
            twin.zero_grad()
            expected = twin(x)
            gammas = [p for name, p in twin.named_parameters() if name.startswith("bn") and name.endswith("weight")]
            (F.cross_entropy(expected, y) + 0.01 * sum(g.abs().sum() for g in gammas)).backward()
            torch.testing.assert_close(out, expected)
            for (name, p), (_, q) in zip(network.named_parameters(), twin.named_parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, msg=lambda m, name=name: f"{name}: {m}")
            for (name, b), (_, c) in zip(network.named_buffers(), twin.named_buffers(), strict=True):
                torch.testing.assert_close(b, c, msg=lambda m, name=name: f"{name}: {m}")
            for name, mask in masks.items():
                gamma = network.get_parameter(name).detach().abs()
                keep = keep_probabilities(gamma, 0.3, 0.9)
                values = 1 / keep if rescale else torch.ones_like(keep)
                assert bool(((mask == 0) | torch.isclose(mask, values)).all())
            attachment.after_step(Progress(1, 3, 3))


def test_keep_frequencies_follow_the_ranks():
    network = nn.Sequential(nn.BatchNorm1d(5))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([0.5, -0.1, 0.3, -0.3, 0.9]))
        network[0].bias.fill_(1.0)
    expected = torch.tensor([0.9, 0.6, 0.8, 0.8, 1.0])
    count = 4000
    with DDrop(l1=0.0).attach(network) as attachment:
        network(torch.randn(count, 5))
        kept = attachment._masks["0.weight"].mean(0)
        error = (expected * (1 - expected) / count).sqrt()
        assert bool(((kept - expected).abs() <= 4 * error + 1e-9).all())
        assert attachment.scores()["0.weight"].tolist() == pytest.approx([0.5, 0.1, 0.3, 0.3, 0.9])
        # Independent over samples: pairs of samples agree as often as independent coins do.
        mask = attachment._masks["0.weight"]
        both = (mask[0::2] * mask[1::2]).mean(0)
        spread = (expected**2 * (1 - expected**2) / (count / 2)).sqrt()
        assert bool(((both - expected**2).abs() <= 4 * spread + 1e-9).all())


def test_a_fresh_network_keeps_everything_at_keep_max_one():
    network = Net().train()
    x, _ = _data()
    plain = copy.deepcopy(network)(x)
    with DDrop(keep_min=0.1).attach(network):
        assert torch.equal(network(x), plain)


def test_eval_is_the_identity_and_noise_is_off_in_no_grad():
    network = _network()
    x, _ = _data()
    twin = copy.deepcopy(network)
    with DDrop(keep_min=0.1, keep_max=0.2).attach(network):
        with torch.no_grad():
            assert torch.equal(network(x), twin(x))
        assert not torch.equal(network(x), twin(x))
        network.eval()
        twin.load_state_dict(network.state_dict())
        assert torch.equal(network(x), twin.eval()(x))


def test_the_penalty_is_lambda_times_the_l1_norm_with_subgradient_zero_at_zero():
    network = _network()
    with torch.no_grad():
        network.bn1.weight[:3] = torch.tensor([0.0, -2.0, 3.0])
    spec = DDrop(l1=0.125)
    with spec.attach(network) as attachment:
        penalty = attachment.penalty()
        gammas = [network.get_parameter(n) for n in find_targets(network, kind="norm").names]
        assert float(penalty.detach()) == pytest.approx(0.125 * sum(float(g.detach().abs().sum()) for g in gammas))
        penalty.backward()
        for gamma in gammas:
            assert torch.equal(gamma.grad, 0.125 * gamma.detach().sign())
        assert network.bn1.weight.grad[:3].tolist() == [0.0, -0.125, 0.125]
        assert network.bn1.bias.grad is None
        assert network.stem.weight.grad is None
    with DDrop(l1=0.0).attach(network) as attachment:
        assert attachment.penalty() == 0.0


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_schedule_moves_both_bounds_once_an_epoch(schedule):
    network = _network()
    spec = DDrop(keep_min=0.2, keep_max=0.6, schedule=schedule, l1=0.0)
    steps, per_epoch = 8, 2
    target = find_targets(network, kind="norm")["bn1.weight"]
    with spec.attach(network) as attachment:
        for step in range(steps):
            network(_data()[0])
            attachment.after_step(Progress(step + 1, steps, per_epoch))
            epochs_done = (step + 1) // per_epoch
            low, high = (keep_prob_at(p, schedule, epochs_done / 4) for p in (0.2, 0.6))
            gamma = network.bn1.weight.detach().abs()
            torch.testing.assert_close(attachment._keep()[target.name], keep_probabilities(gamma, low, high))
    assert high == pytest.approx(0.6)
    assert math.isclose(low, 0.2)


def test_the_schedule_starts_with_everything_kept():
    network = _network()
    x, _ = _data()
    plain = copy.deepcopy(network)(x)
    with DDrop(keep_min=0.1, keep_max=0.1, schedule="cosine").attach(network):
        assert torch.equal(network(x), plain)


def test_a_subset_of_norms():
    network = _network()
    inner = find_targets(network, include=["bn1"], kind="norm")
    with DDrop(keep_min=0.1, keep_max=0.2, l1=1.0).attach(network, inner) as attachment:
        network(_data()[0])
        assert list(attachment._masks) == ["bn1.weight"]
        assert float(attachment.penalty().detach()) == pytest.approx(float(network.bn1.weight.detach().abs().sum()))


def test_bf16_networks_train_under_ddrop():
    network = _network().bfloat16()
    x, y = _data()
    with DDrop(keep_min=0.2).attach(network) as attachment:
        (F.cross_entropy(network(x.bfloat16()), y) + attachment.penalty()).backward()
        attachment.after_step(Progress(1, 2, 1))
    assert all(p.grad.dtype == torch.bfloat16 for p in network.parameters())


def test_keyword_arguments_and_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = _network()

        def forward(self, *, scale, image):
            return self.net(image) * scale

    network = Two().train()
    with DDrop(keep_min=0.2).attach(network) as attachment:
        network(scale=2.0, image=_data(4)[0])
        assert attachment._masks["net.bn0.weight"].shape == (4, 6)


def test_a_network_that_folds_frames_into_the_batch_gets_one_clear_line():
    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.conv(x.flatten(0, 1))).mean((1, 2, 3))

    model, x = Frames(), torch.randn(2, 3, 1, 8, 8)
    with (
        DDrop().attach(model),
        pytest.raises(UsageError, match=r'"norm" sees 6 .* has 2.*per_sample'),
    ):
        model(x)
    with DDrop(per_sample=False).attach(model):
        model(x)
