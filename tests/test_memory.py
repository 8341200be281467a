"""The memory of the normalizers and the loss: what is kept, and the temporaries of programs."""

import re

import jax
import jax.numpy as jnp
import pytest

import softjax

pytestmark = pytest.mark.x64_once


def residuals(function, x) -> int:
    """Bytes that the backward pass keeps, beyond its input."""
    pullback = jax.eval_shape(lambda x: jax.vjp(function, x)[1], x)
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback)]
    return sum(sizes)


def test_residuals_are_at_most_one_array_of_probabilities():
    # And some numbers a row, and a mask of booleans.
    n, k = 8, 1000
    x, labels = jnp.zeros((n, k)), jnp.zeros(n, jnp.int32)
    for function in (
        lambda x: softjax.logsumexp(x, axis=-1),
        softjax.softmax,
        softjax.log_softmax,
        lambda x: softjax.cross_entropy(x, labels),
    ):
        assert residuals(function, x) <= 4 * (n * k + 4 * n) + n * k // 8


def test_no_temporary_as_large_as_the_logits():
    labels = jnp.zeros(256, jnp.int32)

    def share(function, classes):
        """The bytes of all temporaries over those of the logits."""
        x = jnp.zeros((256, classes))
        analysis = jax.jit(function).lower(x).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes / x.nbytes

    # Two sums for each column of the tiles, which are at least 8 high.
    assert share(lambda x: softjax.logsumexp(x, axis=-1), 8192) <= 0.3
    assert share(lambda x: softjax.cross_entropy(x, labels), 8192) <= 0.3
    # The tiles of a row leave one class over. With jaxlib 0.12 the exponentials are a temporary.
    both = jax.value_and_grad(lambda x: jnp.mean(softjax.cross_entropy(x, labels)))
    assert share(both, 8193) <= share(both, 8192) + 0.3


def test_a_jvp_on_a_cpu_writes_the_exponentials_and_no_products():
    x, labels = jnp.zeros((32, 1000)), jnp.zeros(32, jnp.int32)
    for function in (
        lambda x: softjax.logsumexp(x, axis=-1),
        lambda x: softjax.cross_entropy(x, labels),
    ):
        derivative = jax.jit(lambda x, v, f=function: jax.jvp(f, (x,), (v,)))
        program = derivative.lower(x, x).compile().as_text()
        assert program is not None
        main = program[program.index("ENTRY") :]
        assert len(re.findall(r"= f32\[32,1000\]\S* fusion", main)) == 1
