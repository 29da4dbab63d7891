"""The two-layer linear network of the worked numbers, and its derivatives in NumPy."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

W1, W2, X, Y = np.array([[1.0, 2.0], [-1.0, 1.0]]), np.array([[1.0, -2.0]]), np.array([1.0, 1.0]), 1.0


def network():
    built = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        built[0].weight.copy_(torch.tensor(W1))
        built[1].weight.copy_(torch.tensor(W2))
    return built


def batches(copies=(1,)):
    return [(torch.tensor(X).expand(n, 2), torch.full((n,), Y)) for n in copies]


def half_squares(outputs, labels):
    return 0.5 * (outputs[:, 0] - labels).square().mean()


def split(vector):
    """Six numbers, in the order of the parameters, as the two weights."""
    return vector[:4].reshape(2, 2), vector[4:].reshape(1, 2)


def derivatives():
    """Output, gradient and Hessian of L = (f - y)^2 / 2, f = W2 W1 x, over (W1, W2) flattened."""
    f = float((W2 @ W1 @ X)[0])
    slope = np.concatenate([np.outer(W2[0], X).ravel(), W1 @ X])
    curvature = np.zeros((6, 6))
    for i in range(2):
        for j in range(2):
            # f is bilinear: only pairs W1[i, j], W2[i] have a second derivative, x[j].
            curvature[2 * i + j, 4 + i] = curvature[4 + i, 2 * i + j] = X[j]
    return f, (f - Y) * slope, np.outer(slope, slope) + (f - Y) * curvature
