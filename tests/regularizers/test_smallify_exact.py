"""Smallify in networks: gradients, gates that stay closed, folding, resuming, errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.core.duration import Progress
from secateur.errors import CheckpointError, UsageError
from secateur.regularizers.smallify import Smallify
from secateur.testing import check_regularizer

BOTH = pytest.mark.parametrize("granularity", ["unit", "weight"])


def _network():
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.ConvTranspose2d(4, 4, 2, groups=2), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(36, 3)).double()


@BOTH
def test_gradients_of_loss_and_penalty_against_finite_differences(granularity):
    network, x = _network(), torch.randn(5, 2, 4, 4).double()
    attachment = Smallify(granularity=granularity, factor=0.3).attach(network, seed=1)
    with torch.no_grad():
        for parameter in attachment.learned.values():
            parameter.view(-1)[::2].neg_()

    def total():
        return network(x).square().mean() + attachment.penalty()

    total().backward()
    for name, parameter in network.named_parameters():
        flat = parameter.data.view(-1)
        for index in range(0, flat.numel(), max(1, flat.numel() // 7)):
            here, values = flat[index].item(), []
            for step in (1e-6, -1e-6):
                flat[index] = here + step
                values.append(total().item())
            flat[index] = here
            numeric = (values[0] - values[1]) / 2e-6
            assert parameter.grad.view(-1)[index].item() == pytest.approx(numeric, rel=1e-5, abs=1e-8), name


@BOTH
def test_a_strong_penalty_closes_gates_for_good_and_folding_keeps_the_function(granularity):
    network, x = _network(), torch.randn(16, 2, 4, 4).double()
    attachment = Smallify(granularity=granularity, factor=0.01).attach(network, seed=1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.3, momentum=0.9)
    closed: dict[str, torch.Tensor] = {}
    for step in range(1, 61):
        optimizer.zero_grad()
        (nn.functional.mse_loss(network(x), x.flatten(1)[:, :3]) + attachment.penalty()).backward()
        optimizer.step()
        attachment.after_step(Progress(step, 60, 60))
        for name, gate in attachment.learned.items():
            now = gate.detach() == 0
            assert not bool((closed.get(name, now) & ~now).any()), f"{name} came back"
            closed[name] = now
    attached = network.eval()(x)
    scores = attachment.scores()
    masks = attachment.finalize()
    assert 0 < masks.sparsity < 1
    torch.testing.assert_close(network(x), attached, rtol=1e-9, atol=1e-12)
    for name, mask in masks.items():
        assert bool((network.get_parameter(name)[~mask] == 0).all())
        if granularity == "weight":
            assert torch.equal(scores[name] > 0, mask)


def test_a_negative_gate_folds_with_its_sign():
    layer = nn.Linear(3, 2).double()
    x = torch.randn(4, 3).double()
    attachment = Smallify().attach(layer)
    with torch.no_grad():
        attachment.learned["smallify_gate"].copy_(torch.tensor([-0.5, 0.25]))
    attached = layer(x)
    attachment.finalize()
    torch.testing.assert_close(layer(x), attached, rtol=1e-12, atol=1e-12)


def test_state_resumes_and_a_state_of_other_gates_is_refused():
    layer = nn.Linear(3, 2)
    with Smallify().attach(layer, seed=1) as attachment:
        with torch.no_grad():
            attachment.learned["smallify_gate"].copy_(torch.tensor([-0.5, 0.25]))
        attachment.after_step(Progress(1, 9, 1))
        saved = attachment.state_dict()
        attachment.after_step(Progress(2, 9, 1))
        assert attachment.state_dict()["killed/weight"].tolist() == [True, False]
        # What was saved does not move on.
        assert saved["killed/weight"].tolist() == [False, False]
    with Smallify().attach(layer, seed=2) as attachment:
        attachment.load_state_dict(saved)
        assert attachment.progress.step == 1
        torch.testing.assert_close(attachment.state_dict()["variance/weight"], torch.tensor([0.4, 0.0]))
    weights = Smallify(granularity="weight").attach(layer)
    with weights, pytest.raises(CheckpointError, match=r"saved mean/weight has shape \[2\], expected \[2, 3\]"):
        weights.load_state_dict(saved)


def test_gates_depend_on_seed_and_name_alone():
    starts = []
    for seed in (0, 0, 1):
        with Smallify().attach(_network(), seed=seed) as attachment:
            starts.append([p.detach().clone() for p in attachment.learned.values()])
    assert all(torch.equal(a, b) for a, b in zip(starts[0], starts[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(starts[0], starts[2], strict=True))
    assert not torch.equal(starts[0][0], starts[0][1])


@BOTH
def test_other_settings_keep_the_contract(granularity):
    check_regularizer(Smallify(granularity=granularity, factor=0.05, decay=0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factor": -1.0}, "factor is at least 0, got -1.0"),
        ({"granularity": "filter"}, 'unknown smallify granularity "filter"'),
        ({"decay": 1.0}, r"decay lies in \[0, 1\), got 1.0"),
        ({"threshold": 0.0}, r"threshold lies in \(0, 1\], got 0.0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        Smallify(**settings)


def test_no_factor_no_penalty():
    with Smallify(factor=0.0).attach(nn.Linear(3, 2)) as attachment:
        assert attachment.penalty() == 0.0
