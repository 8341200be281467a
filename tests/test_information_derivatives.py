"""The derivatives of entropies, against their definitions in 200-bit arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from entropies import (
    OF_ONE,
    OF_TWO,
    cross_entropy_target_gradient,
    entropy_gradient,
    entropy_hessian,
    kl_divergence,
    kl_target_gradient,
    kl_target_hessian,
    logits,
    of_two,
    pairs,
    roundings,
)
from oracles import exact, rounded
from orders import check_two_orders

from softjax import information

# Where digits or equal bits are asserted, programs are compiled as users have them.
pytestmark = pytest.mark.compiled_quickly
compiled_fully = pytest.mark.compiled_quickly(False)


@compiled_fully
@pytest.mark.parametrize("n", [2, 10, 100])
def test_entropy_gradient(n, dtype):
    # Each mode has an argument of its own, so that the program shares nothing between them.
    @jax.jit
    def gradients(x, y):
        return jax.jacfwd(information.entropy)(x), jax.jacrev(information.entropy)(y)

    for scale in (0.1, 1.0, 10.0):
        x = logits(dtype, n, scale=scale)
        d = exact(x) - exact(x).max()
        p = oracles.softmax(exact(x))
        # p_i (x_i - <p, x>): the difference may cancel, so its two terms are the scale.
        size = p * (np.abs(d) + (p * np.abs(d)).sum())
        expected, bound = entropy_gradient(exact(x)), 8 + rounded(np.abs(d)).max()
        for gradient in gradients(x, x):
            assert roundings(gradient, expected, size) <= bound


@compiled_fully
@pytest.mark.x64_once
def test_gradients_of_two(dtype):
    # Each mode has arguments of its own, so that the program shares nothing between them.
    @jax.jit
    def gradients(pairs):
        return [
            [mode(f, (0, 1))(*pair) for f in (information.kl_divergence, information.cross_entropy)]
            for mode, pair in zip((jax.jacfwd, jax.jacrev), pairs, strict=True)
        ]

    for t, x in pairs(dtype):
        exact_t, exact_x = exact(t), exact(x)
        p, q = oracles.softmax(exact_t), oracles.softmax(exact_x)
        top, bound = np.argmax(t), 8 + np.ptp(t) + np.ptp(x)
        c = exact_x - exact_t
        ratio, distance = np.abs(c - c[top]), np.abs(exact_x - exact_x[top])
        spread = ratio + (p * ratio).sum()

        # Where q and p are near, q - p counts in their ratio, else in themselves.
        near = np.maximum(p, q) * (spread + kl_divergence(exact_t, exact_x))
        size = np.minimum(4 * near, p + q)
        of_kl = kl_target_gradient(exact_t, exact_x)
        of_cross = cross_entropy_target_gradient(exact_t, exact_x)
        scale = p * (distance + (p * distance).sum())
        for of_mode in gradients([(t, x), (t, x)]):
            (by_t, by_x), of_cross_entropy = of_mode
            assert roundings(by_t, of_kl, p * spread) <= bound
            assert roundings(by_x, q - p, size) <= bound
            by_t, by_x = of_cross_entropy
            assert roundings(by_t, of_cross, scale) <= bound
            assert roundings(by_x, q - p, size) <= bound


# A sure p and q with the same top, with different tops, an even p, nearly equal ones, any two.
SECOND_T = [[0, -20, -18], [0, -20, -25], [0.5, 0, 0.25], [1, 0.5, -1], [0, 3, -2]]


SECOND_X = [[0, -18, -20], [0.5, 9, 0], [0, -20, -25], [1, 0.5 + 2**-12, -1], [2, -1, 0]]


@pytest.mark.x64_once
@pytest.mark.parametrize(
    "hessian",
    [lambda f, i: jax.jacfwd(jax.jacrev(f, i), i), lambda f, i: jax.jacrev(jax.jacfwd(f, i), i)],
    ids=["forward over reverse", "reverse over forward"],
)
def test_second_derivatives(hessian, dtype):
    t, x = (np.array(rows, dtype) for rows in (SECOND_T, SECOND_X))
    each_t, each_x = [exact(row) for row in t], [exact(row) for row in x]
    covariance_t, covariance_x = (np.abs(oracles.hessian(exact(rows))) for rows in (t, x))
    gap_t, gap_x = (np.ptp(rows, -1)[:, None, None] for rows in (t, x))

    def check(f, argument, expected, size):
        actual = jax.jit(jax.vmap(hessian(f, argument)))(t, x)
        error = np.abs(rounded(exact(actual) - np.stack(expected)))
        # Entries of the size of the products of probabilities and gaps that they consist of.
        assert np.all(error <= 20 * float(jnp.finfo(dtype).eps) * rounded(size))

    expected = [entropy_hessian(row) for row in each_t]
    check(lambda t, x: information.entropy(t), 0, expected, covariance_t * (1 + gap_t))
    expected = [kl_target_hessian(*rows) for rows in zip(each_t, each_x, strict=True)]
    size = covariance_t * (1 + gap_t + gap_x)
    check(information.kl_divergence, 0, expected, size)
    for f in OF_TWO.values():
        check(f, 1, [oracles.hessian(row) for row in each_x], covariance_x)


@pytest.mark.x64_once
def test_mixed_derivatives_of_two(dtype):
    t, x = (np.array(rows[0], dtype) for rows in (SECOND_T, SECOND_X))
    for f in OF_TWO.values():
        mixed = jax.jacfwd(jax.grad(f, 1), 0)(t, x)
        assert oracles.ulps(mixed, -oracles.hessian(exact(t))).max() <= 8


@pytest.mark.x64_once(True)  # finite differences say something in float64 only
@pytest.mark.parametrize("f", [*OF_ONE.values(), *OF_TWO.values(), information.temper])
def test_two_orders_in_both_modes(f):
    arguments = (logits("float64", 4), logits("float64", 4, seed=1))
    if f in OF_ONE.values():
        arguments = arguments[:1]
    elif f is information.temper:
        arguments = (arguments[0], 1.5)
    check_two_orders(f, *arguments)


@compiled_fully
@pytest.mark.x64_once
@of_two
def test_differentiating_does_not_change_the_value(f, dtype):
    t, x = logits(dtype, 7), logits(dtype, 7, seed=1)
    assert jax.value_and_grad(f, (0, 1))(t, x)[0] == f(t, x)
    assert jax.value_and_grad(information.entropy)(x)[0] == information.entropy(x)
