"""The closed forms against autodiff of the same functions and against 200-bit arithmetic."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import softjax
from softjax import derivatives

# Where digits or equal bits are asserted, programs are compiled as users have them.
pytestmark = pytest.mark.compiled_quickly
compiled_fully = pytest.mark.compiled_quickly(False)

# Rows of 6 classes: ordinary, dominated by 20 to 60, two on top, a tie, and one class without mass.
ROWS = np.array(
    [
        [0.5, -1.25, 2.0, 0.0, 1.0, -3.0],
        [0.0, -20.0, -21.0, -25.0, -20.5, -30.0],
        [3.0, -37.0, -38.0, -40.0, -37.5, -39.0],
        [60.0, 0.0, 1.0, -1.0, 0.5, 0.25],
        [10.0, 9.5, -30.0, -31.0, -20.0, -25.0],
        [2.0, 2.0, 2.0, 2.0, 2.0, 2.0],
        [0.0, 1.0, -np.inf, 2.0, -1.0, 0.25],
    ]
)
LABELS = np.array([2, 0, 0, 0, 1, 5, 3])
V = np.array([1.0, -0.5, 0.25, 2.0, -1.5, 0.75])


@pytest.fixture
def x(dtype):
    return jnp.asarray(ROWS, dtype)


@pytest.fixture
def v(x):
    return np.broadcast_to(V.astype(x.dtype), x.shape)


def gaps():
    """From each entry to the top, at least that of the runner-up: what each exponential costs."""
    finite = np.where(np.isfinite(ROWS), ROWS, ROWS.max(-1, keepdims=True))
    runner_up = np.sort(ROWS, -1)[:, -2:-1]
    top = ROWS.max(-1, keepdims=True)
    return np.maximum(top - finite, top - runner_up)


def within(actual, exact, units) -> None:
    """Entry by entry within `units` roundings, relative to the entry."""
    exact = oracles.rounded(exact)
    actual = np.asarray(actual)
    eps = float(jnp.finfo(actual.dtype).eps)
    actual = actual.astype(np.float64)
    np.testing.assert_array_less(np.abs(actual - exact), units * eps * np.abs(exact) + 1e-37)


def cross_terms(y):
    """What the vector form adds up: H v is a sum over k of H_ik v_k."""
    return np.abs(oracles.rounded(y)) @ np.abs(V)


# Against 200 bits


@compiled_fully
@pytest.mark.parametrize(
    "closed_form", [derivatives.softmax_jacobian, derivatives.logsumexp_hessian]
)
def test_hessian_is_exact_entry_by_entry(closed_form, x):
    hessian = np.asarray(closed_form(x))
    units = 10 + gaps()[:, :, None] + gaps()[:, None, :]
    within(hessian, oracles.hessian(oracles.exact(ROWS)), units)
    np.testing.assert_array_equal(hessian, hessian.swapaxes(-1, -2))
    assert_positive_semidefinite(hessian)


@pytest.mark.x64_once
@pytest.mark.parametrize("scale", [1.0, 20.0, 40.0])
def test_hessians_are_positive_semidefinite(scale, dtype):
    x = jnp.asarray(scale * np.random.default_rng(0).standard_normal((60, 6)), dtype)
    assert_positive_semidefinite(derivatives.logsumexp_hessian(x))


def assert_positive_semidefinite(hessian):
    eigenvalues = np.linalg.eigvalsh(np.asarray(hessian, np.float64))
    assert np.all(eigenvalues[..., 0] >= -1e-6 * eigenvalues[..., -1])


@compiled_fully
def test_gradients_are_exact_entry_by_entry(x):
    exact = oracles.exact(ROWS)
    one_hot = np.eye(6, dtype=x.dtype)[LABELS]
    sparse = softjax.TopKLabels(LABELS[:, None], np.ones((len(ROWS), 1), x.dtype))

    @jax.jit
    def gradients(x):
        of_losses = [
            derivatives.cross_entropy_gradient(x, labels) for labels in (LABELS, one_hot, sparse)
        ]
        return derivatives.logsumexp_gradient(x), of_losses

    gradient, of_losses = gradients(x)
    within(gradient, oracles.softmax(exact), 5 + gaps())
    for of_loss in of_losses:
        within(of_loss, oracles.cross_entropy_gradient(exact, LABELS), 6 + gaps())


@compiled_fully
def test_products_with_the_hessian_are_exact(x, v):
    hessian = oracles.hessian(oracles.exact(ROWS))
    expected = oracles.rounded(hessian @ oracles.exact(V))
    # Relative to what is added up; exact terms would leave a few roundings and the gaps.
    scale = cross_terms(hessian) * (10 + 2 * gaps().max(-1, keepdims=True))
    eps = float(jnp.finfo(x.dtype).eps)
    labels = jnp.asarray(LABELS)
    for product in (
        derivatives.softmax_jvp(x, v),
        derivatives.softmax_vjp(x, v),
        derivatives.logsumexp_hvp(x, v),
        derivatives.cross_entropy_hvp(x, labels, v),
    ):
        error = np.abs(np.asarray(product, np.float64) - expected)
        np.testing.assert_array_less(error, eps * scale + 1e-37)


@compiled_fully
def test_square_root(x):
    root = np.asarray(derivatives.logsumexp_hessian_sqrt(x), np.float64)
    hessian = oracles.rounded(oracles.hessian(oracles.exact(ROWS)))
    eps = float(jnp.finfo(x.dtype).eps)
    # Relative to the terms of each sum, for which the rows of S are measured.
    size = np.linalg.norm(root, axis=-1)
    bound = 100 * eps * size[:, :, None] * size[:, None, :]
    assert np.all(np.abs(root @ root.swapaxes(-1, -2) - hessian) <= bound + 1e-37)


@pytest.mark.x64_once(True)
def test_pseudoinverse_meets_the_conditions_of_penrose(dtype):
    # In 200 bits, with the error of the rounded inverse magnified by the condition number.
    for row in (ROWS[0], ROWS[5], ROWS[6], [0.0, -4.0, 1.0], [0.0, 9.0]):
        pinv = derivatives.logsumexp_hessian_pinv(jnp.asarray(row, dtype))
        np.testing.assert_array_equal(pinv, np.asarray(pinv).T)
        a, b = oracles.hessian(oracles.exact(row)), oracles.exact(pinv)
        condition = np.linalg.norm(oracles.rounded(a)) * np.linalg.norm(oracles.rounded(b))
        eps = 100 * condition * float(jnp.finfo(dtype).eps)
        for left, right in ((a @ b @ a, a), (b @ a @ b, b), ((a @ b).T, a @ b), ((b @ a).T, b @ a)):
            size = np.linalg.norm(oracles.rounded(right))
            assert np.linalg.norm(oracles.rounded(left - right)) <= eps * size


@compiled_fully
def test_cumulants_are_exact(x, v):
    exact = oracles.exact(ROWS)
    expected = oracles.cumulants(exact, v, 4)
    eps = float(jnp.finfo(x.dtype).eps)
    for order in (1, 2, 3, 4):
        actual = np.asarray(derivatives.log_partition_cumulants(x, v, order), np.float64)
        assert actual.shape == (len(ROWS), order)
        p = oracles.softmax(exact)
        mean = (p * oracles.exact(V)).sum(-1, keepdims=True)
        size = [np.abs(V).max() * np.ones(len(ROWS))]
        for n in (2, 3, 4):
            size.append(oracles.rounded((p * np.abs(oracles.exact(V) - mean) ** n).sum(-1)))
        for n in range(order):
            error = np.abs(actual[:, n] - oracles.rounded(expected[n]))
            # A central moment is judged by its absolute moment; kappa_4 subtracts 3 kappa_2^2.
            bound = size[n] + (3 * size[1] ** 2 if n == 3 else 0)
            assert np.all(error <= (40 + gaps().max(-1)) * eps * bound)


# Against autodiff


@pytest.mark.x64_once
def test_jacobian_is_that_of_autodiff(x):
    expected = derivatives.softmax_jacobian(x)
    units = 20 + 2 * gaps()[:, :, None] + 2 * gaps()[:, None, :]
    for mode in (jax.jacfwd, jax.jacrev):
        within(jax.jit(jax.vmap(mode(softjax.softmax)))(x), expected, units)


@pytest.mark.x64_once
def test_hessian_is_that_of_autodiff(x):
    expected = derivatives.logsumexp_hessian(x)
    units = 20 + 2 * gaps()[:, :, None] + 2 * gaps()[:, None, :]
    within(jax.jit(jax.vmap(jax.hessian(softjax.logsumexp)))(x), expected, units)
    reverse_twice = jax.vmap(jax.jacrev(jax.jacrev(softjax.logsumexp)))
    within(jax.jit(reverse_twice)(x), expected, units)
    loss = jax.vmap(jax.hessian(softjax.cross_entropy))
    within(jax.jit(loss)(x, jnp.asarray(LABELS)), expected, units)
    expected = derivatives.cross_entropy_hessian(x, jnp.asarray(LABELS))
    within(jax.jit(loss)(x, jnp.asarray(LABELS)), expected, units)


@pytest.mark.x64_once
def test_gradients_are_those_of_autodiff(x):
    gradient = jax.jit(jax.vmap(jax.grad(softjax.logsumexp)))(x)
    within(gradient, derivatives.logsumexp_gradient(x), 10 + 2 * gaps())
    labels = jnp.asarray(LABELS)
    gradient = jax.jit(jax.vmap(jax.grad(softjax.cross_entropy)))(x, labels)
    within(gradient, derivatives.cross_entropy_gradient(x, labels), 10 + 2 * gaps())


@pytest.mark.x64_once(True)
def test_products_and_cumulants_are_those_of_autodiff():
    x, v = ROWS[0], V

    @jax.jit
    def by_autodiff(x, v):
        orders = [lambda t: softjax.logsumexp(x + t * v)]
        for _ in range(4):
            orders.append(jax.grad(orders[-1]))
        return (
            [order(0.0) for order in orders[1:]],
            jax.jvp(jax.grad(softjax.logsumexp), (x,), (v,))[1],
            jax.jvp(softjax.softmax, (x,), (v,))[1],
            jax.vjp(softjax.softmax, x)[1](v)[0],
        )

    cumulants, *products = by_autodiff(x, v)
    np.testing.assert_allclose(derivatives.log_partition_cumulants(x, v, 4), cumulants, rtol=1e-12)
    closed_forms = derivatives.logsumexp_hvp, derivatives.softmax_jvp, derivatives.softmax_vjp
    for closed_form, product in zip(closed_forms, products, strict=True):
        np.testing.assert_allclose(closed_form(x, v), product, rtol=1e-13)


@pytest.mark.x64_once(True)
def test_a_distribution_of_any_mass():
    x, q = ROWS[:2], np.random.default_rng(1).uniform(0, 1, (2, 6))
    gradient = jax.jit(jax.vmap(jax.grad(softjax.cross_entropy)))(x, q)
    np.testing.assert_allclose(derivatives.cross_entropy_gradient(x, q), gradient, rtol=1e-12)
    hessian = np.asarray(jax.jit(jax.vmap(jax.hessian(softjax.cross_entropy)))(x, q))
    np.testing.assert_allclose(derivatives.cross_entropy_hessian(x, q), hessian, rtol=1e-12)
    product = derivatives.cross_entropy_hvp(x, q, np.broadcast_to(V, x.shape))
    np.testing.assert_allclose(product, hessian @ V, rtol=1e-12)


# Contracts


CLOSED_FORMS = {
    "softmax_jacobian": 0,
    "logsumexp_gradient": 0,
    "logsumexp_hessian": 0,
    "logsumexp_hessian_sqrt": 0,
    "logsumexp_hessian_pinv": 0,
    "softmax_jvp": 1,
    "softmax_vjp": 1,
    "logsumexp_hvp": 1,
    "log_partition_cumulants": 1,
}


@compiled_fully
@pytest.mark.x64_once
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_half_precision_batches_and_misuse(name):
    function = getattr(derivatives, name)
    x = np.asarray(ROWS[:1]).astype(jnp.bfloat16)
    vectors = [np.ones_like(x)] * CLOSED_FORMS[name]
    y = np.asarray(function(x, *vectors))
    wide = function(*(a.astype(np.float32) for a in (x, *vectors)))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, np.asarray(wide).astype(jnp.bfloat16))
    np.testing.assert_array_equal(jax.jit(function)(x, *vectors), y)
    np.testing.assert_array_equal(function(x[0], *(v[0] for v in vectors)), y[0])
    with pytest.raises(ValueError, match=rf"{name}: `logits`"):
        function(jnp.zeros(()), *vectors)
    with pytest.raises(TypeError, match=rf"{name}: `logits`.*complex"):
        function(x.astype(np.complex64), *vectors)
    if vectors:
        with pytest.raises(ValueError, match=rf"{name}: `\w+` must be of shape \(1, 6\)"):
            function(x, vectors[0][0])


@pytest.mark.x64_once
def test_misuse_of_the_loss_and_of_cumulants():
    x = jnp.zeros((2, 3))
    orders: list[tuple[Any, type]] = [(0, ValueError), (5, ValueError), (1.5, TypeError)]
    for order, error in orders:
        with pytest.raises(error, match="`order` must be"):
            derivatives.log_partition_cumulants(x, x, order)
    for function in (derivatives.cross_entropy_gradient, derivatives.cross_entropy_hessian):
        with pytest.raises(ValueError, match=r"`labels` must be in \[0, 3\)"):
            function(x, jnp.asarray([0, 3]))
        with pytest.raises(ValueError, match=r"`labels` must be of shape \(2,\)"):
            function(x, jnp.asarray([0]))
        traced = jax.jit(function)(x, jnp.asarray([0, 3]))
        assert np.all(np.isnan(traced[1]))
        assert np.all(np.isfinite(traced[0]))
