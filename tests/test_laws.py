"""A table of functions times a table of laws: a function that joins the table meets every law."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import oracles
import pytest
from orders import check_two_orders

import softjax

# Where digits or equal bits are asserted, programs are compiled as users have them. The values are
# those of a CPU; tests/test_programs.py traces every function for all platforms.
pytestmark = pytest.mark.compiled_quickly
compiled_fully = pytest.mark.compiled_quickly(False)

# On both sides of where the implementation changes its method, and a length that no tile divides,
# 50257 = 29 * 1733; tests/test_numerics.py has more.
SIZES = (1, 2, 24, 25, 63, 64, 1000, 50257)


class Function(NamedTuple):
    """A function of logits, over one axis; a loss has the label 0 in every row."""

    name: str
    call: Callable[..., jax.Array]  # (x, axis=-1, where=None)
    oracle: Callable[..., np.ndarray]  # (x, where=None)
    reduces: bool  # the class axis
    shift: float | None  # what it gains where every logit gains 1; None: no such law

    @property
    def is_loss(self) -> bool:
        return self.name.startswith("cross_entropy")


def normalizer(name: str, reduces: bool, shift: float, **options) -> Function:
    function, oracle = getattr(softjax, name), getattr(oracles, name)
    return Function(
        "-".join([name, *options]),
        lambda x, axis=-1, where=None: function(x, axis=axis, where=where, **options),
        lambda x, where=None: oracle(x, where, **options),
        reduces,
        shift,
    )


def loss(**options) -> Function:
    def call(x, axis=-1, where=None):
        labels = jnp.zeros(np.delete(x.shape, axis), jnp.int32)
        return softjax.cross_entropy(x, labels, axis, where, **options)

    def oracle(x, where=None):
        return oracles.cross_entropy(x, np.zeros(np.shape(x)[:-1], int), where, **options)

    shift = None if "z_loss" in options else 0.0
    return Function("-".join(["cross_entropy", *options]), call, oracle, True, shift)


FUNCTIONS = (
    normalizer("logsumexp", True, 1.0),
    normalizer("logmeanexp", True, 1.0),
    normalizer("smooth_max", True, 1.0, temperature=0.5),
    normalizer("smooth_min", True, 1.0, temperature=2.0),
    normalizer("softmax", False, 0.0),
    normalizer("softmax", False, 0.0, temperature=0.5),
    normalizer("log_softmax", False, 0.0),
    normalizer("log_softmax", False, 0.0, temperature=2.0),
    normalizer("softmin", False, 0.0),
    loss(),
    loss(label_smoothing=0.125),
    loss(z_loss=0.25),
)


def over(functions):
    return pytest.mark.parametrize("f", functions, ids=lambda f: f.name)


CORE = [f for f in FUNCTIONS if "-" not in f.name]
like_jax = over([f for f in FUNCTIONS if hasattr(jax.nn, f.name)])


def in_one_program(functions, call=lambda f, x: f.call(x)):
    """Of arrays, each function with its result; one program compiles in half the time of many.

    Each function has arguments of its own, so that the program shares nothing between them.
    """

    @jax.jit
    def every(arguments):
        return [call(f, *own) for f, own in zip(functions, arguments, strict=True)]

    return lambda *arrays: list(zip(functions, every([arrays] * len(functions)), strict=True))


def logits(dtype, *shape, scale=3.0, seed=0) -> np.ndarray:
    """Multiples of 1/256, which are exact in float32, and so are their shifts."""
    x = scale * np.random.default_rng(seed).standard_normal(shape)
    return (np.round(x * 256) / 256).astype(dtype)


def close(actual, desired, dtype, ulps=12.0, name="") -> None:
    """Within a few roundings of numbers of size one, or of the result where it is larger.

    Each unit of the gap between a logit and the maximum costs half a rounding in its exponential;
    beyond some ten units the exponential no longer counts in a sum.
    """
    tolerance = ulps * float(jnp.finfo(dtype).eps)
    desired = oracles.rounded(desired)
    actual = np.asarray(actual, np.float64)
    np.testing.assert_allclose(actual, desired, tolerance, tolerance, err_msg=name)


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


# Temperature


@pytest.mark.x64_once
def test_temperature_is_traced_and_differentiated(dtype):
    x = jnp.asarray(logits(dtype, 7))

    def entropy(temperature):
        p = oracles.softmax(x, temperature=float(temperature))
        return -np.sum(p * np.log(p))

    for t in (0.5, 1.0, 3.0):
        temperature = jnp.asarray(t, dtype)
        value, slope = jax.jit(jax.value_and_grad(lambda t: softjax.smooth_max(x, temperature=t)))(
            temperature
        )
        close(value, oracles.smooth_max(x, temperature=t), dtype)
        close(slope, entropy(t), dtype, ulps=40)  # T log sum - <p, x> / T: terms of some ten
        slope = jax.grad(lambda t: softjax.smooth_min(-x, temperature=t))(temperature)
        close(slope, -entropy(t), dtype, ulps=40)


@pytest.mark.x64_once(True)
def test_derivatives_with_respect_to_temperature():
    x, t = jnp.asarray(logits("float64", 7)), jnp.asarray(1.5)
    check_two_orders(lambda x, t: softjax.log_softmax(x, temperature=t), x, t)


@compiled_fully
@pytest.mark.x64_once
def test_smooth_max_is_within_its_bounds(dtype):
    rng = np.random.default_rng(6)
    for scale in (0.0, 0.01, 1.0, 30.0):
        x = logits(dtype, 50, 6, scale=scale)
        where = rng.random(x.shape) < 0.7
        where[:, 0] = True
        for temperature in (0.01, 1.0, 10.0):
            options: dict[str, Any] = {"axis": -1, "where": where, "temperature": temperature}
            lower, upper = softjax.smooth_max_bounds(x, **options)
            y = softjax.smooth_max(x, **options)
            slack = 4 * jnp.finfo(dtype).eps * (jnp.abs(lower) + temperature)
            assert jnp.all(y >= lower)
            assert jnp.all(y <= upper + slack)
            np.testing.assert_array_equal(lower, np.max(x, -1, where=where, initial=-np.inf))
            count = np.log(np.sum(where, -1))
            close(upper, np.asarray(lower, np.float64) + temperature * count, dtype)


# Losses


@compiled_fully
@pytest.mark.x64_once
def test_labels_of_every_kind_give_one_loss(dtype):
    x = logits(dtype, 30, 12, scale=8.0)
    labels = np.random.default_rng(7).integers(12, size=30)
    one_hot = np.eye(12, dtype=dtype)[labels]
    sparse = softjax.TopKLabels(jnp.asarray(labels)[:, None], jnp.ones((30, 1), dtype))
    cases: list[dict[str, Any]] = [{}, {"label_smoothing": 0.125}, {"z_loss": 0.5}]
    for options in cases:
        losses = softjax.cross_entropy(x, labels, **options)
        close(losses, oracles.cross_entropy(x, labels, **options), dtype)
        close(softjax.cross_entropy(x, one_hot, **options), losses, dtype, ulps=4)
        close(softjax.cross_entropy(x, sparse, **options), losses, dtype, ulps=4)


@pytest.mark.x64_once
def test_negative_log_likelihood_is_cross_entropy(dtype):
    x = logits(dtype, 30, 12)
    labels = np.random.default_rng(8).integers(12, size=30)
    likelihood = np.take_along_axis(oracles.softmax(x), labels[:, None], -1)[:, 0]
    close(softjax.cross_entropy(x, labels), -np.log(likelihood), dtype)


@pytest.mark.parametrize("as_distribution", [False, True])
def test_options_of_the_loss(as_distribution, dtype):
    rng = np.random.default_rng(9)
    x = logits(dtype, 12, 7)
    where = rng.random(x.shape) < 0.7
    labels = rng.integers(7, size=12)
    where[np.arange(12), labels] = True
    weights = rng.integers(1, 9, 7).astype(dtype) / 4
    if as_distribution:
        given = np.where(where, rng.integers(1, 9, x.shape), 0)
        given = (given / given.sum(-1, keepdims=True)).astype(dtype)
    else:
        given = labels
    cases: list[dict[str, Any]] = [
        {},
        {"class_weights": weights},
        {"class_weights": weights, "label_smoothing": 0.25, "z_loss": 0.125},
    ]
    for options in cases:
        for mask in (None, where):

            def total(x, given=given, mask=mask, options=options):
                losses = softjax.cross_entropy(x, given, where=mask, **options)
                return jnp.sum(losses), losses

            gradient, losses = jax.jit(jax.grad(total, has_aux=True))(jnp.asarray(x))
            exact = oracles.exact(x)
            close(losses, oracles.cross_entropy(exact, given, mask, **options), dtype, ulps=40)
            expected = oracles.cross_entropy_gradient(exact, given, mask, **options)
            close(gradient, expected, dtype, ulps=40)  # weights up to 2, z_loss * lse of some ten


@compiled_fully
@pytest.mark.x64_once
def test_two_classes_are_the_logistic_function(dtype):
    x = logits(dtype, 50, scale=10.0)
    pairs = np.stack([np.zeros_like(x), x], -1)
    close(softjax.softmax(pairs)[:, 1], 1 / (1 + np.exp(-x.astype(np.float64))), dtype)
    labels = np.ones(50, np.int32)
    close(softjax.cross_entropy(pairs, labels), np.log1p(np.exp(-x.astype(np.float64))), dtype)
