"""Monte-Carlo prediction: what is noisy, what stays as it was, attachments, refusals."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.analysis.mc_dropout import mc_predict
from secateur.core.duration import Progress
from secateur.errors import DataError, NoEffectError, UsageError
from secateur.regularizers.ddrop import DDrop
from secateur.regularizers.ddrop_scale import DDropScale
from secateur.regularizers.dropout import Dropout
from secateur.regularizers.mask_pool import MaskPoolDropout
from secateur.regularizers.network_slimming import NetworkSlimming
from secateur.regularizers.pgmpf import PGMPF
from secateur.regularizers.targeted_dropout import TargetedDropout
from secateur.testing.snapshots import generators, same_structure, same_values, structure, values


def _x(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _network(rate=0.5):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout2d(rate), nn.Flatten(), nn.Linear(54, 4)
    )
    nn.init.normal_(network[1].weight)
    return network


NOISY = [
    DDrop(keep_min=0.3, keep_max=0.8),
    DDrop(keep_min=0.3, keep_max=0.8, scores="weight_norm", l1=0.0, per_sample=False),
    DDropScale(keep_min=0.3, keep_max=0.8),
    MaskPoolDropout(),
    Dropout(drop_rate=0.4),
    TargetedDropout(granularity="unit"),
]


def test_the_model_and_the_global_generators_come_back():
    network = _network().train()
    network[1].eval()
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    shape, state, before = structure(network), copy.deepcopy(values(network)), generators()
    mc_predict(network, _x(5, 2, 5, 5), passes=4)
    same_structure("after", shape, structure(network))
    same_values("after", state, values(network))
    assert before == generators()
    with pytest.raises(RuntimeError):
        mc_predict(network, _x(5, 3, 5, 5), passes=4)
    same_structure("after an error", shape, structure(network))
    assert before == generators()
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.is_grad_enabled()


def test_one_seed_one_answer():
    network, x = _network(), _x(5, 2, 5, 5)
    first, again, other = (mc_predict(network, x, passes=4, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.mean, again.mean)
    assert torch.equal(first.variance, again.variance)
    assert not torch.equal(first.mean, other.mean)
    assert not first.mean.requires_grad


def test_batch_norm_keeps_to_its_statistics():
    """The answer for a sample does not depend on the others: with the noise off it is that of eval mode."""
    network, x = _network(1e-7).eval(), _x(5, 2, 5, 5)
    got = mc_predict(network.train(), x, passes=3)
    torch.testing.assert_close(got.mean, network.eval()(x))
    assert float(got.variance.max()) < 1e-10


def test_batches_are_concatenated_and_labels_left_out():
    network = _network()
    batches = [(_x(3, 2, 5, 5), torch.zeros(3)), (_x(2, 2, 5, 5, seed=1), torch.zeros(2))]
    got = mc_predict(network, iter(batches), passes=4)
    inputs_only = mc_predict(network, [b[0] for b in batches], passes=4)
    assert got.mean.shape == got.variance.shape == (5, 4)
    assert torch.equal(got.mean, inputs_only.mean)
    one = mc_predict(network, batches[0][0], passes=4)
    assert torch.equal(one.mean, got.mean[:3])


def test_a_transform_is_averaged():
    network, x = _network(), _x(5, 2, 5, 5)
    got = mc_predict(network, x, passes=20, transform=lambda y: y.softmax(1))
    torch.testing.assert_close(got.mean.sum(1), torch.ones(5))
    assert not torch.allclose(got.mean, mc_predict(network, x, passes=20).mean.softmax(1))


class _Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class _Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 4, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0]


@pytest.mark.parametrize(
    "make",
    [
        _Attention,
        _Recurrent,
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True),
        lambda: nn.Sequential(nn.AlphaDropout(0.5)),
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.LayerNorm(8)),
    ],
)
def test_all_kinds_of_dropout_are_noisy(make):
    torch.manual_seed(0)
    network = make().eval()
    got = mc_predict(network, _x(3, 5, 8), passes=10)
    assert float(got.variance.max()) > 1e-4
    assert not any(m.training for m in network.modules())


@pytest.mark.parametrize("spec", NOISY, ids=str)
def test_attachments_are_noisy_and_leave_no_trace(spec):
    network, x = _network(0.0).train(), _x(5, 2, 5, 5)
    with spec.attach(network, seed=1) as attachment:
        network(x).sum().backward()
        attachment.after_step(Progress(1, 4, 2))
        shape, state = structure(network.eval()), copy.deepcopy(values(network))
        stream = attachment.state_dict()
        plain = network(x).detach()
        got, again, other = (mc_predict(network, x, passes=6, seed=s, attachments=[attachment]) for s in (3, 3, 4))
        assert torch.equal(got.mean, again.mean)
        assert not torch.equal(got.mean, other.mean)
        assert float(got.variance.max()) > 1e-4
        # Training would go on as if nothing had been.
        assert all(torch.equal(stream[k], v) for k, v in attachment.state_dict().items())
        assert torch.equal(network(x), plain)
        same_structure("after", shape, structure(network))
        same_values("after", state, values(network))
        assert not attachment.is_sampling


def test_training_is_the_same_with_and_without_predictions_in_between():
    def train(predict):
        network = _network(0.0).train()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        with TargetedDropout(granularity="unit", gamma=0.5).attach(network, seed=1) as attachment:
            for step in range(4):
                optimizer.zero_grad()
                network(_x(5, 2, 5, 5, seed=step)).square().mean().backward()
                optimizer.step()
                attachment.after_step(Progress(step + 1, 4, 2))
                if predict:
                    mc_predict(network, _x(5, 2, 5, 5), passes=3, attachments=[attachment])
        return network.state_dict()

    for a, b in zip(train(False).values(), train(True).values(), strict=True):
        assert torch.equal(a, b)


def test_every_pass_draws_anew():
    """The mean of many passes is the plain output: unit dropout of a linear layer's weights is unbiased."""
    torch.manual_seed(0)
    network, x, passes = nn.Sequential(nn.Linear(6, 10, bias=False)), _x(2, 6), 1500
    with Dropout(drop_rate=0.5, granularity="unit").attach(network) as attachment:
        got = mc_predict(network, x, passes=passes, attachments=[attachment])
    plain = network(x).detach()
    # A factor of 0 or 2: the standard deviation is |y|.
    assert bool(((got.mean - plain).abs() <= 5 * plain.abs() / passes**0.5).all())
    torch.testing.assert_close(got.variance, plain**2, rtol=0.02, atol=1e-6)


