"""Functions with derivative rules of their own, within other interpreters of programs."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import jet

import softjax

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once]

X = np.array([[0.5, -1.25, 2.0, 0.0, 1.0, -3.0]])
V = np.array([[1.0, -0.5, 0.25, 2.0, -1.5, 0.75]])
# Both interpreters are imported after the function was traced.
TRACED_BEFORE = """
import jax, jax.numpy as jnp, softjax
x, f = jnp.ones((2, 3)), jax.jit(softjax.log_softmax)
f(x)
from jax.experimental import checkify, jet
assert jet.jet(f, (x,), ([x],))[1][0].shape == x.shape
error, _ = checkify.checkify(f, errors=checkify.nan_checks)(x * jnp.nan)
assert error.get() is not None
"""


def test_a_function_that_is_traced_before_an_interpreter_is_imported():
    subprocess.run([sys.executable, "-c", TRACED_BEFORE], check=True)


def test_taylor_coefficients():
    """`jax.experimental.jet`, beside the softmax of a plain quotient along the same curve."""
    x, curve = X, [V, -X, V**2]

    def plain(x):
        e = jnp.exp(x)
        return e / jnp.sum(e, -1, keepdims=True)

    def softmax_and_losses(x):
        p = softjax.softmax(x)
        return p, softjax.logsumexp(x), softjax.cross_entropy(x, p), jnp.sum(softjax.log_softmax(x))

    def of_plain(x):
        p = plain(x)
        log_p = jnp.log(p)
        lse = jnp.log(jnp.sum(jnp.exp(x)))
        return p, lse, -jnp.sum(p * log_p, -1), jnp.sum(log_p)

    with jax.enable_x64(True):
        got = jax.jit(lambda *a: jet.jet(softmax_and_losses, (a[0],), (a[1:],)))(x, *curve)
        expected = jax.jit(lambda *a: jet.jet(of_plain, (a[0],), (a[1:],)))(x, *curve)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11), got, expected)
