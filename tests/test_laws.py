"""A table of functions times a table of laws: a function that joins the table meets every law."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import oracles
import pytest
from functions import CORE, FUNCTIONS, close, in_one_program, like_jax, logits
from orders import check_two_orders

import softjax

# Where digits or equal bits are asserted, programs are compiled as users have them. The values are
# those of a CPU; tests/test_programs.py traces every function for all platforms.
pytestmark = pytest.mark.compiled_quickly
compiled_fully = pytest.mark.compiled_quickly(False)

# On both sides of where the implementation changes its method, and a length that no tile divides,
# 50257 = 29 * 1733; tests/test_numerics.py has more.
SIZES = (1, 2, 24, 25, 63, 64, 1000, 50257)


# Values


# That a call on its own has the same bits as one under jit is a law of transformations below.


@compiled_fully
@pytest.mark.parametrize("size", SIZES)
def test_value(size, dtype):
    x = logits(dtype, 2, size)
    for f, y in in_one_program(CORE)(x):
        close(y, f.oracle(x), dtype, name=f.name)


@compiled_fully
def test_value_at_scales(dtype):
    values = in_one_program(FUNCTIONS)
    for scale in (0.01, 1.0, 30.0):
        x = logits(dtype, 2, 24, scale=scale)
        for f, y in values(x):
            close(y, f.oracle(x), dtype, name=f"{f.name} at {scale}")


@compiled_fully
@pytest.mark.x64_once
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_rounded_once(dtype):
    x = jnp.asarray(logits("float32", 4, 33)).astype(dtype)
    for f, y in in_one_program(FUNCTIONS)(x):
        assert y.dtype == (jnp.float32 if f.is_loss else dtype)
        if f.is_loss:
            close(y, f.oracle(x), jnp.float32, name=f.name)
        else:
            # Half a unit for the one rounding, and a little for float32 before it. Sums near 0
            # are judged by their largest term.
            reference = f.oracle(x)
            scale = np.maximum(np.abs(reference), 1) if f.reduces else reference
            assert np.max(oracles.ulps(y, reference, scale)) <= 0.51, f.name


@pytest.mark.parametrize(
    "values",
    [
        np.array([[-128, 127, 0], [5, 3, 4]], np.int8),
        np.array([[3, 5, 0], [255, 0, 1]], np.uint8),
        np.array([[True, False, True], [True, True, True]]),
    ],
    ids=lambda values: values.dtype.name,
)
def test_integers_and_booleans_are_promoted_first(values, dtype):
    for f, y in in_one_program(FUNCTIONS)(values):
        assert y.dtype == dtype
        close(y, f.oracle(values.astype(np.float64)), dtype, name=f.name)


# Laws of the functions


@compiled_fully
@pytest.mark.x64_once
@pytest.mark.parametrize("size", [24, 40])
def test_shift(size, dtype):
    x, values = logits(dtype, 2, size), in_one_program(FUNCTIONS)
    for c in (64.0, -32.0):
        for (f, y), (_, shifted) in zip(values(x), values(x + np.asarray(c, dtype)), strict=True):
            if f.shift == 0:
                np.testing.assert_array_equal(y, shifted, err_msg=f.name)
            elif f.shift is not None:
                # The sum rounds at its own size, which a shift of 64 makes larger.
                close(shifted, np.asarray(y, np.float64) + c * f.shift, dtype, name=f.name)


@pytest.mark.x64_once
@pytest.mark.parametrize("size", [7, 40])
def test_permutation(size, dtype):
    x, values = logits(dtype, 2, size), in_one_program(FUNCTIONS)
    order = np.append(0, 1 + np.random.default_rng(1).permutation(size - 1))  # the label stays
    for (f, y), (_, permuted) in zip(values(x), values(x[:, order]), strict=True):
        close(permuted, y if f.reduces else np.asarray(y)[:, order], dtype, name=f.name)


@pytest.mark.x64_once
def test_axes_move(dtype):
    x, axes = logits(dtype, 5, 4, 7), (0, 1, -2, np.int64(2))

    def along_axes(f, *moved):
        return [f.call(a, axis=axis) for a, axis in zip(moved, (-1, *axes), strict=True)]

    moved = [np.moveaxis(x, -1, axis) for axis in axes]
    for f, (y, *others) in in_one_program(FUNCTIONS, along_axes)(x, *moved):
        for axis, other in zip(axes, others, strict=True):
            close(other, y if f.reduces else np.moveaxis(y, -1, axis), dtype, name=f.name)


@compiled_fully
@pytest.mark.x64_once
def test_rows_sum_to_one(dtype):
    values = in_one_program([f for f in FUNCTIONS if not f.reduces])
    for size in (1, 2, 24, 1000):
        for f, y in values(logits(dtype, 2, size)):
            y = np.asarray(y, np.float64)
            p = np.exp(y) if f.name.startswith("log") else y
            close(np.sum(p, -1), np.ones(2), dtype, name=f"{f.name} of {size}")


@pytest.mark.x64_once
def test_several_axes_are_one(dtype):
    x = logits(dtype, 3, 4, 5)

    def in_both_ways(f, x, first, all_in_one):
        two = f.call(x, axis=(0, -1)), f.call(first)
        return *two, f.call(x, axis=None), f.call(all_in_one)

    rows, row = np.moveaxis(x, 1, 0).reshape(4, 15), x.reshape(60)
    functions = [f for f in FUNCTIONS if not f.is_loss]
    for f, (two, of_rows, every, of_row) in in_one_program(functions, in_both_ways)(x, rows, row):
        two = np.asarray(two if f.reduces else np.moveaxis(two, 1, 0))
        close(two.reshape(of_rows.shape), of_rows, dtype, name=f.name)
        close(np.reshape(every, of_row.shape), of_row, dtype, name=f.name)


@pytest.mark.x64_once
@pytest.mark.parametrize("axis", [None, -1, (0, 2), ()])
def test_keepdims(axis, dtype):
    functions = [f for f in FUNCTIONS if f.reduces and not f.is_loss]

    def in_both_ways(f, x):
        function = getattr(softjax, f.name.partition("-")[0])
        return function(x, axis=axis, keepdims=True), function(x, axis=axis)

    x = logits(dtype, 3, 4, 5)
    for f, (kept, dropped) in in_one_program(functions, in_both_ways)(x):
        assert kept.shape == np.sum(x, axis=axis, keepdims=True).shape, f.name
        np.testing.assert_array_equal(np.reshape(kept, dropped.shape), dropped, err_msg=f.name)


@compiled_fully
@pytest.mark.x64_once
def test_where_is_slicing(dtype):
    x = logits(dtype, 2, 40)
    where = np.random.default_rng(2).permutation(40) < 24
    where[0] = True  # the label
    masked = in_one_program(FUNCTIONS, lambda f, x: f.call(x, where=where[None]))
    hidden, sliced = np.where(where, x, np.asarray(np.nan, dtype)), x[:, where]
    every = masked(x), masked(hidden), in_one_program(FUNCTIONS)(sliced)
    for (f, y), (_, of_hidden), (_, of_sliced) in zip(*every, strict=True):
        np.testing.assert_array_equal(of_hidden, y, err_msg=f.name)
        close(y if f.reduces else y[:, where], of_sliced, dtype, name=f.name)
        if not f.reduces:
            outside = -np.inf if f.name.startswith("log") else 0
            np.testing.assert_array_equal(y[:, ~where], outside, err_msg=f.name)


@pytest.mark.x64_once
def test_where_of_each_row(dtype):
    x = logits(dtype, 6, 9)
    where = np.random.default_rng(3).random(x.shape) < 0.5
    where[:, 0] = True
    for f, y in in_one_program(FUNCTIONS, lambda f, x: f.call(x, where=where))(x):
        close(y, f.oracle(x, where), dtype, name=f.name)


# Laws of transformations, in one precision: the rules do not depend on it.


@compiled_fully
@pytest.mark.x64_once
def test_eager_jit_and_vmap_agree(dtype):
    x = logits(dtype, 2, 40)

    def in_both_ways(f, x, rows):
        return f.call(x), jax.vmap(f.call)(rows)

    for f, (traced, by_row) in in_one_program(FUNCTIONS, in_both_ways)(x, x):
        eager = f.call(jnp.asarray(x))
        np.testing.assert_array_equal(traced, eager, err_msg=f.name)
        close(by_row, eager, dtype, name=f.name)


@pytest.mark.x64_once
def test_scan_and_checkpoint():
    x = logits("float32", 3, 20)

    def gradients(f, x, again):
        def total(row):
            return jnp.sum(f.call(row) ** 2)

        def scanned(x):
            step = lambda carry, row: (carry + jax.checkpoint(total)(row), None)  # noqa: E731
            return jax.lax.scan(step, jnp.zeros((), x.dtype), x)[0]

        return jax.grad(scanned)(x), jax.grad(lambda x: jnp.sum(jax.vmap(total)(x)))(again)

    for f, (of_scanned, gradient) in in_one_program(FUNCTIONS, gradients)(x, x):
        close(of_scanned, gradient, "float32", ulps=200, name=f.name)


@pytest.mark.x64_once(True)  # central differences say little in float32
def test_derivatives_agree_with_differences():
    def every(x):
        return {f.name: f.call(x) for f in FUNCTIONS}

    x = jnp.asarray(logits("float64", 2, 20, scale=1.0))
    # That both modes agree, in the second order too, is the law below.
    jax.test_util.check_grads(jax.jit(every), (x,), order=2, modes=("fwd",))


@compiled_fully
@pytest.mark.x64_once
@pytest.mark.parametrize("size", [2, 40, 50257])
def test_differentiating_keeps_the_value(size):
    x = logits("float32", 2, size)

    def in_three_ways(f, *copies):
        plain, of_vjp, of_jvp = copies
        return f.call(plain), jax.vjp(f.call, of_vjp)[0], jax.jvp(f.call, (of_jvp,), (of_jvp,))[0]

    for f, (y, of_vjp, of_jvp) in in_one_program(CORE, in_three_ways)(x, x, x):
        np.testing.assert_array_equal(of_vjp, y, err_msg=f.name)
        np.testing.assert_array_equal(of_jvp, y, err_msg=f.name)


@pytest.mark.x64_once(True)
def test_orders_of_differentiation_agree():
    x, v = (logits("float64", 6, seed=seed, scale=1.0) for seed in (0, 1))

    def in_three_ways(f, x):
        def total(x):
            return jnp.sum(f.call(x) ** 2)

        gradient = jax.grad(total)
        forward_over_reverse = jax.jvp(gradient, (x,), (jnp.asarray(v),))[1]
        reverse_over_reverse = jax.grad(lambda x: gradient(x) @ v)(x)
        reverse_over_forward = jax.grad(lambda x: jax.jvp(total, (x,), (jnp.asarray(v),))[1])(x)
        return forward_over_reverse, reverse_over_reverse, reverse_over_forward

    for f, (first, *others) in in_one_program(FUNCTIONS, in_three_ways)(x):
        for other in others:
            close(other, first, "float64", ulps=100, name=f.name)


# Contracts


@pytest.mark.every_platform
@like_jax
def test_shape_dtype_and_weak_type_are_those_of_jax(f, x64):
    # Half precision does not ask whether 64-bit types are on.
    kinds = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64) if x64 else (jnp.float32,)
    shapes = [(4,), (2, 3), (2, 0), (0, 3), (2, 3, 4)]
    arrays = [jax.ShapeDtypeStruct(shape, kind) for kind in kinds for shape in shapes]

    def results(function):
        def of_all(arrays):
            weak = function(jnp.broadcast_to(2.0, (3,)), axis=-1)
            axes = [(-1, 0, tuple(range(x.ndim))) for x in arrays]
            pairs = zip(arrays, axes, strict=True)
            return weak, [[function(x, axis=axis) for axis in few] for x, few in pairs]

        described = jax.eval_shape(of_all, arrays)
        return jax.tree.map(lambda y: (y.shape, y.dtype, y.weak_type), described)

    assert results(f.call) == results(getattr(jax.nn, f.name))


@pytest.mark.x64_once
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("return_sign", [False, True])
@pytest.mark.parametrize("kind", [jnp.bfloat16, jnp.float32])
def test_logsumexp_with_factors_is_that_of_jax(keepdims, return_sign, kind):
    a = jax.ShapeDtypeStruct((4, 1, 3), kind)

    def factored(function, b):
        result = jax.eval_shape(lambda a, b: function(a, (0, -1), b, keepdims, return_sign), a, b)
        return jax.tree.map(lambda s: (s.shape, s.dtype), result)

    for b_shape in [None, (), (3,), (2, 3), (4, 2, 3)]:
        b = None if b_shape is None else jax.ShapeDtypeStruct(b_shape, kind)
        assert factored(softjax.logsumexp, b) == factored(jax.nn.logsumexp, b)


@pytest.mark.x64_once
def test_an_empty_batch(dtype):
    def with_gradient(f, x):
        return f.call(x), jax.grad(lambda x: jnp.sum(f.call(x)))(x)

    for f, (y, gradient) in in_one_program(FUNCTIONS, with_gradient)(np.zeros((0, 5), dtype)):
        assert y.shape == ((0,) if f.reduces else (0, 5)), f.name
        assert gradient.shape == (0, 5), f.name


@pytest.mark.x64_once
def test_traces_once(dtype):
    traces = []

    def gradient(f, x):
        traces.append(f.name)
        return jax.grad(lambda x: jnp.sum(f.call(x)))(x)

    gradients = in_one_program(FUNCTIONS, gradient)
    for seed in range(3):
        gradients(logits(dtype, 2, 6, seed=seed))
    assert traces == [f.name for f in FUNCTIONS]


# Factors and signs


@compiled_fully
def test_factors_and_signs(dtype):
    rng = np.random.default_rng(5)
    x = logits(dtype, 20, 9)
    b = np.round(rng.standard_normal(x.shape) * 64).astype(dtype) / 64
    b[:, 3] = 0
    where = rng.random(x.shape) < 0.8
    value, sign = softjax.logsumexp(x, axis=-1, b=b, where=where, return_sign=True)
    expected, expected_sign = oracles.signed_logsumexp(oracles.exact(x), b, where)
    np.testing.assert_array_equal(sign, expected_sign)
    # Terms of both signs cancel by a factor of up to some hundred in these rows.
    close(value, expected, dtype, ulps=1000)
    plain = np.asarray(softjax.logsumexp(x, axis=-1, b=b, where=where))
    np.testing.assert_array_equal(np.isnan(plain), expected_sign < 0)
    np.testing.assert_array_equal(plain[expected_sign > 0], value[expected_sign > 0])


@pytest.mark.x64_once(True)
def test_factors_broadcast_and_differentiate():
    dtype = "float64"
    x = logits(dtype, 4, 5, scale=1.0)
    b = np.asarray([1.0, 0.5, 2.0, 3.0, 0.25], dtype)
    ones = softjax.logsumexp(x, axis=-1, b=np.ones((), dtype))
    close(ones, softjax.logsumexp(x, axis=-1), dtype)
    close(softjax.logsumexp(x, -1, b), softjax.logsumexp(x + np.log(b), -1), dtype)
    check_two_orders(lambda x, b: softjax.logsumexp(x, -1, b), x, b)
