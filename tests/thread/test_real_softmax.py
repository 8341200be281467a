"""RealSoftMax(a, b) = log(exp(a) + exp(b)), with lambda, and its limit."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import softjax
from softjax import smooth_max, smooth_max_bounds, smooth_min

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once]

LAMBDAS = (0.1, 1.0, 7.0, 1000.0)


def miscoded(x):
    return 1 / x * np.log(x * np.exp(2.0) + x * np.exp(4.0))


def plain(x):
    with np.errstate(over="ignore"):
        return 1 / x * np.log(np.exp(2.0 * x) + np.exp(4.0 * x))


def smooth(values, lam, dtype):
    return float(smooth_max(jnp.array(values, dtype), temperature=1 / lam))


def test_why_is_realsoftmax_greater_than_the_maximum(dtype):
    pairs = np.random.default_rng(0).normal(size=(200, 2)).astype(dtype)
    assert np.all(softjax.logsumexp(pairs, -1) > pairs.max(-1))


def test_how_small_can_the_difference_be(dtype):
    gaps = np.linspace(0, 80, 81).astype(dtype)
    differences = softjax.logsumexp(np.stack([np.zeros_like(gaps), -gaps], -1), -1)
    # Against log1p(exp(-gap)); exp has the condition number gap, of which half an ulp is lost.
    reference = np.log1p(np.exp(-gaps.astype(np.float64)))
    np.testing.assert_allclose(differences, reference, 50 * float(jnp.finfo(dtype).eps))
    assert differences[0] == np.asarray(np.log(2), dtype)
    assert np.all(np.diff(differences) < 0)
    assert differences[-1] > 0


def test_does_it_hold_with_lambda(dtype):
    for lam in LAMBDAS:
        for gap in (0.0, 0.5, 3.0):
            # At a maximum of 0, where floating point has room for the difference.
            difference = smooth([0.0, -gap], lam, dtype)
            expected = np.log1p(np.exp(-lam * gap)) / lam
            if expected > 1e-30:
                assert difference > 0
            assert difference == pytest.approx(expected, rel=2e-6, abs=1e-30)


def test_what_is_the_limit_for_large_lambda(dtype):
    equal, different = [], []
    for lam in (1.0, 10.0, 100.0, 1000.0, 1e6):
        equal.append(smooth([3.0, 3.0], lam, dtype) - 3)
        different.append(smooth([0.0, -2.0], lam, dtype))
        assert 0 <= equal[-1] <= np.log(2) / lam + 4 * float(jnp.finfo(dtype).eps)
        assert 0 <= different[-1] <= np.exp(-2 * lam) / lam * (1 + 1e-5)
    assert equal == sorted(equal, reverse=True)
    assert different == sorted(different, reverse=True)
    assert smooth([2.0, 4.0], 1e6, dtype) == 4


def test_why_does_my_code_tend_to_zero(dtype):
    real_softmax = float(softjax.logsumexp(jnp.array([2.0, 4.0], dtype)))
    for lam in (1.0, 10.0, 100.0, 1e6):
        # lambda in front of the exponentials is one more log(lambda), divided by lambda.
        assert miscoded(lam) == pytest.approx((np.log(lam) + real_softmax) / lam)
    assert miscoded(1000.0) < 0.012
    assert miscoded(1e6) < 2e-5
    # The right formula overflows in plain float64 and not in softjax.
    for lam in (1.0, 10.0, 100.0, 177.0):
        assert smooth([2.0, 4.0], lam, dtype) == pytest.approx(plain(lam), rel=1e-6)
    assert np.isfinite(plain(177.0))
    for lam in (178.0, 1000.0):
        assert plain(lam) == np.inf
        assert smooth([2.0, 4.0], lam, dtype) == 4


def test_what_does_the_soft_min_look_like(dtype):
    pairs = np.random.default_rng(0).normal(size=(50, 2)).astype(dtype)
    values = smooth_min(pairs, -1)
    np.testing.assert_array_equal(values, -smooth_max(-pairs, -1))
    np.testing.assert_allclose(values, oracles.smooth_min(pairs), 1e-5, 1e-6)
    assert np.all(values < pairs.min(-1))
    gradient = jax.vmap(jax.grad(smooth_min))(pairs)
    np.testing.assert_allclose(gradient, oracles.softmin(pairs), 2e-6)
    np.testing.assert_allclose(softjax.softmin(pairs), oracles.softmin(pairs), 2e-6)
    cold = smooth_min(jnp.array([2.0, 4.0], dtype), temperature=1e-3)
    assert cold == 2


@pytest.mark.parametrize("n", [2, 5, 100])
def test_what_about_more_than_two_numbers(n, dtype):
    x = np.random.default_rng(n).normal(size=n).astype(dtype)
    rounding = 4 * float(jnp.finfo(dtype).eps)
    for lam in LAMBDAS:
        value = smooth(x, lam, dtype)
        lower, upper = smooth_max_bounds(x, temperature=1 / lam)
        assert lower == x.max()
        assert upper == pytest.approx(x.max() + np.log(n) / lam, rel=1e-6)
        assert lower <= value < upper + rounding
        even = smooth(np.full(n, 2.0), lam, dtype)
        assert even == pytest.approx(2 + np.log(n) / lam, rel=1e-6)
    assert smooth(x, 1.0, dtype) > x.max()
