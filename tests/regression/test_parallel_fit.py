"""Fits to data that are sharded over 8 devices."""

import jax
import numpy as np
import optax
import oracles
import pytest
from meshes import mesh_of, put, structure

from softjax import calibration, regression, softmax

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once(True)]

N, D, K, L2 = 48, 3, 8, 0.1
RNG = np.random.default_rng(0)
FEATURES = RNG.standard_normal((N, D))
LABELS = RNG.integers(K, size=N)
SHARES = RNG.dirichlet(np.ones(K), size=N)
WEIGHTS = 0.5 + RNG.random(N)


def assert_optimal(params, shares) -> None:
    """Where the gradient is 0 are the parameters of any device: the objective is convex."""
    kernel, bias = (np.asarray(a, np.float64) for a in params)
    p = oracles.softmax(FEATURES @ kernel + bias)
    g = (WEIGHTS / WEIGHTS.sum())[:, None] * (p - shares)
    np.testing.assert_allclose(FEATURES.T @ g + L2 * kernel, 0, atol=1e-9)
    np.testing.assert_allclose(g.sum(0), 0, atol=1e-9)


def test_lbfgs_on_auto_axes():
    """Examples over one axis, the classes of their labels over the other."""
    mesh = mesh_of("auto", d=4, c=2)
    x, y, w = put(mesh, FEATURES, "d"), put(mesh, SHARES, "d", "c"), put(mesh, WEIGHTS, "d")
    result = regression.fit(x, y, sample_weights=w, solver="lbfgs", l2=L2, tol=1e-10)
    assert result.stop_reason == "converged"
    assert_optimal(result.params, SHARES)


def test_newton_on_explicit_axes_that_are_set():
    mesh = mesh_of("explicit", d=8)
    x, y, w = put(mesh, FEATURES, "d"), put(mesh, LABELS, "d"), put(mesh, WEIGHTS, "d")
    with jax.set_mesh(mesh):
        result = regression.fit(x, y, sample_weights=w, l2=L2, tol=1e-10)
        z = regression.logits(result.params, x)
    assert result.stop_reason == "converged"
    assert_optimal(result.params, np.eye(K)[LABELS])
    assert result.params.kernel.sharding.mesh == mesh
    assert jax.typeof(z).sharding.spec[0] == "d"


def test_a_fit_within_a_trace_on_explicit_axes():
    """Some of the arrays are sharded, and others are not.

    At an optimum the parameters do not move the objective, so that its derivative by the features
    is that of the loss: w_i / sum(w) (p_i - y_i) W^T.
    """

    def objective(x, w):
        result = regression.fit(x, SHARES, sample_weights=w, l2=L2, tol=1e-10)
        return result.objective, result.params

    mesh = mesh_of("explicit", d=4, c=2)
    with jax.set_mesh(mesh):
        derivative = jax.jit(jax.grad(objective, has_aux=True))
        slope, params = derivative(put(mesh, FEATURES, "d"), WEIGHTS)
    assert_optimal(params, SHARES)
    kernel, bias = map(np.asarray, params)
    p = oracles.softmax(FEATURES @ kernel + bias)
    expected = (WEIGHTS / WEIGHTS.sum())[:, None] * (p - SHARES) @ kernel.T
    np.testing.assert_allclose(slope, expected, atol=1e-9)


def test_calibration_on_explicit_axes():
    """Eagerly and in a trace, with labels and weights that are sharded otherwise than logits."""
    rng = np.random.default_rng(1)
    logits = 3 * rng.standard_normal((N, K))

    def statistics(x, y, w):
        p = softmax(x)
        return (
            calibration.calibrate_temperature(x, y, sample_weights=w),
            calibration.expected_calibration_error(p, y, sample_weights=w),
        )

    mesh = mesh_of("explicit", d=8, c=1)
    with jax.set_mesh(mesh):
        placed = put(mesh, logits, "d", "c"), LABELS, put(mesh, WEIGHTS, "c")
        over = statistics(*placed), jax.jit(statistics)(*placed)
    alone = statistics(logits, LABELS, WEIGHTS)
    for ours in over:
        np.testing.assert_allclose(ours, alone, rtol=1e-9)


def test_minibatches_are_those_of_one_device():
    options = {"l2": L2, "optimizer": optax.adam(0.05), "batch_size": 16, "epochs": 2}
    alone = regression.fit(FEATURES, LABELS, **options)
    mesh = mesh_of("explicit", d=8)
    over = regression.fit(put(mesh, FEATURES, "d"), put(mesh, LABELS, "d"), **options)
    for a, b in zip(over.params, alone.params, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_no_device_gathers_what_belongs_to_examples():
    """Sums over the examples are summed over the devices; logits [K, N] never leave theirs."""
    mesh = mesh_of("auto", d=8)
    arguments = structure(mesh, (N, D), "d"), structure(mesh, (N,), "d", dtype="int32")

    def params(x, y):
        return regression.fit(x, y, num_classes=K, l2=L2).params

    program = jax.jit(params).lower(*arguments).compile().as_text()
    assert "all-reduce" in program
    assert "all-gather" not in program