def test_sampling_by_hand_in_eval_mode_with_a_model_that_fails():
    network, x = _network(0.0).eval(), _x(5, 2, 5, 5)
    with Dropout().attach(network) as attachment:
        plain = network(x)
        with attachment.sampling(seed=2):
            assert not torch.equal(network(x), network(x))
            with pytest.raises(RuntimeError):
                network(x[:, :1])
        assert torch.equal(network(x), plain)


def test_two_attachments_at_once():
    network, x = _network(0.0), _x(5, 2, 5, 5)
    with Dropout().attach(network) as first, DDrop(keep_min=0.5).attach(network) as second:
        both = mc_predict(network, x, passes=5, attachments=[first, second])
        one = mc_predict(network, x, passes=5, attachments=[first])
        assert not torch.equal(both.mean, one.mean)


def test_no_output_is_kept():
    alive = []

    def watched(output):
        weakly = weakref.ref(output)
        assert sum(w() is not None for w in alive) <= 1
        alive.append(weakly)
        return output

    mc_predict(nn.Sequential(nn.Dropout(0.5)), torch.ones(5, 4), passes=30, transform=watched)
    assert len(alive) == 30


def test_low_precision_outputs_are_gathered_in_float32():
    got = mc_predict(nn.Sequential(nn.Dropout(0.5)).bfloat16(), torch.ones(2, 3, dtype=torch.bfloat16), passes=3)
    assert got.mean.dtype == got.variance.dtype == torch.float32


class _Own(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


def test_refusals():
    network, x = _network(), _x(5, 2, 5, 5)
    for model in (nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Dropout(0.0)), _Own()):
        with pytest.raises(NoEffectError, match="every pass would be the same"):
            mc_predict(model, torch.ones(1, 2))
    network[3].p = 0.0
    for method in (NetworkSlimming(), PGMPF()):
        with method.attach(network) as silent, pytest.raises(NoEffectError):
            mc_predict(network, x, attachments=[silent])
    network[3].p = 0.5
    with pytest.raises(UsageError, match="passes is at least 2, got 1"):
        mc_predict(network, x, passes=1)
    with pytest.raises(UsageError, match="precision is positive"):
        mc_predict(network, x, precision=0.0)
    with pytest.raises(DataError, match="batches are empty"):
        mc_predict(network, [])
    with pytest.raises(UsageError, match="output is a tuple"):
        mc_predict(nn.Sequential(nn.Dropout(0.5), nn.RNN(4, 4)), torch.ones(2, 3, 4))
    with Dropout().attach(network) as attachment, pytest.raises(UsageError, match="another object"):
        mc_predict(copy.deepcopy(network), x, attachments=[attachment])
