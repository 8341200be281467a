"""The loss with labels of every kind and every option, against its definition."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from functions import close, logits

import softjax

# Where digits or equal bits are asserted, programs are compiled as users have them.
pytestmark = pytest.mark.compiled_quickly
compiled_fully = pytest.mark.compiled_quickly(False)


@compiled_fully
@pytest.mark.x64_once
def test_labels_of_every_kind_give_one_loss(dtype):
    x = logits(dtype, 30, 12, scale=8.0)
    labels = np.random.default_rng(7).integers(12, size=30)
    one_hot = np.eye(12, dtype=dtype)[labels]
    sparse = softjax.TopKLabels(jnp.asarray(labels)[:, None], jnp.ones((30, 1), dtype))
    cases: list[dict[str, Any]] = [{}, {"label_smoothing": 0.125}, {"z_loss": 0.5}]
    for options in cases:
        losses = softjax.cross_entropy(x, labels, **options)
        close(losses, oracles.cross_entropy(x, labels, **options), dtype)
        close(softjax.cross_entropy(x, one_hot, **options), losses, dtype, ulps=4)
        close(softjax.cross_entropy(x, sparse, **options), losses, dtype, ulps=4)


@pytest.mark.x64_once
def test_negative_log_likelihood_is_cross_entropy(dtype):
    x = logits(dtype, 30, 12)
    labels = np.random.default_rng(8).integers(12, size=30)
    likelihood = np.take_along_axis(oracles.softmax(x), labels[:, None], -1)[:, 0]
    close(softjax.cross_entropy(x, labels), -np.log(likelihood), dtype)


@pytest.mark.parametrize("as_distribution", [False, True])
def test_options_of_the_loss(as_distribution, dtype):
    rng = np.random.default_rng(9)
    x = logits(dtype, 12, 7)
    where = rng.random(x.shape) < 0.7
    labels = rng.integers(7, size=12)
    where[np.arange(12), labels] = True
    weights = rng.integers(1, 9, 7).astype(dtype) / 4
    if as_distribution:
        given = np.where(where, rng.integers(1, 9, x.shape), 0)
        given = (given / given.sum(-1, keepdims=True)).astype(dtype)
    else:
        given = labels
    cases: list[dict[str, Any]] = [
        {},
        {"class_weights": weights},
        {"class_weights": weights, "label_smoothing": 0.25, "z_loss": 0.125},
    ]
    for options in cases:
        for mask in (None, where):

            def total(x, given=given, mask=mask, options=options):
                losses = softjax.cross_entropy(x, given, where=mask, **options)
                return jnp.sum(losses), losses

            gradient, losses = jax.jit(jax.grad(total, has_aux=True))(jnp.asarray(x))
            exact = oracles.exact(x)
            close(losses, oracles.cross_entropy(exact, given, mask, **options), dtype, ulps=40)
            expected = oracles.cross_entropy_gradient(exact, given, mask, **options)
            close(gradient, expected, dtype, ulps=40)  # weights up to 2, z_loss * lse of some ten


@compiled_fully
@pytest.mark.x64_once
def test_two_classes_are_the_logistic_function(dtype):
    x = logits(dtype, 50, scale=10.0)
    pairs = np.stack([np.zeros_like(x), x], -1)
    close(softjax.softmax(pairs)[:, 1], 1 / (1 + np.exp(-x.astype(np.float64))), dtype)
    labels = np.ones(50, np.int32)
    close(softjax.cross_entropy(pairs, labels), np.log1p(np.exp(-x.astype(np.float64))), dtype)
