"""Vector scaling and the class-wise error against float64 NumPy and scipy.optimize."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

import softjax
from softjax import calibration

pytestmark = pytest.mark.compiled_quickly

N, K = 300, 4


def problem(dtype, seed=0):
    """Logits of wrong scales and biases, labels, and weights of which some are 0."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N, K))
    z = x * rng.uniform(0.5, 2, K) + rng.normal(size=K)
    y = np.argmax(z + rng.gumbel(size=(N, K)), -1)
    return x.astype(dtype), y, rng.integers(0, 3, N).astype(dtype)


def optimum(x, y, w, l2):
    """Scales and biases by BFGS in float64, in the unit of the logits."""
    x, w = np.float64(x), np.float64(w) / np.float64(w).sum()
    q, unit = np.eye(K)[y], np.abs(x).max(0)

    def objective(theta):
        s, b = theta[:K] / unit, theta[K:]
        log_p = scipy.special.log_softmax(s * x + b, 1)
        slope = w[:, None] * (np.exp(log_p) - q)
        value = -(w[:, None] * q * log_p).sum() + l2 / 2 * (((s - 1) ** 2).sum() + (b**2).sum())
        by_scale = ((slope * x).sum(0) + l2 * (s - 1)) / unit
        return value, np.concatenate([by_scale, slope.sum(0) + l2 * b])

    start = np.concatenate([np.ones(K), np.zeros(K)])
    options = {"gtol": 1e-9, "maxiter": 2000}
    theta = scipy.optimize.minimize(objective, start, jac=True, method="BFGS", options=options).x
    return theta[:K] / unit, theta[K:] - theta[K:].mean()


@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_vector_scaling_is_the_optimum_at_any_scale_and_offset_of_the_logits(l2, dtype, x64):
    x, y, w = problem(dtype)
    # A penalty of what changes logits of another scale holds them back, and one offset is enough.
    for scale, middle in ((1.0, 3.0), (1.0, 0.0)) if l2 else ((1.0, 30.0), (1e-6, 0.0), (1e15, 0)):
        moved = x * np.asarray(scale, dtype) + np.asarray(middle, dtype)
        ours = calibration.calibrate_vector(moved, y, l2=l2, sample_weights=w)
        assert ours.scale.dtype == ours.bias.dtype == dtype
        expected = optimum(moved, y, w, l2)
        np.testing.assert_allclose(ours.scale, expected[0], rtol=1e-6 if x64 else 1e-3)
        np.testing.assert_allclose(ours.bias, expected[1], atol=1e-6 if x64 else 2e-3)


@pytest.mark.x64_once
def test_vector_scaling_of_logits_of_any_magnitude():
    """The squares of logits of 1e20 overflow, and those of 1e-20 underflow."""
    x, y, w = problem(np.float32)
    one = calibration.calibrate_vector(x, y, sample_weights=w)
    for scale in (2.0**-100, 2.0**-60, 2.0**60, 2.0**100, np.array([1, 2.0**90, 1, 2.0**-90])):
        ours = calibration.calibrate_vector(x * np.float32(scale), y, sample_weights=w)
        tolerance = 1e-5 if np.ndim(scale) == 0 else 1e-2  # else the start is another
        np.testing.assert_allclose(ours.scale * scale, one.scale, rtol=tolerance)
        np.testing.assert_allclose(ours.bias, one.bias, atol=tolerance)
    held = calibration.calibrate_vector(x * np.float32(2.0**100), y, l2=0.1)
    assert np.isfinite(held.scale).all()
    assert np.isfinite(held.bias).all()


