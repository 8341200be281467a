"""Bradley and Terry's requirements, and the default option."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softjax
from softjax.choice import bradley_terry_loss, bradley_terry_probability

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once]


def test_does_the_softmax_satisfy_the_requirements_of_bradley_and_terry(dtype):
    scores = np.random.default_rng(0).normal(size=(50, 4)).astype(dtype)
    p = np.asarray(softjax.softmax(scores))
    # The item with the largest score is the most likely one, and so on down.
    np.testing.assert_array_equal(np.argsort(p, -1), np.argsort(scores, -1))
    # A larger score makes its item more likely and every other one less so.
    jacobian = jax.vmap(jax.jacfwd(softjax.softmax))(scores)
    diagonal = np.eye(4, dtype=bool)
    assert np.all(jacobian[:, diagonal] > 0)
    assert np.all(jacobian[:, ~diagonal] < 0)
    two = bradley_terry_probability(scores[:, 0], scores[:, 1])[:, 0]
    sigmoid = 1 / (1 + np.exp(scores[:, 1].astype(np.float64) - scores[:, 0]))
    np.testing.assert_allclose(two, sigmoid, 1e-6)
    np.testing.assert_array_equal(two > 0.5, scores[:, 0] > scores[:, 1])


def test_what_if_neither_is_chosen(dtype):
    apple, orange = np.random.default_rng(1).normal(size=(2, 20)).astype(dtype)
    two = np.asarray(bradley_terry_probability(apple, orange))
    previous = np.inf
    for neither in (-5.0, 0.0, 5.0):
        three = np.asarray(bradley_terry_probability(apple, orange, neither))
        np.testing.assert_allclose(three.sum(-1), 1, 1e-6)
        # The odds stay, and both lose the same share.
        odds = np.exp(apple.astype(np.float64) - orange)
        np.testing.assert_allclose(three[:, 0] / three[:, 1], odds, 3e-6)
        share = 1 - three[:, 2:].astype(np.float64)  # as rounded as `three` where near 0
        np.testing.assert_allclose(three[:, :2], two * share, 1e-6, 1e-7)
        # A better default is chosen more often.
        losses = bradley_terry_loss(apple, orange, jnp.full(20, 2), neither)
        assert np.all(losses < previous)
        previous = losses
