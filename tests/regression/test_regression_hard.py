"""Tables on which other fits lose time, digits or the optimum; the gradient judges each fit."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax

from softjax import regression

pytestmark = [
    pytest.mark.compiled_quickly,
    pytest.mark.x64_once(True),
    pytest.mark.usefixtures("compiled_fits"),
]


def relative_gradient(params, x, targets, l1=0.0, l2=0.0):
    """The largest entry of the smallest subgradient, relative to what it can be."""
    kernel, bias = (np.asarray(leaf, np.float64) for leaf in params)
    p = np.exp(log_softmax(x @ kernel + bias, 1))
    mass = targets.sum(1, keepdims=True)
    residual = (mass * p - targets) / mass.sum()
    g = x.T @ residual + l2 * kernel
    zero = kernel == 0
    held = np.sign(g) * np.maximum(np.abs(g) - l1, 0)
    g = np.where(zero & (l1 > 0), held, g + l1 * np.sign(kernel))
    size = np.sqrt((mass * x**2).sum(0) / mass.sum())
    return max(np.abs(g / size[:, None]).max(), np.abs(residual.sum(0)).max())


def drawn(examples, width, num_classes, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(examples, width))
    kernel = rng.normal(size=(width, num_classes)) / width**0.5
    labels = np.argmax(x @ kernel + rng.gumbel(size=(examples, num_classes)), 1)
    labels[:num_classes] = np.arange(num_classes)
    return x, labels


@pytest.mark.parametrize("grouped", [False, True])
def test_as_many_features_as_examples_with_a_weak_l1(grouped):
    """C = 1 in l1 is l1 = 1 / N: nearly separated, and far from the start."""
    x, labels = drawn(20, 20, 3)
    result = regression.fit(x, labels, l1=1 / 20, grouped=grouped, tol=1e-9)
    assert result.converged
    if not grouped:
        assert relative_gradient(result.params, x, np.eye(3)[labels], l1=1 / 20) < 1e-8


@pytest.mark.parametrize("penalty", [{"l2": 0.01}, {"l1": 0.01}, {"l1": 0.01, "l2": 0.01}])
def test_ten_times_as_many_features_as_examples(penalty):
    x, labels = drawn(50, 500, 10)
    result = regression.fit(x, labels, tol=1e-7, **penalty)
    assert result.converged
    assert relative_gradient(result.params, x, np.eye(10)[labels], **penalty) < 1e-6


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("penalty", [{}, {"l2": 1e-3}, {"l1": 1e-3}])
def test_features_in_their_natural_units(dtype, penalty):
    """Years, kelvins, pascals, a share and a code of 0 or 1."""
    rng = np.random.default_rng(3)
    z = rng.normal(size=(400, 5))
    x = z * [12.0, 4.0, 900.0, 0.01, 1.0] + [1985.0, 290.0, 101325.0, 0.5, 0.0]
    x[:, 4] = x[:, 4] > 0
    labels = np.argmax(z @ rng.normal(size=(5, 3)) + rng.gumbel(size=(400, 3)), 1)
    x = x.astype(dtype)
    result = regression.fit(x, labels, tol=1e-6 if dtype == np.float32 else 1e-9, **penalty)
    assert result.converged
    bound = 5e-6 if dtype == np.float32 else 1e-8
    wide = x.astype(np.float64)
    assert relative_gradient(result.params, wide, np.eye(3)[labels], **penalty) < bound


def test_many_classes_of_which_most_occur_once():
    rng = np.random.default_rng(0)
    num_classes = 300
    labels = np.append(np.arange(num_classes), rng.integers(0, 20, 200))
    x = rng.normal(size=(num_classes, 3))[labels] + rng.normal(size=(len(labels), 3))
    result = regression.fit(x, labels, l2=1e-3, tol=1e-6)
    assert result.converged
    kernel, bias = map(np.asarray, result.params)
    assert np.isfinite(kernel).all()
    p = np.exp(log_softmax(x @ kernel + bias, 1))
    p[np.arange(len(labels)), labels] -= 1
    gradient = x.T @ p / len(x) + 1e-3 * kernel
    assert np.abs(gradient / np.sqrt((x**2).mean(0))[:, None]).max() < 2e-6
    assert np.abs(p.mean(0)).max() < 2e-6


def test_two_classes_are_a_logistic_regression_of_half_the_penalty():
    """kernel_1 - kernel_0 = w with |kernel|^2 = w^2 / 2: l2 of two columns is l2 / 2 of one."""
    x, labels = drawn(150, 3, 2)
    kernel, bias = regression.fit(x, labels, l2=0.2, tol=1e-10).params
    w, b = kernel[:, 1] - kernel[:, 0], bias[1] - bias[0]
    p = 1 / (1 + np.exp(-(x @ np.asarray(w) + float(b))))
    np.testing.assert_allclose(x.T @ (p - labels) / 150 + 0.1 * np.asarray(w), 0, atol=1e-9)
    np.testing.assert_allclose(np.mean(p - labels), 0, atol=1e-9)


def test_counts_of_very_different_size():
    x, _ = drawn(60, 4, 3)
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 4, (60, 3)) * 10.0 ** rng.integers(0, 5, (60, 1))
    counts[0] = [1, 1, 1]
    for penalty in ({}, {"l2": 1.0}, {"l1": 1.0}):
        result = regression.fit(x, counts, tol=1e-9, **penalty)
        assert result.converged
        over = {name: value / counts.sum() * 60 for name, value in penalty.items()}
        assert relative_gradient(result.params, x, counts, **over) < 1e-7


@pytest.mark.x64_once
@pytest.mark.parametrize("solver", ["newton-cg", "newton", "lbfgs"])
def test_one_entry_that_is_huge(solver):
    """The example of this entry has all the curvature of its feature, until it is certain."""
    for seed, entry in {0: 1e7, 1: 1e7, 3: 1e7, 5: -1e7, 14: -1e6, 15: -1e6}.items():
        rng = np.random.default_rng(seed)
        x, labels = drawn(60, 4, 3, seed)
        x = x.astype(np.float32)
        x[rng.integers(60), rng.integers(4)] = entry
        l2 = [0.0, 1e-3][seed % 2]
        q = np.eye(3)[labels]
        middle = np.median(x, 0).astype(np.float64)
        z = np.column_stack([x - middle, np.ones(60)])

        def loss(theta, z=z, q=q, l2=l2):
            kernel = theta.reshape(5, 3)
            log_p = log_softmax(z @ kernel, 1)
            ridge = l2 * kernel * (np.arange(5) < 4)[:, None]
            gradient = z.T @ (np.exp(log_p) - q) / 60 + ridge
            return -np.sum(q * log_p) / 60 + np.sum(ridge * kernel) / 2, gradient.ravel()

        best = minimize(loss, np.zeros(15), jac=True, method="BFGS", options={"gtol": 1e-10}).fun
        result = regression.fit(x, labels, solver=solver, l2=l2)
        # Float32 may not hold the parameters of the optimum: then the fit says so.
        assert result.stop_reason in ("converged", "precision floor")
        assert result.objective <= best * (1 + 2e-6)
