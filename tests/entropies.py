"""Entropies of logits and their derivatives, by definition, and logits to try them on."""

import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from oracles import exact, rounded

from softjax import information

OF_ONE = {"entropy": information.entropy, "perplexity": information.perplexity}
OF_TWO = {"cross_entropy": information.cross_entropy, "kl_divergence": information.kl_divergence}
of_one = pytest.mark.parametrize("f", OF_ONE.values(), ids=OF_ONE.keys())
of_two = pytest.mark.parametrize("f", OF_TWO.values(), ids=OF_TWO.keys())


def entropy(x):
    return -(oracles.softmax(x) * oracles.log_softmax(x)).sum(-1)


def cross_entropy(t, x):
    return -(oracles.softmax(t) * oracles.log_softmax(x)).sum(-1)


def kl_divergence(t, x):
    return cross_entropy(t, x) - entropy(t)


def entropy_gradient(x):
    return -oracles.softmax(x) * (oracles.log_softmax(x) + entropy(x))


def entropy_hessian(x):
    p, h, g = oracles.softmax(x), oracles.hessian(x), entropy_gradient(x)
    surprise = oracles.log_softmax(x) + entropy(x)
    return -h * surprise[:, None] - h - p[:, None] * g


def cross_entropy_target_gradient(t, x):
    return oracles.softmax(t) * (-oracles.log_softmax(x) - cross_entropy(t, x))


def kl_target_gradient(t, x):
    return cross_entropy_target_gradient(t, x) - entropy_gradient(t)


def kl_target_hessian(t, x):
    p, h, g = oracles.softmax(t), oracles.hessian(t), kl_target_gradient(t, x)
    log_ratio = oracles.log_softmax(t) - oracles.log_softmax(x) - kl_divergence(t, x)
    return h * log_ratio[:, None] + h - p[:, None] * g


def logits(dtype, *shape, scale=1.0, seed=0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def pairs(dtype):
    """(p, q) from nearly equal to nothing in common, with and without an offset."""
    for n, seed in ((2, 2), (100, 10), (100, 100)):
        for scale in (0.1, 1.0, 10.0):
            t = logits(dtype, n, scale=scale, seed=seed)
            for apart in (1e-6, 1e-3, 0.1, 1.0, 20.0):
                for offset in (0.0, 1e3):
                    step = logits(dtype, n, scale=apart, seed=seed + 1) + np.asarray(offset, dtype)
                    yield t, (t + step).astype(dtype)


def roundings(actual, reference, scale):
    """The largest |actual - reference| in eps * scale; below the normal numbers all is 0."""
    info = jnp.finfo(actual.dtype)
    error = np.abs(rounded(exact(actual) - reference))
    return np.max(error / (float(info.eps) * np.abs(rounded(scale)) + 2 * float(info.tiny)))
