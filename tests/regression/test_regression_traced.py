"""Fits inside of a trace, and the derivatives of an optimum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_regression import L2, D, K, problem

from softjax import regression
from softjax.regression import _traced

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.usefixtures("compiled_fits")]


def in_both_modes(loss):
    """The loss, its derivative along a tangent, and its gradient times the tangent."""

    def derivatives(at, along):
        value, forward = jax.linearize(loss, *at)
        gradients = jax.linear_transpose(forward, *at)(jnp.ones_like(value))
        reverse = sum(jnp.vdot(g, t) for g, t in zip(gradients, along, strict=True))
        return value, forward(*along), reverse

    return derivatives


def assert_differentiable(derivatives, arguments, tangents, rtol, h=1e-5):
    """Both modes agree at both ends of a short way, and with what the loss gains on it."""
    both = tuple(zip(arguments, tangents, strict=True))
    ends = tuple(np.stack([a - h * t, a + h * t]) for a, t in both)
    value, forward, reverse = derivatives(ends, tuple(np.stack([t, t]) for t in tangents))
    np.testing.assert_allclose(forward, reverse, rtol=rtol)
    np.testing.assert_allclose(forward.mean(), (value[1] - value[0]) / (2 * h), rtol=1e-6)


@pytest.mark.x64_once(True)
def test_the_optimum_is_differentiable_in_both_modes():
    x, _ = problem()
    x, rng = x[:20], np.random.default_rng(7)
    arguments = (
        np.array(0.05),
        x,
        rng.dirichlet(np.ones(K), len(x)),
        rng.uniform(0.5, 2, len(x)),
        np.array([1.0, 2.0, 0.5]),
    )
    target = rng.normal(size=(D, K))

    def loss(l2, x, labels, weights, class_weights):
        result = regression.fit(
            x,
            labels,
            l2=l2,
            tol=1e-12,
            sample_weights=weights,
            class_weights=class_weights,
        )
        kernel, bias = result.params
        return jnp.sum((kernel - target) ** 2) + jnp.sum(jnp.sin(bias)) + result.objective

    tangents = tuple(rng.normal(size=argument.shape) for argument in arguments)
    assert_differentiable(jax.jit(jax.vmap(in_both_modes(loss))), arguments, tangents, rtol=1e-9)


@pytest.mark.x64_once(True)
def test_later_gradients_outside_of_a_trace_trace_no_fit(monkeypatch):
    """They traced, and partly compiled, the whole fit in each call."""
    x, y = problem()
    x, traces, to_the_end = x[:40], [], _traced.to_the_end
    monkeypatch.setattr(_traced, "to_the_end", lambda *a: traces.append(1) or to_the_end(*a))

    def total(x, l2):
        return jnp.sum(regression.fit(x, y[:40], l2=l2, tol=1e-10).params.kernel ** 2)

    slope = jax.grad(total, (0, 1))
    slope(x, 0.1)
    count = len(traces)
    of_features, of_penalty = slope(1.5 * x, 0.2)
    assert len(traces) == count > 0
    h = 1e-4
    difference = (total(1.5 * x, 0.2 + h) - total(1.5 * x, 0.2 - h)) / (2 * h)
    np.testing.assert_allclose(of_penalty, difference, rtol=1e-5)
    difference = (total((1.5 + h) * x, 0.2) - total((1.5 - h) * x, 0.2)) / (2 * h)
    np.testing.assert_allclose(np.vdot(of_features, x), difference, rtol=1e-5)


@pytest.mark.x64_once(True)
def test_a_traced_fit_is_the_fit_and_maps_over_penalties():
    x, y = problem()
    penalties = np.array([0.01, 0.1])
    fit = jax.jit(jax.vmap(lambda l2: regression.fit(x, y, l2=l2, num_classes=K)))
    results = fit(penalties)
    assert np.all(results.converged)
    for k, l2 in enumerate(penalties):
        expected = regression.fit(x, y, l2=l2)
        np.testing.assert_allclose(results.params.kernel[k], expected.params.kernel, atol=1e-5)


@pytest.mark.x64_once
def test_a_bad_label_under_a_trace_gives_nan():
    x, y = problem()
    fit = jax.jit(lambda y: regression.fit(x, y, l2=L2, num_classes=K))
    result = fit(jnp.asarray(y).at[3].set(K))
    assert result.stop_reason == regression.NON_FINITE
    assert np.isnan(result.params.kernel).all()
    assert np.isnan(result.objective)


@pytest.mark.x64_once(True)
@pytest.mark.parametrize("solver", ["proximal", "firth"])
def test_the_optimum_with_corners_and_firths_are_differentiable_in_both_modes(solver):
    """Under jit, and under vmap at both ends of a short way."""
    x, _ = problem()
    x, rng = x[:20], np.random.default_rng(7)
    weights = rng.uniform(0.5, 2, len(x))
    factors, labels = rng.uniform(0.5, 2, D), rng.dirichlet(np.ones(K), len(x))
    start = (np.array(0.03), np.array(0.0), factors, x, labels, weights)

    def loss(l1, l2, factors, x, labels, weights):
        penalties = {"l1": l1, "l2": l2, "penalty_factors": factors}
        penalties = penalties if solver == "proximal" else {}
        result = regression.fit(
            x, labels, solver=solver, tol=1e-11, sample_weights=weights, **penalties
        )
        kernel, bias = result.params
        return jnp.sum(jnp.sin(kernel + np.arange(float(K)))) + bias[0] - bias[1] + result.objective

    compiled = jax.jit(jax.vmap(in_both_modes(loss)))
    for l2 in (0.0, 0.05) if solver == "proximal" else (0.0,):
        tangents = [rng.normal(size=argument.shape) * 1.0 for argument in start]
        tangents[1] *= l2 > 0  # which is not negative
        centre = (start[0], np.array(l2), *start[2:])
        assert_differentiable(compiled, centre, tangents, rtol=1e-8)
