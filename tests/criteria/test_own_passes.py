"""Evidence that takes passes of its own: Hessian-gradient product, synaptic flow, ablation loss; and learned scores."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.core.duration import Progress
from secateur.core.granularity import Unit
from secateur.core.targets import find_targets
from secateur.criteria.apoz import APoZ
from secateur.criteria.driver import cell_scores, gather_evidence, score_targets
from secateur.criteria.grasp import Grasp
from secateur.criteria.lamp import Lamp
from secateur.criteria.learned import Learned
from secateur.criteria.mean_activation import MeanActivation
from secateur.criteria.oracle import Oracle
from secateur.criteria.snip import Snip
from secateur.criteria.synflow import SynFlow
from secateur.criteria.wanda import Wanda
from secateur.errors import DataError, UsageError
from secateur.regularizers.targeted_dropout import TargetedDropout
from secateur.sparsify.ranking import rank, rank_units
from secateur.surgery.engine import trace_groups
from secateur.testing import check_criterion

NEW = [
    Lamp(),
    APoZ(),
    APoZ(per_map=True),
    MeanActivation(order="maximum"),
    Snip(),
    Grasp(),
    SynFlow(),
    Wanda(),
    Oracle(),
]
WITH_DATA = [c for c in NEW if not isinstance(c, Lamp)]
WITH_LABELS = [Snip(), Grasp(), Oracle()]


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.hidden, self.drop, self.head = nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)), inplace=True)
        return self.head(self.drop(F.gelu(self.hidden(F.max_pool2d(x, 2).mean((2, 3))))))


def _network():
    torch.manual_seed(1)
    network = Small()
    for tensor in (network.norm.weight, network.norm.bias, network.norm.running_mean):
        nn.init.normal_(tensor)
    return network.double().train()


def _data(sizes=(4, 3, 4)):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(sum(sizes), 2, 6, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (sum(sizes),), generator=generator)
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def _score(criterion, network=None, batches=None, **options):
    network = network or _network()
    targets = find_targets(network)
    return score_targets(network, targets, [criterion], batches=batches if batches is not None else _data(), **options)[
        0
    ]


def _as_before(network):
    state = {n: t.detach().clone() for n, t in network.state_dict().items()}
    modes, flags = [m.training for m in network.modules()], [p.requires_grad for p in network.parameters()]
    identities = [id(t) for t in (*network.parameters(), *network.buffers())]
    gradients = [p.grad for p in network.parameters()]

    def check():
        assert all(torch.equal(t, state[n]) for n, t in network.state_dict().items())
        assert [m.training for m in network.modules()] == modes
        assert [p.requires_grad for p in network.parameters()] == flags
        assert [id(t) for t in (*network.parameters(), *network.buffers())] == identities
        assert all(a is b for a, b in zip(gradients, (p.grad for p in network.parameters()), strict=True))

    return check


@pytest.mark.parametrize("criterion", NEW, ids=str)
def test_contract(criterion):
    check_criterion(criterion, informed=False if criterion == MeanActivation(order="maximum") else None)


@pytest.mark.parametrize("criterion", NEW, ids=str)
def test_any_split_into_batches_gives_the_same_scores(criterion):
    whole = _score(criterion, batches=_data([11]))
    for sizes in ([1] * 11, [2, 9], [0, 5, 0, 6]):
        parts = [(x, y) for x, y in zip(*(t.split(sizes) for t in _data([11])[0]), strict=True)]
        for batches in (parts, iter(parts)):
            for name, score in _score(criterion, batches=batches).items():
                torch.testing.assert_close(score, whole[name])


@pytest.mark.parametrize("criterion", WITH_DATA, ids=str)
def test_the_network_is_scored_in_eval_mode_and_left_alone(criterion):
    network = _network()
    network.hidden.weight.requires_grad_(False)
    network.norm.eval()
    check, random_state = _as_before(network), torch.get_rng_state()
    scores = _score(criterion, network)
    check()
    assert torch.equal(torch.get_rng_state(), random_state)
    with torch.no_grad():
        again = _score(criterion, network.eval())
    for name, score in scores.items():
        assert not score.requires_grad
        torch.testing.assert_close(score, again[name], rtol=0, atol=0)


@pytest.mark.parametrize("criterion", [Snip(), Grasp(), SynFlow(), Oracle()], ids=str)
def test_an_error_in_the_pass_puts_everything_back(criterion):
    network = _network()
    network.conv.weight.requires_grad_(False)
    check = _as_before(network)

    def broken():
        yield torch.ones(2, 3, 6, 6).double(), torch.zeros(2).long()

    with pytest.raises(RuntimeError):
        _score(criterion, network, broken())
    check()
    calls = []

    def fails_later(outputs, labels):
        calls.append(1)
        if len(calls) > 3:
            raise ZeroDivisionError
        return F.cross_entropy(outputs, labels)

    if criterion in (Grasp(), Oracle()):
        with pytest.raises(ZeroDivisionError):
            _score(criterion, network, loss=fails_later)
        check()


@pytest.mark.parametrize("criterion", WITH_DATA, ids=str)
def test_missing_data_is_told(criterion):
    network = _network()
    with pytest.raises(UsageError, match="need data; pass batches"):
        score_targets(network, find_targets(network), [criterion])
    with pytest.raises(DataError, match="batches are empty"):
        _score(criterion, network, batches=[])
    if criterion in WITH_LABELS:
        with pytest.raises(UsageError, match="need labels"):
            _score(criterion, network, batches=[_data()[0][0]])
        wild = [(torch.full((2, 2, 6, 6), float("nan")).double(), torch.zeros(2).long())]
        with pytest.raises(DataError, match="loss is nan after 0 samples"):
            _score(criterion, network, batches=wild)


@pytest.mark.parametrize("criterion", WITH_DATA, ids=str)
def test_a_layer_the_data_never_reaches_is_named(criterion):
    network = _network()
    network.unused = nn.Linear(2, 2).double()
    if criterion == Oracle():
        # The loss without a unit that does nothing is the loss.
        scores = _score(criterion, network)["unused.weight"]
        assert len(set(scores.tolist())) == 1
        return
    with pytest.raises(UsageError, match=r'layer "unused.weight" cannot be scored'):
        _score(criterion, network)


def test_one_call_serves_them_all():
    network = _network()
    targets = find_targets(network)
    # An iterator that can be read once.
    together = score_targets(network, targets, NEW, batches=iter(_data()))
    for criterion, scores in zip(NEW, together, strict=True):
        for name, score in _score(criterion, network).items():
            torch.testing.assert_close(scores[name], score)


# Hessian times gradient.


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_hessian_gradient_is_the_full_hessian_times_the_gradient(temperature):
    network = _network()
    (x, y), targets = _data([11])[0], find_targets(network)
    names, shapes = targets.names, [t.shape for t in targets]
    flat = torch.cat([p.detach().flatten() for p in targets.tensors(network).values()])
    frozen = copy.deepcopy(network).eval()

    def value(vector):
        parts = vector.split([t.numel for t in targets])
        tensors = {n: p.reshape(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(frozen, tensors, (x,)) / temperature, y)

    gradient = torch.autograd.functional.jacobian(value, flat)
    expected = (torch.autograd.functional.hessian(value, flat) @ gradient).split([t.numel for t in targets])
    got = gather_evidence(network, targets, frozenset({"hessian_gradient"}), batches=_data(), temperature=temperature)
    for target, numbers in zip(targets, expected, strict=True):
        torch.testing.assert_close(got[target.name].hessian_gradient, numbers.reshape(target.shape))


def test_the_score_is_half_the_change_of_the_squared_gradient_norm():
    """Finite differences: d/dw of |g|^2 / 2 is H g, so the score is -(d/de) |g(w (1 - e))|^2 / 2 at e = 0."""
    network = _network()
    scores = _score(Grasp(temperature=2.0), network)

    def half_norm():
        parameters = list(find_targets(network).tensors(network).values())
        total = [torch.zeros_like(p) for p in parameters]
        for x, y in _data():
            value = F.cross_entropy(network.eval()(x) / 2.0, y) * len(y) / 11
            for t, g in zip(total, torch.autograd.grad(value, parameters), strict=True):
                t += g
        return 0.5 * sum(float(t.square().sum()) for t in total)

    for name, index in (("conv.weight", (1, 0, 2, 1)), ("hidden.weight", (3, 2)), ("head.weight", (0, 4))):
        weight, step = network.get_parameter(name), 1e-5
        value, ends = float(weight[index].detach()), []
        for factor in (1 + step, 1 - step):
            with torch.no_grad():
                weight[index] = value * factor
            ends.append(half_norm())
        with torch.no_grad():
            weight[index] = value
        assert float(scores[name][index]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-12)


def test_hessian_gradient_through_attention():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))

    torch.manual_seed(0)
    network, batches = Attention(), [(torch.randn(4, 3, 8), torch.arange(4) % 3)]
    targets = find_targets(network)
    for criterion in (Grasp(), Snip(), Oracle()):
        (scores,) = score_targets(network, targets, [criterion], batches=batches)
        assert bool(scores["attention.in_proj_weight"].abs().sum() > 0)
    with pytest.raises(UsageError, match=r'layer "attention" is attention, which is not linear'):
        score_targets(network, targets, [SynFlow()], batches=batches)


def test_a_layer_without_second_derivative_is_told():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return gradient * 2

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(Once.apply(self.fc(x)))

    with pytest.raises(UsageError, match="no second derivative"):
        _score(Grasp(), Net(), [(torch.randn(4, 3), torch.zeros(4).long())])


def test_a_loss_that_ends_without_second_derivative_is_told():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return 2 * ctx.saved_tensors[0] * gradient

    batches = [(torch.randn(4, 3), torch.zeros(4).long())]
    with pytest.raises(UsageError, match="no second derivative"):
        _score(Grasp(), nn.Linear(3, 2), batches, loss=lambda f, y: Once.apply(f).mean())


def test_a_temperature_needs_one_tensor_of_logits():
    class Pair(nn.Linear):
        def forward(self, x):
            return {"logits": super().forward(x)}

    def loss(outputs, labels):
        return F.cross_entropy(outputs["logits"], labels)

    batches = [(torch.randn(4, 3), torch.arange(4) % 2)]
    with pytest.raises(UsageError, match="expected one tensor of logits"):
        _score(Grasp(), Pair(3, 2), batches, loss=loss)
    assert bool(_score(Grasp(temperature=1.0), Pair(3, 2), batches, loss=loss)["weight"].any())


# Synaptic flow.


def test_synaptic_flow_of_a_network_made_positive():
    network = _network()
    positive = copy.deepcopy(network).eval()
    with torch.no_grad():
        for tensor in (*positive.parameters(), *positive.buffers()):
            tensor.copy_(tensor.abs())
    positive(torch.ones(1, 2, 6, 6).double()).sum().backward()
    scores = _score(SynFlow(), network)
    for target in find_targets(network):
        weight = positive.get_parameter(target.name)
        torch.testing.assert_close(scores[target.name], (weight * weight.grad).detach().abs())


def test_synaptic_flow_reads_one_batch_and_float64_holds_it():
    layers = [layer for _ in range(40) for layer in (nn.Linear(64, 64, bias=False), nn.ReLU())]
    network = nn.Sequential(*layers)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(1.0)
    read = []

    def batches():
        for _ in range(3):
            read.append(1)
            yield torch.zeros(2, 64)

    scores = _score(SynFlow(), network, batches())
    assert len(read) == 1
    # 64^41 is far beyond float32.
    for score in scores.values():
        assert float(score.sum()) == pytest.approx(64.0**41)


@pytest.mark.parametrize(
    "inputs", [torch.zeros(2, 3).long(), {"x": torch.zeros(2, 3)}, [torch.zeros(2, 3)] * 3], ids=str
)
def test_synaptic_flow_needs_one_float_tensor(inputs):
    with pytest.raises(UsageError, match="needs batches of one float tensor"):
        _score(SynFlow(), nn.Linear(3, 2), [(inputs, torch.zeros(2).long())])


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(3, 3, bias=False)
            self.two = nn.Linear(3, 3, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(self.one(x))

    network = Tied().double()
    w = network.one.weight.detach().abs().requires_grad_()
    (torch.ones(1, 3).double() @ w.T @ w.T).sum().backward()
    (score,) = _score(SynFlow(), network, [torch.zeros(1, 3)]).values()
    torch.testing.assert_close(score, (w * w.grad).detach())


# Ablation.


def test_a_unit_behind_a_batch_norm_is_silent_when_ablated():
    network = _network()
    scores = _score(Oracle(), network)
    for unit in range(4):
        silent = copy.deepcopy(network).eval()
        silent.norm.register_forward_hook(lambda m, i, out, u=unit: out.index_fill(1, torch.tensor([u]), 0.0))
        with torch.no_grad():
            value = sum(len(y) * float(F.cross_entropy(silent(x), y)) for x, y in _data()) / 11
        assert float(scores["conv.weight"][unit]) == pytest.approx(value)


# Learned scores.


def test_learned_scores_are_handed_over_by_name():
    network = _network()
    targets = find_targets(network)
    per_unit = {t.name: torch.arange(t.units).flip(0) for t in targets}
    per_weight = {t.name: torch.randn(t.shape) for t in targets}
    for learned in (per_unit, per_weight):
        (scores,) = score_targets(network, targets, [Learned()], learned={**learned, "elsewhere": torch.zeros(2)})
        assert all(torch.equal(scores[n], learned[n]) for n in targets.names)
    cells = cell_scores(Learned(), Unit(), targets, per_weight)
    torch.testing.assert_close(cells["conv.weight"], per_weight["conv.weight"].flatten(1).mean(1))
    masks = rank(network, Learned(), granularity="unit", learned=per_unit).masks(0.5)
    assert masks["conv.weight"][:, 0, 0, 0].tolist() == [True, True, False, False]
    by_weight = rank(network, Learned(), learned=per_weight).masks(0.5)
    # 15 weights: the 7 lowest go.
    threshold = per_weight["head.weight"].flatten().sort().values[7]
    assert torch.equal(by_weight["head.weight"], per_weight["head.weight"] >= threshold)
    groups = trace_groups(network, torch.zeros(1, 2, 6, 6).double())
    kept = rank_units(network, Learned(), groups, learned=per_unit).kept(0.5)
    assert kept["conv.weight"].tolist() == [True, True, False, False]
    with pytest.raises(UsageError, match="use granularity unit"):
        rank(network, Learned(), learned=per_unit)


def test_missing_or_foreign_learned_scores_are_told():
    network = nn.Sequential(nn.Linear(3, 2))
    for learned in (None, {}):
        with pytest.raises(UsageError, match=r"pass learned=attachment.scores\(\)"):
            rank(network, Learned(), learned=learned)
    with pytest.raises(UsageError, match=r'no score of "0.weight"; got other'):
        rank(network, Learned(), learned={"other": torch.zeros(2)})
    with pytest.raises(UsageError, match=r"shape \[3\]; expected the parameter's \[2, 3\] or one per unit \[2\]"):
        rank(network, Learned(), learned={"0.weight": torch.zeros(3)})


# While training.


@pytest.mark.parametrize("criterion", NEW, ids=str)
def test_scoring_between_steps_of_an_attached_regularizer_sees_the_plain_network(criterion):
    network = _network()
    network.drop.p = 0.0
    twin = copy.deepcopy(network)
    with TargetedDropout().attach(network) as attachment:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for step, (x, y) in enumerate(_data()):
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
            attachment.after_step(Progress(step + 1, 3, 3))
            attached = _score(criterion, network)
            twin.load_state_dict(network.state_dict())
            for name, score in _score(criterion, twin).items():
                torch.testing.assert_close(attached[name], score)
