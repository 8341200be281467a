"""Derivatives up to the second order in both modes, against central differences."""

from functools import partial

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np


def check_two_orders(f, *arguments):
    """In float64, compares forward mode with differences, and all other orders of modes with it."""
    arguments = tuple(map(jnp.asarray, arguments))
    jax.test_util.check_grads(jax.jit(f), arguments, order=2, modes=("fwd",))
    rng = np.random.default_rng(0)
    v = tuple(jnp.asarray(rng.standard_normal(a.shape)) for a in arguments)

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
