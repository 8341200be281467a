"""Features far from 0, and single entries that are much larger than all others."""

import functools

import jax
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from sparse_rows import sparse_rows
from test_separation import by_linear_program

from softjax import regression, streaming

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.usefixtures("compiled_fits")]

K = 3
SEPARATED = (regression.SEPARATED, regression.QUASI_SEPARATED)


def objective(params, x, y, l2):
    """In float64, of features less an offset that the bias takes."""
    kernel, bias = (np.asarray(leaf, np.float64) for leaf in params)
    loss = -scipy.special.log_softmax(x @ kernel + bias, 1)[np.arange(len(x)), y].mean()
    return loss + l2 / 2 * np.sum(kernel**2)


def once(function):
    """The function, which computes its result for equal arrays once, whatever the solver."""
    results = {}

    def call(*arrays_and_numbers):
        key = tuple(np.asarray(a).tobytes() for a in arrays_and_numbers)
        if key not in results:
            results[key] = function(*arrays_and_numbers)
        return results[key]

    return call


@once
def least_objective(x, y, l2):
    """By SciPy in float64, from features that have a mean near 0."""
    shape = (x.shape[1] + 1, K)

    def value_and_gradient(theta):
        theta = theta.reshape(shape)
        p = scipy.special.softmax(x @ theta[:-1] + theta[-1], 1)
        residual = (p - np.eye(K)[y]) / len(x)
        slope = np.vstack([x.T @ residual + l2 * theta[:-1], residual.sum(0)])
        return objective((theta[:-1], theta[-1]), x, y, l2), slope.ravel()

    start = np.zeros(shape).ravel()
    options = {"maxiter": 5000, "maxfun": 10000, "ftol": 1e-15, "gtol": 1e-10}
    return scipy.optimize.minimize(
        value_and_gradient, start, jac=True, method="L-BFGS-B", options=options
    ).fun


@pytest.mark.x64_once(True)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("solver", ["newton-cg", "lbfgs", "proximal"])
def test_sparse_features_far_from_0_reach_the_optimum(solver, dtype):
    """Columns that store every place, of any offset, beside one-hot columns."""
    rng = np.random.default_rng(0)
    x = np.c_[rng.normal(size=(200, 2)), np.eye(2)[rng.integers(2, size=200)]]
    y = (x[:, :K] + rng.gumbel(size=(200, K))).argmax(1)
    for offset in (0.0, 300.0, -1e4) if dtype == "float32" else (0.0, 1e4, -1e6):
        far = (x + offset * (np.arange(4) < 2)).astype(dtype)
        near = far.astype(np.float64) - offset * (np.arange(4) < 2)
        best = least_objective(near, y, 0.01)
        rows = sparse_rows(far)
        result = regression.fit(rows, y, l2=0.01, solver=solver)
        assert result.converged
        assert result.objective == pytest.approx(best, rel=1e-5)
        if (solver, dtype) == ("lbfgs", "float32"):  # which needs the precision most
            many = regression.fit_many(rows, y, l2=np.array([0.01]))
            assert many.converged
            np.testing.assert_allclose(many.objective, best, rtol=1e-5)


@functools.partial(jax.jit, static_argnums=(1, 2))
def in_a_trace(x, y, l2):
    return regression.fit(x, np.array(y), num_classes=K, l2=l2)


def fit_in_float32(way, x, y, l2):
    """The parameters of a fit and why it stopped."""
    if way == "fit_many":
        fits = regression.fit_many(x, np.stack([y, y]), l2=l2)
        return jax.tree.map(lambda leaf: leaf[0], fits.params), fits.stop_reason[0]
    if way == "streaming":
        result = streaming.fit(streaming.ArrayRows(x, y), num_classes=K, l2=l2)
    elif way == "jit":
        result = in_a_trace(x, tuple(y.tolist()), l2)
    else:
        x = sparse_rows(x) if way == "sparse" else x
        solver = "newton-cg" if way == "sparse" else way
        result = regression.fit(x, y, solver=solver, l2=l2)
    return result.params, result.stop_reason


