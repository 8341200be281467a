"""The excess for every length and number of rows, which must not depend on its tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import softjax
from softjax import _one_pass
from softjax._cpu_sums import (
    LONG,
    UNROLLED,
    VECTOR,
    exponentials_alone,
    place_in_tiles,
    sums_in_tiles,
)
from softjax._numerics import excess
from softjax._one_pass import excess_in_one_pass
from softjax._platforms import tracing_for
from softjax._softmax_core import softmax_tangent

AROUND = (UNROLLED, 2 * UNROLLED, 8 * VECTOR)
LENGTHS = (1, 2, 3, *(b + i for b in AROUND for i in (-1, 0, 1)), 127, 200, 215, 1000, 1009, 4987)


@pytest.mark.x64_once
@pytest.mark.parametrize(("axis", "rows"), [(-1, 2), (-1, 3), (0, LONG + 1)])
def test_every_length(axis, rows):
    rng = np.random.default_rng(0)
    tables = []
    for length in LENGTHS:
        # A dominated row, one of ties, and those that are neither.
        x = 3 * rng.standard_normal((rows, length)).astype(np.float32)
        x[0, rng.integers(length)] = 40
        x[1, rng.permutation(length)[: 1 + length // 3]] = x[1].max()
        tables.append(x)
    compiled = jax.jit(lambda tables: [excess(x, (axis % 2,)) for x in tables])
    results = compiled([np.moveaxis(x, -1, axis) for x in tables])
    for x, (m, r) in zip(tables, results, strict=True):
        expected_m, expected_r = oracles.excess(x)
        np.testing.assert_array_equal(m.ravel(), expected_m.ravel())
        # 40 - x has a rounding error of half an ulp of 40, which exp makes relative: 2e-6.
        np.testing.assert_allclose(r.ravel(), expected_r.ravel(), rtol=4e-6, atol=0)


@pytest.mark.x64_once
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_excess_in_one_pass(platform, monkeypatch):
    """On a GPU by blocks, of which the last one is incomplete; row by row, and for two axes."""
    monkeypatch.setattr(_one_pass, "ROW_OF_ONE_KERNEL", 16)
    rng = np.random.default_rng(0)
    x = 3 * rng.standard_normal((40, 1, 41)).astype(np.float32)
    x[:10, 0, rng.integers(41)] = 40
    x[10:20, 0, rng.permutation(41)[:14]] = 12
    x[20:30, 0, rng.permutation(41)[:30]] = -np.inf
    x[30, 0, 1:], x[31, 0, :-1] = -np.inf, -np.inf
    one = np.ones_like(x)
    one[..., 3] = 5
    expected_m, expected_r = oracles.excess(x)
    with tracing_for(platform):
        for axes in ((2,), (1, 2)):
            m, r, total = jax.jit(excess_in_one_pass, static_argnums=1)(x, axes, one)
            np.testing.assert_array_equal(m.ravel(), expected_m.ravel())
            np.testing.assert_allclose(r.ravel(), expected_r.ravel(), rtol=4e-6, atol=0)
            np.testing.assert_array_equal(total, np.full_like(total, 45))
        inf, nan = np.inf, np.nan
        rows = np.full((6, 41), -inf, np.float32)
        rows[:3, :2] = [[nan, -inf], [-inf, nan], [0, nan]]
        rows[3:5, :2] = [[inf, 0], [inf, inf]]
        m, r, *_ = map(np.asarray, jax.jit(excess_in_one_pass, static_argnums=1)(rows, (1,)))
        np.testing.assert_array_equal(r[:, 0], [nan, nan, nan, 0, 0, -1])
        np.testing.assert_array_equal(m[3:, 0], [inf, inf, np.finfo(np.float32).min])


@pytest.mark.x64_once
@pytest.mark.parametrize("classes", [3, 30])
def test_one_row_of_probabilities_serves_several_tangents(classes):
    rng = np.random.default_rng(0)
    logits, v = rng.standard_normal((5, 1, classes)), rng.standard_normal((5, 4, classes))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    actual = jax.jit(lambda p, v: softmax_tangent(p, v, (2,)))(p, v)
    expected = p * (v - (p * v).sum(-1, keepdims=True))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=5e-7)


@pytest.mark.x64_once
@pytest.mark.parametrize("length", [5, 67, 96, 1000])
def test_the_index_of_the_maximum(length):
    """The last of equal maxima, in a row without tiles, with some left over and without."""
    x = np.random.default_rng(0).integers(length // 3, size=(40, length)).astype(np.float32)

    @jax.jit
    def compiled(x):
        m = jnp.max(x, 1, keepdims=True)
        beside_sum = sums_in_tiles(jnp.exp(x - m), m, (1,), exponentials_alone, has_place=True)[1]
        return (place_in_tiles(x, m, 1), beside_sum), excess(x, (1,))[0]

    places, m = compiled(x)
    for actual in places:
        np.testing.assert_array_equal(actual, length - 1 - x[:, ::-1].argmax(1)[:, None])
    np.testing.assert_array_equal(m, x.max(1)[:, None])
    x[:20], x[20:] = -np.inf, np.nan
    lost = np.asarray(compiled(x)[0])
    assert np.all((lost >= 0) & (lost < length))


HALVES = {
    "softmax": lambda x: softjax.softmax(x, temperature=2.0),
    "log_softmax": lambda x: softjax.log_softmax(x, where=jnp.arange(x.shape[1]) < 30),
    "logsumexp": lambda x: softjax.logsumexp(x, -1),
    "logmeanexp": lambda x: softjax.logmeanexp(x, -1),
    "cross_entropy": lambda x: softjax.cross_entropy(
        x, jnp.arange(len(x)), label_smoothing=0.1, z_loss=0.1, weights=jnp.arange(1.0, 1 + len(x))
    ),
    "factors": lambda x: softjax.logsumexp(x, -1, b=jnp.linspace(1, 2, x.shape[1])),
    "smooth_max": lambda x: softjax.smooth_max(x, -1, temperature=2.0),
    "entropy": lambda x: softjax.information.entropy(x),
    "kl_divergence": lambda x: softjax.information.kl_divergence(
        x, (jnp.arange(x.size) % 7).reshape(x.shape).astype(x.dtype)
    ),
    "distribution": lambda x: softjax.cross_entropy(x, jnp.full_like(x, 1 / 32), reduction="mean"),
}


@pytest.mark.x64_once
@pytest.mark.compiled_quickly
@pytest.mark.parametrize("name", HALVES)
def test_derivatives_keep_half_precision_in_memory_and_compute_in_float32(name):
    function = HALVES[name]

    def gradient(x, u):
        return jax.vjp(function, x)[1](u)[0]

    def backward(x, v, u):
        value, back = jax.vjp(function, x)
        return value, back(u)[0], jax.vjp(lambda x: gradient(x, u), x)[1](v)[0]

    def forward(x, v, u):
        one = jax.jvp(function, (x,), (v,))[1]
        return one, jax.jvp(lambda x: gradient(x, u), (x,), (v,))[1]

    # Both modes in one program: JAX must not take one map for the other.
    together = jax.jit(lambda *a: (*backward(*a), *forward(*a)))
    apart = jax.jit(backward), jax.jit(forward)
    rng = np.random.default_rng(0)
    for dtype in (jnp.bfloat16, jnp.float16):
        x, v = (3 * rng.standard_normal((2, 6, 37))).astype(dtype)
        value, back = jax.eval_shape(lambda x: jax.vjp(function, x), x)
        kept = [a for a in jax.tree.leaves(back) if a.size >= x.size]
        assert kept
        assert all(a.dtype.itemsize <= 2 for a in kept)

        u = rng.standard_normal(value.shape).astype(value.dtype)
        wide = [a.astype(np.float32) for a in (x, v, u)]
        expected = [result for program in apart for result in program(*wide)]
        for actual, desired in zip(together(x, v, u), expected, strict=True):
            np.testing.assert_allclose(
                np.asarray(actual, float), desired, rtol=2 * float(jnp.finfo(dtype).eps), atol=1e-6
            )


@pytest.mark.x64_once
@pytest.mark.compiled_quickly
def test_a_mask_needs_no_infinity_of_the_dtype():
    """Most dtypes of one byte have no -inf, and one has no 0."""
    where = np.array([True, False, True])
    kinds = [getattr(jnp, name) for name in dir(jnp) if name.startswith("float8")]
    narrow = [np.array([1.0, 4.0, 2.0]).astype(kind) for kind in kinds]

    def masked(function):
        return [function(x, where=where)[..., None] for x in narrow]

    def upper_bound(x, **options):
        return softjax.smooth_max_bounds(x, **options)[1]

    for function in (softjax.logsumexp, softjax.logmeanexp, softjax.softmax, upper_bound):
        actual = jax.jit(masked, static_argnums=0)(function)
        for x, result in zip(narrow, actual, strict=True):
            expected = np.asarray(function(x[::2].astype(np.float32))).astype(x.dtype)
            kept = np.asarray(result)[::2, 0] if expected.ndim else result[0]
            np.testing.assert_array_equal(*(np.asarray(a, np.float32) for a in (kept, expected)))
    assert len(narrow) >= 7


@pytest.mark.x64_once
@pytest.mark.compiled_quickly
def test_maps_in_one_program_are_not_confused():
    """softmax and log_softmax, forward and backward, with the same operands."""
    rng = np.random.default_rng(0)
    x, v = (jnp.asarray(rng.standard_normal((4, 7)), jnp.bfloat16) for _ in range(2))

    def derivatives(function):
        return jax.jvp(function, (x,), (v,))[1], jax.vjp(function, x)[1](v)[0]

    functions = softjax.softmax, softjax.log_softmax
    together = jax.jit(lambda: [derivatives(function) for function in functions])()
    alone = [derivatives(function) for function in functions]
    jax.tree.map(np.testing.assert_array_equal, together, alone)
    assert np.abs(np.asarray(alone[1][0] - alone[1][1], float)).max() > 1


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
    m, r = jax.jit(excess, static_argnums=1)(x, axes)
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
