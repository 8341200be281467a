"""Derivatives up to the second order in both modes, against central differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


def check_two_orders(f, *arguments, h=1e-5):
    """In float64, compares forward mode with differences, and all other orders of modes with it."""
    arguments = tuple(map(jnp.asarray, arguments))
    rng = np.random.default_rng(0)
    v = tuple(jnp.asarray(rng.standard_normal(a.shape)) for a in arguments)

    def slope(*arguments):
        return jax.jvp(f, arguments, v)[1]

    # In the middle and at both ends of a short way along v.
    steps = h * np.array([0.0, 1.0, -1.0])
    ways = [a + np.multiply.outer(steps, t) for a, t in zip(arguments, v, strict=True)]
    values, slopes, curvatures = jax.jit(jax.vmap(lambda *a: (f(*a), *jax.jvp(slope, a, v))))(*ways)
    for exact, differing in ((slopes, values), (curvatures, slopes)):
        _, ahead, behind = np.asarray(differing)
        np.testing.assert_allclose(exact[0], (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-8)

    def total(arguments):
        return jnp.sum(f(*arguments) ** 2)

    def along(arguments):
        return jax.jvp(total, (arguments,), (v,))[1]

    def by_gradient(arguments):
        return sum(map(jnp.vdot, jax.grad(total)(arguments), v))

    @jax.jit
    def in_every_way(arguments):
        forward_over_reverse = jax.jvp(jax.grad(total), (arguments,), (v,))[1]
        curvature = sum(map(jnp.vdot, forward_over_reverse, v))
        return (
            (along(arguments), by_gradient(arguments)),
            (jax.jvp(along, (arguments,), (v,))[1], curvature),
            (jax.grad(along)(arguments), forward_over_reverse),
            (jax.grad(by_gradient)(arguments), forward_over_reverse),
        )

    for one, other in in_every_way(arguments):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), one, other)