@pytest.mark.x64_once(True)  # differences say little in float32, in which the optimum is tested too
def test_vector_scaling_is_differentiable_and_transforms(dtype):
    x, y, _ = problem(dtype)
    soft = np.eye(K, dtype=dtype)[y] * np.asarray(0.9, dtype) + np.asarray(0.025, dtype)
    direction = np.random.default_rng(1).normal(size=x.shape).astype(dtype)

    def scales(x, y=soft, l2=0.01):
        return calibration.calibrate_vector(x, y, l2=l2).scale

    step = 1e-4
    value, forward = jax.jvp(scales, (x,), (direction,))
    by_difference = (scales(x + step * direction) - scales(x - step * direction)) / (2 * step)
    np.testing.assert_allclose(forward, by_difference, atol=1e-6)
    backward = jax.grad(lambda x: jnp.sum(scales(x)))(jnp.asarray(x))
    np.testing.assert_allclose(np.sum(backward * direction), np.sum(forward), rtol=1e-3)
    np.testing.assert_allclose(value, scales(x), rtol=1e-12)
    batched = jax.vmap(scales)(jnp.stack([x, 2 * x]))
    np.testing.assert_allclose(batched[0], value, rtol=1e-8)
    bad = jax.jit(calibration.calibrate_vector)(x, np.where(y == 0, K, y))
    assert np.isnan(bad.scale).all()


@pytest.mark.x64_once
def test_vector_scaling_at_its_limits():
    x, y, w = problem(np.float32)
    masked = x.copy()
    masked[:, 3] = -np.inf
    others = np.minimum(y, 2)
    scaling = calibration.calibrate_vector(masked, others)
    p = softjax.softmax(scaling.logits(masked))
    assert not p[:, 3].any()
    np.testing.assert_allclose(p[:, :3].mean(0), np.bincount(others) / N, rtol=1e-4)
    assert np.isnan(calibration.calibrate_vector(masked, y).scale).all()
    assert np.isnan(calibration.calibrate_vector(x, y, sample_weights=0 * w).bias).all()
    spoiled = np.where(w[:, None] == 0, np.nan, x)
    weighted = calibration.calibrate_vector(x, y, sample_weights=w)
    same = calibration.calibrate_vector(spoiled, y, sample_weights=w)
    np.testing.assert_allclose(same.scale, weighted.scale, rtol=1e-5)
    # Equal logits: the shares of the classes. A class without examples: its probability is 0, but
    # for a penalty.
    shares = softjax.softmax(calibration.calibrate_vector(0 * x, others).logits(x[0] * 0))
    np.testing.assert_allclose(shares, np.bincount(others, minlength=K) / N, atol=1e-5)
    held = calibration.calibrate_vector(x, others, l2=0.1)
    assert np.abs(held.bias).max() < 5
    # Separated: the loss is near 0, and the parameters are finite.
    sure = calibration.calibrate_vector(x, np.argmax(x, 1))
    loss = softjax.cross_entropy(sure.logits(x), np.argmax(x, 1)).mean()
    assert loss < 1e-3
    assert np.isfinite(sure.scale).all()


def test_the_classwise_error_is_that_of_each_class_in_numpy(dtype):
    x, y, w = problem(dtype)
    p = np.array(softjax.softmax(x))
    p[:40] = p[40:80]  # equal probabilities stay together
    for adaptive, num_bins in ((False, 15), (True, 7)):
        errors = []
        for q, right in zip(np.float64(p).T, np.eye(K)[y].T, strict=True):
            place = q * num_bins
            if adaptive:
                place = np.array([w[q < value].sum() for value in q]) / w.sum() * num_bins
            bins = np.minimum(place.astype(int), num_bins - 1)
            gaps = np.bincount(bins, w * (right - q), num_bins)
            errors.append(np.abs(gaps).sum() / w.sum())
        ours = calibration.classwise_calibration_error(
            p, y, num_bins=num_bins, adaptive=adaptive, sample_weights=w
        )
        np.testing.assert_allclose(ours, np.mean(errors), rtol=1e-4)
    soft = calibration.classwise_calibration_error(p, np.eye(K, dtype=dtype)[y])
    np.testing.assert_allclose(soft, calibration.classwise_calibration_error(p, y), rtol=1e-6)
    assert calibration.classwise_calibration_error(np.eye(K, dtype=dtype), np.arange(K)) == 0
    p[7, 1] = np.nan
    with softjax.checks(False):
        assert np.isnan(calibration.classwise_calibration_error(p, y))
    bad = jax.jit(calibration.classwise_calibration_error)(x * 0, y + 1)
    assert np.isnan(bad)
