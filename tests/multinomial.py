"""A multinomial logit model in float64 NumPy: data, optimum and covariance."""

import jax.numpy as jnp
import numpy as np
import scipy.special

from softjax import regression

N, D, K = 120, 3, 4
P = (D + 1) * K


def problem(dtype, n=N, d=D, k=K, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)).astype(dtype)
    y = np.argmax(x @ rng.normal(size=(d, k)) + rng.gumbel(size=(n, k)), -1)
    return x, y, rng.integers(0, 4, n).astype(dtype)


def optimum(x, labels, num_classes, dtype, l2=0.0, sample_weights=None):
    """Newton's steps in float64 NumPy, from zero."""
    x = np.concatenate([np.float64(x), np.ones((len(x), 1))], 1)
    y = np.eye(num_classes)[labels] if np.ndim(labels) == 1 else np.float64(labels)
    w = np.ones(len(x)) if sample_weights is None else np.float64(sample_weights)
    penalty = l2 * w.sum() * (np.arange(x.shape[1]) < x.shape[1] - 1)[:, None]
    theta = np.zeros((x.shape[1], num_classes))
    for _ in range(12):
        p = scipy.special.softmax(x @ theta, -1)
        g = x.T @ (w[:, None] * (y.sum(-1, keepdims=True) * p - y)) + penalty * theta
        h = fisher(x, p, w * y.sum(-1)) + np.diag(np.repeat(penalty[:, 0], num_classes))
        theta -= (np.linalg.pinv(h, 1e-12, hermitian=True) @ g.ravel()).reshape(theta.shape)
    return regression.SoftmaxRegression(
        jnp.asarray(theta[:-1], dtype), jnp.asarray(theta[-1], dtype)
    )


def fisher(x, p, a):
    cov = p[:, :, None] * (np.eye(p.shape[1]) - p[:, None, :])
    size = x.shape[1] * p.shape[1]
    return np.einsum("n,nd,nkl,ne->dkel", a, x, cov, x, optimize=True).reshape(size, size)


def oracle(params, x, labels, *, robust=False, clusters=None, l2=0.0, sample_weights=None):
    """The covariance by pseudo-inverses, in float64."""
    kernel, bias = (np.float64(leaf) for leaf in params)
    k = len(bias)
    x = np.concatenate([np.float64(x), np.ones((len(x), 1))], 1)
    y = np.eye(k)[labels] if np.ndim(labels) == 1 else np.float64(labels)
    w = np.ones(len(x)) if sample_weights is None else np.float64(sample_weights)
    p = scipy.special.softmax(x @ np.concatenate([kernel, bias[None]]), -1)
    information = fisher(x, p, w * y.sum(-1))
    h = information + l2 * w.sum() * np.diag(np.arange(len(information)) < kernel.size)
    scores = (x[:, :, None] * (y - y.sum(-1, keepdims=True) * p)[:, None, :]).reshape(len(x), -1)
    meat, factor = information, 1.0
    if clusters is not None:
        sums = np.stack([(w[:, None] * scores)[clusters == g].sum(0) for g in np.unique(clusters)])
        n, groups, size = (w * y.sum(-1)).sum(), len(sums), x.shape[1] * (k - 1)
        meat, factor = sums.T @ sums, groups / (groups - 1) * (n - 1) / (n - size)
    elif robust:
        meat = scores.T @ (w[:, None] * scores)
    centring = np.kron(np.eye(x.shape[1]), np.eye(k) - 1 / k)
    inverse = centring @ np.linalg.pinv(h, 1e-12, hermitian=True) @ centring
    return factor * inverse @ meat @ inverse


def close(ours, expected, dtype, units=2000):
    """Within so many roundings of the largest: condition numbers here are some hundreds."""
    largest = np.max(np.abs(expected))
    tolerance = units * float(np.finfo(dtype).eps) * largest
    np.testing.assert_allclose(np.float64(ours), expected, rtol=0, atol=tolerance)
