"""Second-order terms: worked numbers, finite differences in float64, pairs, nothing left behind, refusals."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from secateur.analysis.hessian import hessian_form
from secateur.analysis.weight_dependence import weight_dependence
from secateur.core.masks import Masks
from secateur.core.targets import find_targets
from secateur.errors import DataError, NoEffectError, UnknownNameError, UsageError
from secateur.testing.snapshots import same_structure, same_values, structure, values

THETA, H, G = np.array([0.5, -1.0]), np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([0.1, -0.2])


def _quadratic():
    """A network whose outputs are its two weights, and a loss with slope G and Hessian H there."""
    net = nn.Linear(2, 1, bias=False).double()
    net.weight.data = torch.tensor(THETA)[None]
    theta, h, g = torch.tensor(THETA), torch.tensor(H), torch.tensor(G)

    def loss(outputs, labels):
        away = outputs[:, 0] - theta
        return g @ away + 0.5 * away @ h @ away

    return net, [(torch.eye(2, dtype=torch.float64), torch.zeros(2))], loss


def _net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3), nn.Softplus(), nn.Linear(3, 2)
    ).double()


def _batches(sizes=(5, 2)):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 3, generator=generator, dtype=torch.float64), torch.randint(0, 2, (n,), generator=generator))
        for n in sizes
    ]


def _loss_at(net, batches, removed, step=1.0):
    moved = copy.deepcopy(net).eval()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        for name, d in removed.items():
            moved.get_parameter(name).sub_(step * d)
        return float(nn.functional.cross_entropy(moved(x), y))


def _removed(net):
    generator = torch.Generator().manual_seed(2)
    return {t.name: torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in find_targets(net)}


def test_d4_worked_numbers():
    net, batches, loss = _quadratic()
    d = np.array([THETA[0], 0.0])
    expected = abs(-G @ d + 0.5 * d @ H @ d)
    assert expected == pytest.approx(0.2)
    found = hessian_form(net, batches, Masks({"weight": torch.tensor([[False, True]])}), loss=loss)
    assert found.slope == pytest.approx(0.05)
    assert found.value == pytest.approx(0.5)
    assert abs(found.loss_change) == pytest.approx(expected)
    matrix = weight_dependence(net, batches, loss=loss).matrix
    np.testing.assert_allclose(matrix.numpy(), np.outer(THETA, THETA) * H, atol=1e-12)
    np.testing.assert_allclose(matrix.numpy(), [[0.5, -0.25], [-0.25, 1.0]], atol=1e-12)


def test_f1_the_gradient_as_direction():
    """H g is [[50, 50], [-76, -76]], [122, -16] in the worked example, g is [[2, 2], [-4, -4]], [6, 0]."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    net[0].weight.data = torch.tensor([[1.0, 2.0], [-1.0, 1.0]], dtype=torch.float64)
    net[1].weight.data = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    batches = [(torch.ones(1, 2, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))]
    g = {"0.weight": torch.tensor([[2.0, 2.0], [-4.0, -4.0]]), "1.weight": torch.tensor([[6.0, 0.0]])}
    found = hessian_form(net, batches, g, loss=lambda f, y: 0.5 * (f - y).square().mean(), pairs=True)
    assert found.slope == pytest.approx(76.0)
    assert found.layers == pytest.approx({"0.weight": 2 * 100 + 4 * 152, "1.weight": 6 * 122})
    assert found.value == pytest.approx(1540.0)
    assert sum(found.pairs.values()) == pytest.approx(1540.0)


def test_second_differences():
    net, batches = _net(), _batches()
    removed = _removed(net)
    found = hessian_form(net, batches, removed)
    step = 1e-4
    middle, left, right = (_loss_at(net, batches, removed, s) for s in (0.0, -step, step))
    assert found.slope == pytest.approx((left - right) / (2 * step), rel=1e-6)
    assert found.value == pytest.approx((left - 2 * middle + right) / step**2, rel=1e-5)


def test_what_is_left_over_is_of_third_order():
    net, batches = _net(), _batches()
    removed = _removed(net)
    errors = []
    for step in (0.02, 0.01):
        predicted = hessian_form(net, batches, {n: step * d for n, d in removed.items()}).loss_change
        errors.append(abs(_loss_at(net, batches, removed, step) - _loss_at(net, batches, removed, 0.0) - predicted))
    assert errors[0] / errors[1] == pytest.approx(8.0, rel=0.2)