@pytest.mark.x64_once
@pytest.mark.parametrize(
    "way",
    ["newton-cg", "newton", "lbfgs", "proximal", "optax", "sparse", "fit_many", "streaming", "jit"],
)
def test_float32_features_far_from_0_reach_the_optimum_or_say_that_they_do_not(way):
    """Of any offset and sign: rounding of the bias, of its size, may be all that is left."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(200, 4))
    y = (base[:, :K] + rng.gumbel(size=(200, K))).argmax(1)
    base[7, 1] = 50.0
    for offset in (3e2, -1e4, 1e6, -3e6):
        far = (base + offset * np.array([1, -1, 0.3, -0.6])).astype(np.float32)
        middle = np.median(far.astype(np.float64), 0)
        near = far - middle
        best = least_objective(near, y, 0.01)
        params, reason = fit_in_float32(way, far, y, 0.01)
        kernel, bias = (np.asarray(leaf, np.float64) for leaf in params)
        reached = objective((kernel, bias + middle @ kernel), near, y, 0.01)
        if abs(offset) <= 1e4 and way != "optax":  # whose line search may end before
            assert reason == regression.CONVERGED
        if reason == regression.CONVERGED:
            assert reached <= best * (1 + 1e-5)
        # A bias of 1e6 is known to a thirtieth.
        assert reached <= best * (1 + 1e-2)


@pytest.mark.x64_once
@pytest.mark.parametrize("solver", ["newton-cg", "lbfgs"])
def test_wide_float32_features_far_from_0_beside_rows_without_weight(solver):
    """More features than examples; rows of weight 0, as of padding, are 0 and not far."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(12, 48)) + 1e4).astype(np.float32)
    y = rng.permutation(np.arange(12) % K)
    near = x.astype(np.float64) - 1e4
    padded, weights = np.vstack([0 * x, x]), np.repeat([0.0, 1.0], 12)
    result = regression.fit(padded, np.tile(y, 2), sample_weights=weights, solver=solver, l2=0.1)
    assert result.stop_reason in (regression.CONVERGED, regression.PRECISION_FLOOR)
    kernel, bias = (np.asarray(leaf, np.float64) for leaf in result.params)
    reached = objective((kernel, bias + 1e4 * kernel.sum(0)), near, y, 0.1)
    best = least_objective(near, y, 0.1)
    assert reached <= best * (1 + (1e-5 if result.converged else 1e-2))


@once
def by_newton(x, y, l2):
    """The least objective, by damped Newton's steps on features over their median deviation.

    In these units the Hessian of all but the one example is of order 1, and residuals that sum to 0
    over the classes are no differences of numbers near 1.
    """
    middle = np.median(x, 0)
    unit = np.median(abs(x - middle), 0)
    z = np.c_[(x - middle) / unit, np.ones(len(x))]
    width, ridge = z.shape[1], np.append(l2 / unit**2, 0)

    def value(theta):
        loss = -scipy.special.log_softmax(z @ theta, 1)[np.arange(len(x)), y].mean()
        return loss + np.sum(ridge[:, None] * theta**2) / 2

    theta = np.zeros((width, K))
    for _ in range(100):
        p = scipy.special.softmax(z @ theta, 1)
        residual = p - np.eye(K)[y]
        residual = np.where(p > 0.5, residual - residual.sum(1, keepdims=True), residual)
        slope = z.T @ residual / len(x) + ridge[:, None] * theta
        h = np.zeros((K, width, K, width))
        for k in range(K):
            for other in set(range(K)) - {k}:
                h[k, :, other] = -(z.T * p[:, k] * p[:, other]) @ z / len(x)
            h[k, :, k] = np.diag(ridge) - h[k].sum(1)
        h = h.reshape(K * width, -1)
        size = np.sqrt(np.diag(h))
        step = np.linalg.lstsq(h / size / size[:, None], slope.T.ravel() / size, rcond=1e-13)[0]
        step, length = -(step / size).reshape(K, width).T, 1.0
        while length > 1e-9 and value(theta + length * step) > value(theta) * (1 + 1e-14):
            length /= 2
        theta = theta + length * step
        if np.abs(length * z @ step).max() < 1e-7:
            break
    return value(theta)


@pytest.mark.x64_once(True)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("solver", ["newton-cg", "newton", "lbfgs"])
def test_one_enormous_entry_ends_at_the_optimum_or_is_said_not_to(solver, dtype):
    """On the way its example becomes decided, by a nat a step, while the others look at rest."""
    for seed, size in enumerate((1e3, 999999.0, -999999.0, 1e9)):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(200, 4))
        y = (x[:, :K] + rng.gumbel(size=(200, K))).argmax(1)
        x[7, 1] = size
        x = x.astype(dtype)
        for l2 in (0.0, 0.01):
            result = regression.fit(x, y, l2=l2, solver=solver)
            assert result.stop_reason not in SEPARATED
            if result.converged:
                value = objective(result.params, x.astype(np.float64), y, l2)
                assert value == pytest.approx(by_newton(x.astype(float), y, l2), rel=1e-5)


@pytest.mark.x64_once(True)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_separation_is_proven_where_a_linear_program_finds_it_and_nowhere_else(dtype):
    """With heavy tails and enormous entries, separated and not; a missed proof may be a floor."""
    found = {True: 0, False: 0}
    for seed in range(24):
        rng = np.random.default_rng(seed)
        x = rng.standard_t(1.5, size=(40, 3)) if seed % 2 else rng.normal(size=(40, 3))
        y = (x[:, 0] + x[:, 1] + (seed % 3) * 2 * rng.normal(size=40) > 0).astype(int)
        if seed % 4 < 2:
            x[rng.integers(40), rng.integers(3)] = (999999.0, -1e6, 1e9)[seed % 3]
        if seed % 5 == 0:  # a rare level, which one class has alone
            x[:, 2] = rng.random(40) < 0.15
            y[x[:, 2] == 1] = 0
        x = x.astype(dtype)
        expected = by_linear_program(x.astype(np.float64), y, 2)
        result = regression.fit(x, y, num_classes=2)
        separated = result.stop_reason in SEPARATED
        if separated:
            assert expected in SEPARATED, seed
        if expected in SEPARATED:
            assert not result.converged, seed
        found[separated] += 1
    assert min(found.values()) >= 4
