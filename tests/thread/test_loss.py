"""The loss, its two names and its two derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import softjax
from softjax import derivatives, information

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once]

SIZES = pytest.mark.parametrize("n", [2, 3, 10])


def logits(dtype, n):
    return np.random.default_rng(n).normal(size=n, scale=2).astype(dtype)


def near(actual, desired, dtype):
    tolerance = 16 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(actual, oracles.rounded(desired), tolerance, tolerance)


@SIZES
def test_why_is_the_loss_minus_the_logarithm_of_one_probability(n, dtype):
    rows = np.stack([logits(dtype, n) * np.asarray(scale, dtype) for scale in (0.5, 1, 2)])
    labels = np.arange(3) % n
    likelihood = np.prod(oracles.softmax(rows)[np.arange(3), labels])
    near(softjax.cross_entropy(rows, labels).sum(), -np.log(likelihood), dtype)
    # 0 for a certain, right prediction; without bound for a wrong one.
    certain = np.array([0, -np.inf], dtype)
    assert softjax.cross_entropy(certain, jnp.array(0)) == 0
    assert softjax.cross_entropy(certain, jnp.array(1)) == np.inf


@SIZES
def test_is_the_negative_log_likelihood_the_same_as_the_cross_entropy(n, dtype):
    x = logits(dtype, n)
    one_hot = np.eye(n, dtype=dtype)
    for label in range(n):
        loss = softjax.cross_entropy(x, jnp.array(label))
        near(loss, -oracles.log_softmax(x)[label], dtype)
        near(softjax.cross_entropy(x, one_hot[label]), loss, dtype)
        assert information.surprisal(x, jnp.array(label)) == loss
    # For a distribution it is the expected loss, and at least the entropy of the distribution.
    t = logits(dtype, n + 100)[:n]
    q = oracles.softmax(t)
    losses = softjax.cross_entropy(np.broadcast_to(x, (n, n)), np.arange(n))
    near(softjax.cross_entropy(x, q.astype(dtype)), q @ np.asarray(losses, np.float64), dtype)
    assert information.cross_entropy(t, x) >= information.entropy(t)
    near(information.cross_entropy(t, t), information.entropy(t), dtype)


@SIZES
def test_how_does_one_get_from_the_loss_to_its_derivative(n, dtype):
    x = logits(dtype, n)
    for label in range(n):
        y = np.eye(n)[label]
        # The lines 1 to 7 of the page, each as it stands there.
        o = x.astype(np.float64)
        z = np.sum(np.exp(o))
        lines = [
            -y @ np.log(np.exp(o) / z),
            -y @ (np.log(np.exp(o)) - np.log(z)),
            -y @ (o - np.log(z)),
            np.sum(y * np.log(z)) - np.sum(y * o),
            np.log(z) * np.sum(y) - np.sum(y * o),
            np.log(z) - np.sum(y * o),
        ]
        near(np.array(lines), np.full(6, softjax.cross_entropy(x, jnp.array(label))), dtype)
        expected = oracles.softmax(x) - y
        near(derivatives.cross_entropy_gradient(x, jnp.array(label)), expected, dtype)
        near(jax.grad(softjax.cross_entropy)(x, jnp.array(label)), expected, dtype)
        near(jax.jacfwd(softjax.cross_entropy)(x, y.astype(dtype)), expected, dtype)


@SIZES
def test_why_is_the_second_derivative_of_the_loss_a_variance(n, dtype):
    x = logits(dtype, n)
    p = oracles.softmax(x)
    one_hot = np.eye(n)
    mean = p @ one_hot
    covariance = (one_hot - mean).T @ np.diag(p) @ (one_hot - mean)
    for label in range(n):
        near(jax.hessian(softjax.cross_entropy)(x, jnp.array(label)), covariance, dtype)
        hessian = derivatives.cross_entropy_hessian(x, jnp.array(label))
        near(hessian, covariance, dtype)
        near(np.diag(hessian), p * (1 - p), dtype)
    # The lines 16 and 17 of the page.
    e = np.exp(x.astype(np.float64))
    z = e.sum()
    near(hessian, np.diag(e) / z - np.outer(e, e) / z**2, dtype)
    near(hessian, np.diag(p) - np.outer(p, p), dtype)
    v = np.random.default_rng(1).normal(size=n).astype(dtype)
    variance = p @ (v - p @ v) ** 2
    near(v @ np.asarray(hessian) @ v, variance, dtype)
    near(derivatives.log_partition_cumulants(x, v, 2)[1], variance, dtype)


@SIZES
def test_is_it_the_variance_of_the_probabilities(n, dtype):
    """The more different the probabilities are, the less variance is under them: a constant sum."""
    p = oracles.softmax(logits(dtype, n))
    under = np.asarray(derivatives.logsumexp_hessian(logits(dtype, n)), np.float64)
    near(np.trace(under) + n * np.var(p), 1 - 1 / n, dtype)
    even = derivatives.logsumexp_hessian(jnp.zeros(n, dtype))
    assert np.var(oracles.softmax(np.zeros(n))) == 0
    near(np.diag(even), np.full(n, 1 / n * (1 - 1 / n)), dtype)


@SIZES
def test_may_the_square_of_the_mean_be_left_out(n, dtype):
    x = logits(dtype, n)
    p = oracles.softmax(x)
    # A constant in all logits changes nothing: the second derivative along it is 0, E[X^2] is 1.
    along = derivatives.cross_entropy_hvp(x, jnp.array(0), jnp.ones(n, dtype))
    np.testing.assert_allclose(along, np.zeros(n), atol=4 * float(jnp.finfo(dtype).eps))
    assert p @ np.ones(n) ** 2 == pytest.approx(1)
    v = np.arange(n, dtype=dtype)
    second = v @ np.asarray(derivatives.cross_entropy_hvp(x, jnp.array(0), v), np.float64)
    near(second, p @ v**2 - (p @ v) ** 2, dtype)
    assert second < p @ v**2 - 1e-3


@SIZES
def test_is_p_1_p_the_whole_second_derivative(n, dtype):
    hessian = np.asarray(derivatives.cross_entropy_hessian(logits(dtype, n), jnp.array(0)))
    p = oracles.softmax(logits(dtype, n))
    beside = ~np.eye(n, dtype=bool)
    near(hessian[beside], -np.outer(p, p)[beside], dtype)
    np.testing.assert_allclose(hessian.sum(1), 0, atol=8 * float(jnp.finfo(dtype).eps))


@SIZES
def test_is_the_sum_of_a_b_the_sum_of_a_over_the_sum_of_b(n, dtype):
    x = logits(dtype, n)
    e = np.exp(x.astype(np.float64))
    near(softjax.softmax(x), e / e.sum(), dtype)
    assert np.all((e[:, None] / e).sum(-1) >= 1)
    # Of means of batches, the one weighted by their sizes is the mean of all.
    losses = np.abs(x).astype(np.float64)
    parts = (losses[:1], losses[1:])
    means = np.array([part.mean() for part in parts], dtype)
    near(softjax.weighted_mean(means, np.array([1, n - 1], dtype)), losses.mean(), dtype)
    assert n == 2 or means.mean() != pytest.approx(losses.mean())


def test_is_the_sigmoid_a_softmax(dtype):
    x = np.linspace(-20, 20, 41).astype(dtype)
    two = np.stack([np.zeros_like(x), x], -1)
    near(softjax.softmax(two)[:, 1], 1 / (1 + np.exp(-x.astype(np.float64))), dtype)
    # The binary loss is log(1 + exp(-x)) for the class 1, log(1 + exp(x)) for the class 0.
    for label, sign in ((1, -1), (0, 1)):
        losses = softjax.cross_entropy(two, np.full(41, label))
        near(losses, np.log1p(np.exp(sign * x.astype(np.float64))), dtype)