def test_pairs_sum_to_layers_are_symmetric_and_are_blocks_of_the_matrix():
    net, batches = _net(), _batches()
    masks = Masks({t.name: torch.zeros(t.shape, dtype=torch.bool) for t in find_targets(net)})
    form, plain = hessian_form(net, batches, masks, pairs=True), hessian_form(net, batches, masks)
    assert plain.pairs is None
    assert form.layers == pytest.approx(plain.layers)
    whole = weight_dependence(net, batches)
    assert whole.matrix.shape == (30, 30)
    torch.testing.assert_close(whole.matrix, whole.matrix.T)
    for a in masks:
        assert sum(form.pairs[a, b] for b in masks) == pytest.approx(form.layers[a])
        for b in masks:
            assert form.pairs[a, b] == pytest.approx(form.pairs[b, a])
            assert form.pairs[a, b] == pytest.approx(float(whole.between(a, b).sum()))


def test_the_matrix_is_that_of_differences_of_gradients():
    net, batches = _net(), _batches()
    names, step = find_targets(net).names, 1e-5
    weights = torch.cat([net.get_parameter(n).detach().flatten() for n in names])

    def gradient(index, by):
        moved = copy.deepcopy(net).eval()
        flat = torch.cat([moved.get_parameter(n).detach().flatten() for n in names])
        flat[index] += by
        torch.nn.utils.vector_to_parameters(flat, [moved.get_parameter(n) for n in names])
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        value = nn.functional.cross_entropy(moved(x), y)
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, [moved.get_parameter(n) for n in names])])

    rows = [(gradient(i, step) - gradient(i, -step)) / (2 * step) for i in range(len(weights))]
    expected = torch.stack(rows) * weights[:, None] * weights
    torch.testing.assert_close(weight_dependence(net, batches).matrix, expected, rtol=1e-5, atol=1e-8)


def test_weights_at_zero_depend_on_nothing():
    net, batches = _net(), _batches()
    net[0].weight.data[1] = 0.0
    matrix = weight_dependence(net, batches).matrix
    assert not matrix[3:6].any()
    assert not matrix[:, 3:6].any()


def test_a_loss_linear_in_the_weights_has_no_second_order():
    net = nn.Linear(2, 1, bias=False)
    batches = [(torch.ones(2, 2), torch.zeros(2))]
    found = hessian_form(net, batches, {"weight": torch.ones(1, 2)}, loss=lambda f, y: f.mean())
    assert (found.slope, found.value) == (2.0, 0.0)
    assert not weight_dependence(net, batches, loss=lambda f, y: f.mean()).matrix.any()


@pytest.mark.parametrize("analysis", [weight_dependence, lambda n, b: hessian_form(n, b, _removed(n), pairs=True)])
def test_the_network_comes_back(analysis):
    net, batches = _net().train(), _batches()
    net[0].weight.requires_grad_(False)
    net[3].weight.grad = torch.ones_like(net[3].weight)
    shape, state = structure(net), copy.deepcopy(values(net))
    with torch.no_grad():
        analysis(net, batches)
    with pytest.raises(RuntimeError):
        analysis(net, [(torch.zeros(2, 5), torch.zeros(2, dtype=torch.long))])
    same_structure("after", shape, structure(net))
    same_values("after", state, values(net))


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class _Detached(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net[5](self.net[:5](x).detach())


def test_refusals():
    net, batches = _net(), _batches()
    removed = _removed(net)
    with pytest.raises(DataError, match="empty"):
        hessian_form(net, [], removed)
    with pytest.raises(UsageError, match="need labels"):
        weight_dependence(net, [batches[0][0]])
    with pytest.raises(NoEffectError, match="nothing is removed"):
        hessian_form(net, batches, Masks({"0.weight": torch.ones(4, 3, dtype=torch.bool)}))
    with pytest.raises(UnknownNameError, match="unknown parameter"):
        hessian_form(net, batches, {"9.weight": torch.ones(1)})
    with pytest.raises(UsageError, match=r"shape \[1\], expected \[4, 3\]"):
        hessian_form(net, batches, {"0.weight": torch.ones(1)})
    with pytest.raises(DataError, match=r'removed from "0\.weight" is not finite'):
        hessian_form(net, batches, {"0.weight": torch.full((4, 3), torch.nan)})
    with pytest.raises(DataError, match="loss is nan"):
        hessian_form(net, [(batches[0][0] * torch.nan, batches[0][1])], removed)
    with pytest.raises(UsageError, match="30 weights make a matrix of 30 x 30, the limit is 29"):
        weight_dependence(net, batches, limit=29)
    with pytest.raises(UnknownNameError, match='unknown layer "0"'):
        weight_dependence(net, batches).between("0", "3.weight")
    with pytest.raises(UsageError, match="once_differentiable"):
        hessian_form(net, batches, removed, loss=lambda f, y: _Once.apply(f).mean())
    both = {f"net.{name}": removed[name] for name in ("0.weight", "5.weight")}
    with pytest.raises(UsageError, match=r'no gradient reaches "net\.0\.weight"'):
        hessian_form(_Detached(net), batches, both)
