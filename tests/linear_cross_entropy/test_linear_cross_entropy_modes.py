"""linear_cross_entropy under all transformations of JAX, against its plain form in float64."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_heads import plain_linear_cross_entropy

import softjax

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once(True)]

N, D, V = 9, 2, 6  # two pieces of rows, of 5 and of 4

RNG = np.random.default_rng(0)
HIDDEN, KERNEL = RNG.standard_normal((N, D)), RNG.standard_normal((D, V))
POINT = HIDDEN, KERNEL, RNG.standard_normal(V)
DIRECTION = tuple(RNG.standard_normal(np.shape(a)) for a in POINT)
WEIGHTS = RNG.random(N)
INDICES = RNG.integers(V, size=(N, 2))
LABELS: dict[str, Callable] = {
    "index": lambda: INDICES[:, 0],
    "top-k": lambda: softjax.TopKLabels(INDICES, np.full((N, 2), 0.4)),
    "distribution": lambda: np.abs(DIRECTION[0]) @ np.abs(KERNEL),
}


def modes(losses: Callable, cotangent, *point) -> dict:
    """losses(hidden, kernel, bias) and its derivatives, of both modes and two orders."""

    def f(*point):
        return jnp.sum(cotangent * losses(*point))

    gradient = jax.grad(f, (0, 1, 2))

    def squared_slope(*point):
        return sum(jnp.sum(g**2) for g in gradient(*point))

    def step(point, _):
        slope = jax.grad(jax.checkpoint(f), (0, 1, 2))(*point)
        return jax.tree.map(lambda a, g: a - 0.1 * g, point, slope), f(*point)

    hidden, *head = point
    return {
        "value": losses(*point),
        "gradient": gradient(*point),
        "jvp": jax.jvp(losses, point, DIRECTION)[1],
        "jacfwd": jax.jacfwd(losses, 2)(*point),
        "jvp of grad": jax.jvp(gradient, point, DIRECTION)[1],
        "grad of grad": jax.grad(squared_slope, (0, 1, 2))(*point),
        "vmap": jax.vmap(gradient, (0, None, None))(jnp.stack([hidden, 2 * hidden]), *head),
        "checkpoint and scan": jax.lax.scan(step, point, length=2),
    }


# The budget of one byte takes the classes one by one.
@pytest.mark.parametrize(
    ("kind", "reduction", "budget"),
    [
        ("index", "none", None),
        ("index", "sum", 1),
        ("top-k", "mean", None),
        ("distribution", "none", None),
        ("distribution", "sum", 1),
    ],
)
def test_every_mode_is_that_of_the_plain_form(kind, reduction, budget):
    """The cotangents of "none" differ, and those of the sums are not 1."""
    labels = LABELS[kind]()
    weights, cotangent = (None, WEIGHTS) if reduction == "none" else (WEIGHTS, -1.5)

    def run(function):
        def losses(hidden, kernel, bias):
            return function(
                hidden,
                kernel,
                labels,
                bias,
                reduction=reduction,
                weights=weights,
            )

        return jax.jit(partial(modes, losses, cotangent))(*map(jnp.asarray, POINT))

    fused = partial(softjax.linear_cross_entropy, max_temp_bytes=budget)
    actual, desired = run(fused), run(plain_linear_cross_entropy)
    close = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12)
    for mode in desired:
        jax.tree.map(partial(close, err_msg=mode), actual[mode], desired[mode])


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_second_derivatives_in_half_precision(reduction):
    """Beside those of the plain form in float32, of the same rounded inputs; sizes of eps 1/256."""
    labels = LABELS["index"]()
    point, direction = (
        tuple(jnp.asarray(a, jnp.bfloat16) for a in t[:2]) for t in (POINT, DIRECTION)
    )

    def products(function, point, direction):
        def f(hidden, kernel):
            return jnp.mean(function(hidden, kernel, labels, reduction=reduction))

        def squared_slope(*point):
            slopes = jax.grad(f, (0, 1))(*point)
            return sum(jnp.sum(slope.astype(jnp.float32) ** 2) for slope in slopes)

        gradient = jax.grad(f, (0, 1))
        return jax.jvp(gradient, point, direction)[1], jax.grad(squared_slope, (0, 1))(*point)

    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (point, direction))
    actual = jax.jit(partial(products, softjax.linear_cross_entropy))(point, direction)
    desired = jax.jit(partial(products, plain_linear_cross_entropy))(*wide)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        assert a.dtype == jnp.bfloat16
        atol = 4 / 256 * float(jnp.max(jnp.abs(b)))
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0, atol=atol)
