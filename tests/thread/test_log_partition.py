"""g(x) = log sum exp(x): convexity, translation, stability."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from softjax import cross_entropy, derivatives, logsumexp, softmax

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once]


def plain(x):
    with np.errstate(over="ignore", divide="ignore"):
        return np.log(np.sum(np.exp(x)))


def shifted(x, b):
    with np.errstate(over="ignore", divide="ignore"):
        return b + np.log(np.sum(np.exp(x - b)))


def test_why_is_the_log_partition_function_convex(dtype):
    rng, eps = np.random.default_rng(0), float(jnp.finfo(dtype).eps)
    for scale in (0.1, 1.0, 10.0):
        x, y, v = (scale * rng.normal(size=(3, 20, 6))).astype(dtype)
        # The chord is above the function.
        for s in np.linspace(0, 1, 5).astype(dtype):
            chord = s * logsumexp(x, -1) + (1 - s) * logsumexp(y, -1)
            assert np.all(logsumexp(s * x + (1 - s) * y, -1) <= chord + 40 * scale * eps)
        # The gradient is p, the second derivative along v the variance of v under p.
        p = oracles.softmax(x)
        np.testing.assert_allclose(
            jax.vmap(jax.grad(logsumexp))(x), p, (20 + 40 * scale) * eps, eps
        )
        hessian = np.asarray(derivatives.logsumexp_hessian(x))
        second = np.einsum("ni,nij,nj->n", v, hessian, v)
        variance = (p * (v - (p * v).sum(-1, keepdims=True)) ** 2).sum(-1)
        np.testing.assert_allclose(second, variance, 400 * eps, 40 * scale**2 * eps)
        assert np.linalg.eigvalsh(hessian).min() >= -4 * eps
        # Not strictly convex: flat along (1, ..., 1).
        np.testing.assert_allclose(hessian.sum(-1), 0, 0, 4 * eps)


def test_is_it_translation_invariant(dtype):
    x = (np.random.default_rng(0).integers(-64, 64, (20, 6)) / 16).astype(dtype)
    for b in (-3.0, 0.5, 16.0):  # x + b is exact
        moved = x + np.asarray(b, dtype)
        np.testing.assert_allclose(logsumexp(moved, -1), logsumexp(x, -1) + b, 1e-6, 1e-6)
        np.testing.assert_array_equal(softmax(moved), softmax(x))
        assert not np.allclose(logsumexp(moved, -1), logsumexp(x, -1))


@pytest.mark.parametrize("size", [800.0, 1e4, 1e30])
def test_what_if_some_coordinates_are_very_large_or_all_are_very_small(size, dtype):
    large, small = np.array([size, 0.0]), np.array([-size, -2 * size])
    assert plain(large) == np.inf
    assert plain(small) == -np.inf
    assert logsumexp(large.astype(dtype)) == np.asarray(size, dtype)
    assert logsumexp(small.astype(dtype)) == np.asarray(-size, dtype)
    np.testing.assert_array_equal(softmax(large.astype(dtype)), [1, 0])


def test_why_is_subtracting_the_maximum_stable():
    rng = np.random.default_rng(0)
    for scale in (1.0, 100.0, 1e4):
        x = scale * rng.normal(size=10)
        total = np.sum(np.exp(x - x.max()))
        assert 1 <= total <= 10
        assert shifted(x, x.max()) == pytest.approx(float(oracles.logsumexp(x)), rel=1e-12)
    # Any b will do on paper, but not in floating point.
    x = np.array([0.0, 0.0, 3000.0])
    assert shifted(x, x.max()) == 3000
    assert shifted(x, x.mean()) == shifted(x, x.min()) == np.inf
    assert shifted(x, 1e4) == -np.inf
    # Finite is not accurate: the 1 of the maximum hides the rest.
    tiny = np.array([0.0, -40.0])
    assert shifted(tiny, 0.0) == 0
    assert logsumexp(tiny.astype(np.float32)) == pytest.approx(np.exp(-40.0), rel=1e-5)


@pytest.mark.x64_once
def test_what_does_float32_do_to_a_confident_row():
    gaps = np.array([1.0, 10.0, 16.0, 18.0, 40.0, 80.0], np.float32)
    rows = np.stack([np.zeros_like(gaps), -gaps], -1)
    labels = np.zeros(len(gaps), np.int32)
    losses = cross_entropy(rows, labels)
    np.testing.assert_allclose(losses, np.log1p(np.exp(-gaps.astype(float))), 1e-5)
    # The plain way in float32: 1 + exp(-d) is 1 from d = 17 on, for half an ulp of 1 is 6e-8.
    total = np.float32(1) + np.exp(-gaps)
    np.testing.assert_array_equal(total == 1, gaps > 17)
    gradient = derivatives.cross_entropy_gradient(rows, labels)
    slope = -1 / (1 + np.exp(gaps.astype(float)))
    np.testing.assert_allclose(gradient[:, 0], slope, 1e-5)
