"""The excess at every length, beside any number of rows: its tiles are an implementation's own."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import softjax
from softjax._cpu_sums import LONG, UNROLLED, WIDE
from softjax._numerics import excess

AROUND = (UNROLLED, 2 * UNROLLED, WIDE)
LENGTHS = (1, 2, 3, *(b + i for b in AROUND for i in (-1, 0, 1)), 127, 215, 1000, 1009, 4987)


@pytest.mark.x64_once
@pytest.mark.parametrize(("axis", "rows"), [(-1, 2), (-1, 3), (0, LONG + 1)])
def test_every_length(axis, rows):
    rng = np.random.default_rng(0)
    compiled = jax.jit(lambda x: excess(x, (axis % 2,)))
    for length in LENGTHS:
        # A dominated row, one of ties, and those that are neither.
        x = 3 * rng.standard_normal((rows, length)).astype(np.float32)
        x[0, rng.integers(length)] = 40
        x[1, rng.permutation(length)[: 1 + length // 3]] = x[1].max()
        m, r = compiled(np.moveaxis(x, -1, axis))
        expected_m, expected_r = oracles.excess(x)
        np.testing.assert_array_equal(m.ravel(), expected_m.ravel())
        # 40 - x has a rounding error of half an ulp of 40, which exp makes relative: 2e-6.
        np.testing.assert_allclose(r.ravel(), expected_r.ravel(), rtol=4e-6, atol=0)


@pytest.mark.x64_once
def test_classes_in_front_stay_there():
    """An image's classes, one to a channel: no copy with the channels behind."""
    logits = jax.ShapeDtypeStruct((8, 150, 64, 64), jnp.float32)
    text = jax.jit(lambda x: excess(x, (1,))).lower(logits).compile().as_text()
    assert "transpose" not in text


@pytest.mark.x64_once
@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1), (2, 0), (2, 1), (0, 1, 2), ()])
def test_any_axes(axes):
    x = np.random.default_rng(1).standard_normal((5, 4, 30)).astype(np.float32)
    m, r = excess(jnp.asarray(x), axes)
    kept = [axis for axis in range(3) if axis not in axes]
    rows = x.transpose(*kept, *sorted(axes)).reshape([x.shape[axis] for axis in kept] + [-1])
    expected_m, expected_r = oracles.excess(rows)
    np.testing.assert_array_equal(m, expected_m.reshape(m.shape))
    np.testing.assert_allclose(r, expected_r.reshape(r.shape), rtol=1e-6, atol=1e-7)


@pytest.mark.x64_once
@pytest.mark.parametrize("shape", [(4096, 1000), (4097, 10), (64, 5000)])
def test_a_gradient_beside_it_does_not_change_the_value(shape):
    x = jnp.asarray(3 * np.random.default_rng(2).standard_normal(shape), jnp.float32)
    labels = jnp.zeros(len(x), jnp.int32)

    def losses(x):
        return softjax.cross_entropy(x, labels)

    alone = jax.jit(losses)(x)
    _, beside = jax.jit(jax.grad(lambda x: (jnp.sum(losses(x)), losses(x)), has_aux=True))(x)
    np.testing.assert_array_equal(beside, alone)


@pytest.mark.x64_once
@pytest.mark.parametrize("known", [False, True])
def test_a_batch_of_tangents_at_one_point(known):
    # p (v - sum(p v)) for one p and many v: XLA:CPU of jaxlib 0.10 is wrong, see `inner`. A p that
    # the compiler knows must not talk it out of the choice.
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2000, 10)).astype(np.float32)
    v = rng.standard_normal((3, *x.shape)).astype(np.float32)
    p = oracles.softmax(x)
    labels = jnp.zeros(len(x), jnp.int32)

    def products(x, v):
        slope = jax.grad(lambda x: jnp.sum(softjax.cross_entropy(x, labels)))
        return (
            jax.jvp(softjax.softmax, (x,), (v,))[1],
            jax.vjp(softjax.softmax, x)[1](v)[0],
            jax.jvp(slope, (x,), (v,))[1],
            jax.vjp(slope, x)[1](v)[0],
            softjax.derivatives.logsumexp_hvp(x, v),
            jax.jvp(softjax.log_softmax, (x,), (v,))[1],
        )

    if known:
        results = jax.jit(jax.vmap(lambda v: products(jnp.asarray(x), v)))(v)
    else:
        results = jax.jit(jax.vmap(products, (None, 0)))(x, v)
    centred = v - np.sum(p * v, -1, keepdims=True)
    for result in results[:-1]:
        np.testing.assert_allclose(result, p * centred, rtol=0, atol=1e-6)
    np.testing.assert_allclose(results[-1], centred, rtol=0, atol=4e-6)
