"""Edge cases: infinities, NaN, empty rows, masks, bad labels, misuse."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softjax

# What depends on the code of XLA:CPU for a reduction is compiled as users have it.
pytestmark = pytest.mark.compiled_quickly
compiled_fully = pytest.mark.compiled_quickly(False)

INF, NAN = np.inf, np.nan
REDUCTIONS = (softjax.logsumexp, softjax.logmeanexp, softjax.smooth_max)
LOSS_OPTIONS: list[dict[str, Any]] = [{}, {"label_smoothing": 0.1}, {"z_loss": 0.1}]
DISTRIBUTIONS = (softjax.softmax, softjax.log_softmax, softjax.softmin)


def array(*values, dtype):
    return jnp.asarray(values, dtype)


def derivatives(functions, x):
    """Gradient in reverse and in forward mode, and the Hessian, of the sum of all the functions."""

    def total(x):
        return sum(jnp.sum(function(x)) for function in functions)

    both = jax.jit(lambda x: (jax.grad(total)(x), jax.jacfwd(total)(x), jax.hessian(total)(x)))
    return both(x)


def all_zero(arrays):
    for a in arrays:
        np.testing.assert_array_equal(a, 0)


# Infinities and NaN


@jax.jit
def in_one_program(x):
    """Of rows [N, K]: every function by its name, and the losses of the labels 0 and 1."""
    functions = (*REDUCTIONS, softjax.smooth_min, *DISTRIBUTIONS)
    losses = [softjax.cross_entropy(x, np.full(len(x), label)) for label in (0, 1)]
    return {f.__name__: f(x, axis=-1) for f in functions}, losses


def of_rows(*rows, dtype):
    return jax.tree.map(np.asarray, in_one_program(np.array(rows, dtype)))


@compiled_fully
@pytest.mark.x64_once
@pytest.mark.parametrize("size", [3, 40, 4096])
def test_a_row_of_minus_infinity(size, dtype):
    y, losses = of_rows([-INF] * size, [INF] * size, dtype=dtype)
    for function in REDUCTIONS:
        assert y[function.__name__][0] == -INF
    np.testing.assert_array_equal(y["softmax"][0], 0)
    np.testing.assert_array_equal(y["softmin"][1], 0)
    assert y["smooth_min"][1] == INF
    assert losses[1][0] == 0
    if size == 3:
        loss = partial(softjax.cross_entropy, labels=1)
        x = np.full(size, -INF, dtype)
        all_zero(derivatives([*REDUCTIONS, softjax.softmax, loss], x))


@compiled_fully
@pytest.mark.x64_once
@pytest.mark.parametrize("size", [3, 40, 4096])
def test_plus_infinity(size, dtype):
    y, losses = of_rows(np.zeros(size), [0, INF, *[0] * (size - 2)], dtype=dtype)
    for function in REDUCTIONS:
        assert y[function.__name__][1] == INF
    assert np.all(np.isnan(y["softmax"][1]))
    assert np.all(np.isnan(y["log_softmax"][1]))
    assert y["softmin"][1, 1] == 0
    assert np.isnan(losses[1][1])
    assert not np.isfinite(losses[0][1])


@compiled_fully
@pytest.mark.x64_once
@pytest.mark.parametrize("size", [3, 40, 4096])
def test_nan_spreads_over_its_row_only(size, dtype):
    for rest in (0, INF, -INF):
        x = np.zeros((2, size))
        x[0] = rest
        x[0, 1] = NAN
        values, losses = of_rows(*x, dtype=dtype)
        for name, y in values.items():
            assert np.all(np.isnan(y[0])), (name, rest)
            assert not np.any(np.isnan(y[1])), name
        np.testing.assert_array_equal(np.isnan(losses), [[True, False]] * 2)


@compiled_fully
@pytest.mark.x64_once
def test_minus_infinity_is_a_class_without_mass(dtype):
    x = array(0.0, -INF, 1.0, dtype=dtype)
    two = x[jnp.asarray([0, 2])]
    np.testing.assert_array_equal(softjax.logsumexp(x), softjax.logsumexp(two))
    np.testing.assert_array_equal(softjax.softmax(x)[1], 0)
    for function in (softjax.logsumexp, lambda x: softjax.softmax(x)[0]):
        gradient, forward, hessian = derivatives([function], x)
        assert gradient[1] == forward[1] == 0
        assert np.all(np.isfinite(hessian))
        np.testing.assert_array_equal(hessian[1], 0)


@compiled_fully
def test_one_thousand_against_985(dtype):
    x = array(1000.0, 985.0, dtype=dtype)
    small = np.exp(-15.0)
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(softjax.softmax(x), [1 / (1 + small), small / (1 + small)], 10 * eps)
    np.testing.assert_allclose(softjax.cross_entropy(x, 0), np.log1p(small), 10 * eps)
    np.testing.assert_allclose(softjax.cross_entropy(x, 1), 15 + np.log1p(small), 4 * eps)
    np.testing.assert_allclose(softjax.logsumexp(x), 1000 + small, 2 * eps)


@compiled_fully
def test_the_largest_numbers(dtype):
    big = float(jnp.finfo(dtype).max)
    for values in ([big, big], [-big, -big]):
        x = jnp.asarray(values, dtype)
        np.testing.assert_array_equal(softjax.softmax(x), 0.5)
        np.testing.assert_array_equal(softjax.logsumexp(x), x[0])
        np.testing.assert_allclose(softjax.cross_entropy(x, 0), np.log(2), 1e-6)
    x = array(big, -big, dtype=dtype)
    np.testing.assert_array_equal(softjax.softmax(x), [1, 0])
    assert softjax.cross_entropy(x, 0) == 0


# One class, no class


@pytest.mark.x64_once
def test_one_class(dtype):
    x = array(3.5, dtype=dtype)
    for function in REDUCTIONS:
        assert function(x) == 3.5
    np.testing.assert_array_equal(softjax.softmax(x), 1)
    np.testing.assert_array_equal(softjax.log_softmax(x), 0)
    loss = partial(softjax.cross_entropy, labels=0)
    assert loss(x) == 0
    all_zero(derivatives([loss, softjax.softmax, softjax.log_softmax], x))
    gradient, forward, hessian = derivatives([softjax.logsumexp], x)
    assert (gradient, forward, hessian) == (1, 1, 0)


@pytest.mark.x64_once
def test_no_class(dtype):
    x = jnp.zeros((2, 0), dtype)
    for function in REDUCTIONS:
        np.testing.assert_array_equal(function(x, axis=-1), [-INF, -INF])
        assert jax.grad(lambda x, f=function: jnp.sum(f(x, axis=-1)))(x).shape == (2, 0)
    for function in DISTRIBUTIONS:
        assert function(x).shape == (2, 0)
    np.testing.assert_array_equal(softjax.cross_entropy(x, x), [0, 0])
    with pytest.raises(ValueError, match="`labels`"):
        softjax.cross_entropy(x, jnp.zeros(2, int))


@pytest.mark.x64_once
def test_a_scalar(dtype):
    x = jnp.asarray(2.0, dtype)
    assert softjax.logsumexp(x) == 2
    gradient, forward, hessian = derivatives([partial(f, axis=None) for f in DISTRIBUTIONS], x)
    assert (gradient, forward, hessian) == (0, 0, 0)
    with pytest.raises(ValueError, match="`axis`"):
        softjax.softmax(x)
    with pytest.raises(ValueError, match="`axis`"):
        softjax.cross_entropy(x, 0)


# Masks


@pytest.mark.x64_once
def test_everything_masked(dtype):
    x, where = array(1.0, NAN, INF, dtype=dtype), jnp.zeros(3, bool)
    masked = [partial(f, where=where) for f in (*REDUCTIONS, softjax.softmax, softjax.softmin)]
    for function in masked[:3]:
        assert function(x) == -INF
    for function in masked[3:]:
        np.testing.assert_array_equal(function(x), 0)
    all_zero(derivatives(masked, x))
    np.testing.assert_array_equal(softjax.log_softmax(x, where=where), -INF)
    losses = []
    for options in LOSS_OPTIONS:
        for labels in (jnp.asarray(0), array(0.5, 0.5, 0.0, dtype=dtype)):
            loss = partial(softjax.cross_entropy, labels=labels, where=where, **options)
            assert loss(x) == 0
            losses.append(loss)
    all_zero(derivatives(losses, x))


@pytest.mark.x64_once
@pytest.mark.parametrize(
    "size",
    [
        40,
        pytest.param(5, marks=compiled_fully),
        pytest.param(4096, marks=compiled_fully),
    ],
)
def test_what_is_masked_never_matters(size, dtype):
    where = np.arange(size) % 4 != 1
    plain = np.linspace(-2, 3, size).astype(dtype)
    functions = [partial(f, where=where) for f in (*REDUCTIONS, *DISTRIBUTIONS)]
    functions += [
        partial(softjax.cross_entropy, labels=0, where=where),
        partial(softjax.cross_entropy, labels=0, where=where, label_smoothing=0.1, z_loss=0.1),
        partial(softjax.logsumexp, where=where, b=jnp.full(size, 2.0, dtype)),
    ]

    def all_of_them(x):
        def total(x):
            # log_softmax is -inf where it is masked.
            return sum(jnp.sum(jnp.where(jnp.isfinite(y), y, 0)) for y in (f(x) for f in functions))

        return [f(x) for f in functions], jax.grad(total)(x), jax.jvp(total, (x,), (x * 0 + 1,))[1]

    compiled = jax.jit(all_of_them)
    expected = compiled(jnp.asarray(plain))
    np.testing.assert_array_equal(expected[1][~where], 0)
    for behind in (NAN, INF, -INF, 1e30):
        hidden = jnp.asarray(np.where(where, plain, behind).astype(dtype))
        jax.tree.map(np.testing.assert_array_equal, compiled(hidden), expected)


# Labels


@pytest.mark.parametrize("ignored", [-100, 255, 2**40])
def test_ignored_labels(ignored, dtype):
    x = np.array([[1.0, NAN, 2.0], [0.0, 1.0, 2.0]], dtype)
    kind = np.uint8 if ignored == 255 else np.int32
    first = 0 if ignored == 2**40 else ignored  # no int32 equals 2^40: nothing is ignored
    labels = np.array([first, 2], kind)
    for options in LOSS_OPTIONS:

        def losses(x, labels, options=options):
            return softjax.cross_entropy(x, labels, ignore_index=ignored, **options)

        @jax.jit
        def losses_and_gradient(x, labels, losses=losses):
            return losses(x, labels), jax.grad(lambda x: jnp.sum(losses(x, labels)))(x)

        plain = softjax.cross_entropy(x[1], 2, **options)
        traced, gradient = losses_and_gradient(x, labels)
        for given in (losses(x, labels), traced):
            np.testing.assert_allclose(given[1], plain, rtol=1e-6)
            assert np.isnan(given[0]) if ignored == 2**40 else given[0] == 0
        if ignored != 2**40:
            np.testing.assert_array_equal(gradient[0], 0)
            assert np.all(np.isfinite(gradient[1]))


@pytest.mark.x64_once
def test_a_target_without_probability_costs_infinity(dtype):
    x = array(0.0, 1.0, -INF, dtype=dtype)
    where = jnp.asarray([True, False, True])
    half = array(0.5, 0.5, 0.0, dtype=dtype)
    for compile_ in (lambda f: f, jax.jit):
        loss = compile_(softjax.cross_entropy)
        masked = compile_(partial(softjax.cross_entropy, where=where))
        assert loss(x, jnp.asarray(2)) == INF
        assert masked(x, jnp.asarray(1)) == INF
        assert masked(x, half) == INF
        assert loss(x, array(0.5, 0.0, 0.5, dtype=dtype)) == INF
        assert loss(x, softjax.TopKLabels(jnp.asarray([2]), array(0.25, dtype=dtype))) == INF


@pytest.mark.x64_once
def test_no_probability_times_infinity_is_nothing(dtype):
    x = array(0.0, 1.0, -INF, dtype=dtype)
    q = array(0.5, 0.5, 0.0, dtype=dtype)
    loss, gradient = jax.value_and_grad(softjax.cross_entropy)(x, q)
    np.testing.assert_array_equal(loss, softjax.cross_entropy(x[:2], q[:2]))
    assert np.all(np.isfinite(gradient))
    assert gradient[2] == 0
    # The label's share is 0 where smoothing takes all of it, and so is its cost at weight 0.
    where = jnp.asarray([True, True, False])
    smoothed = softjax.cross_entropy(x, 2, where=where, label_smoothing=1.0)
    np.testing.assert_allclose(smoothed, softjax.cross_entropy(x[:2], q[:2]), rtol=1e-6)
    weights = array(1.0, 1.0, 0.0, dtype=dtype)
    assert softjax.cross_entropy(x, 2, class_weights=weights) == 0


# Misuse


def misuse(error, match, *args, function=softjax.cross_entropy, **options):
    with pytest.raises(error, match=match):
        function(*args, **options)


@pytest.mark.x64_once
def test_misuse_of_the_loss():
    x, y = jnp.zeros((4, 3)), jnp.zeros(4, jnp.int32)
    misuse(ValueError, r"`labels` must be of shape \(4,\), got shape \(1,\)", x, y[:1])
    misuse(ValueError, r"`labels` must be of shape \(4,\), got shape \(\)", x, 0)
    misuse(
        ValueError,
        r"`labels` must be of shape \(4,\), got shape \(4, 3\)",
        x,
        jnp.ones((4, 3), int),
    )
    misuse(ValueError, r"`labels`.*\(3,\)", x, jnp.zeros(3))
    misuse(ValueError, r"`labels`.*\(1, 3\)", x, jnp.zeros((1, 3)))
    misuse(ValueError, "`labels` must be of an integer dtype as class", x, jnp.zeros(4))
    misuse(TypeError, "`labels`.*bool", x, y == 0)
    misuse(TypeError, "`labels`.*complex", x, y.astype(complex))
    misuse(TypeError, "`labels`", x, "cat")
    misuse(TypeError, "`logits`.*complex64", x.astype(complex), y)
    misuse(TypeError, "`logits`", "cat", y)
    misuse(TypeError, "`logits`", None, y)
    misuse(ValueError, r"`axis` must be in \[-2, 2\), got 2", x, y, 2)
    misuse(TypeError, "`axis` must be an integer, got", x, y, (0,))
    misuse(TypeError, "`axis` must be an integer, got", x, y, 1.0)
    misuse(TypeError, "`axis` must be an integer, got", x, y, None)
    misuse(TypeError, "`where` must be an array of booleans", x, y, where=jnp.ones((4, 3)))
    misuse(ValueError, r"`where`.*\(4, 3\), got shape \(4,\)", x, y, where=y == 0)
    misuse(ValueError, r"`where`.*\(2, 4, 3\)", x, y, where=jnp.ones((2, 4, 3), bool))
    for e in (-0.1, 1.1, NAN):
        misuse(
            ValueError, r"`label_smoothing` must be a number in \[0, 1\]", x, y, label_smoothing=e
        )
    misuse(ValueError, r"`class_weights` must be of shape \(3,\)", x, y, class_weights=jnp.ones(4))
    misuse(ValueError, "`class_weights` must be >= 0", x, y, class_weights=-jnp.ones(3))
    misuse(TypeError, "`ignore_index`", x, jnp.ones((4, 3)) / 3, ignore_index=1)
    misuse(ValueError, "`labels` must be >= 0", x, jnp.full((4, 3), -1.0))


@pytest.mark.x64_once
def test_misuse_of_the_normalizers():
    x = jnp.zeros((4, 3))
    for f in (softjax.logsumexp, softjax.logmeanexp, softjax.softmax, softjax.smooth_max):
        name = rf"softjax\.{f.__name__}: "
        misuse(TypeError, name + ".*complex64", x.astype(complex), function=f)
        misuse(TypeError, name, "cat", function=f)
        misuse(TypeError, name, None, function=f)
        misuse(ValueError, name + r"`axis` must be in \[-2, 2\), got 2", x, axis=2, function=f)
        misuse(ValueError, name + r"`axis` .*repetition", x, axis=(0, -2), function=f)
        misuse(TypeError, name + "`axis`", x, axis=0.5, function=f)
        misuse(TypeError, name + "`where`", x, where=x, function=f)
        misuse(ValueError, name + "`where`", x, where=jnp.ones(4, bool), function=f)
    for f in (*DISTRIBUTIONS, softjax.smooth_max, softjax.smooth_min, softjax.smooth_max_bounds):
        name = rf"softjax\.{f.__name__}: `temperature`"
        for t in (0.0, -1.0, NAN, jnp.asarray(0.0)):
            misuse(ValueError, name + " must be > 0", x, temperature=t, function=f)
        misuse(ValueError, name + " must be a scalar", x, temperature=jnp.ones(2), function=f)
        traced = jax.jit(lambda t, f=f: jnp.stack(jax.tree.leaves(f(x[0], temperature=t))[-1:]))
        assert np.all(np.isnan(traced(0.0)))
    misuse(ValueError, "`b`", x, b=jnp.ones(4), function=softjax.logsumexp)
    misuse(TypeError, "`b`", x, b=x.astype(complex), function=softjax.logsumexp)


# The weighted mean


@compiled_fully
@pytest.mark.x64_once
def test_weighted_mean(dtype):
    losses, weights = np.array([[1, 2, NAN, INF], [1, 3, 0, 0]], dtype)
    value, gradient = jax.value_and_grad(softjax.weighted_mean)(losses, weights)
    assert value == 1.75
    np.testing.assert_array_equal(gradient, [0.25, 0.75, 0, 0])
    assert softjax.weighted_mean(losses[:2]) == 1.5
    assert softjax.weighted_mean(losses, weights > 0) == 1.5
    value, gradient = jax.value_and_grad(softjax.weighted_mean)(losses, 0 * weights)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)
    assert softjax.weighted_mean(losses[:0], weights[:0]) == 0
    assert softjax.weighted_mean(losses[:0]) == 0
    half = np.ones(5000, jnp.bfloat16)
    assert softjax.weighted_mean(half, half).dtype == jnp.float32
    assert softjax.weighted_mean(half, half) == 1
    misuse(ValueError, "`weights`", losses, weights[:2], function=softjax.weighted_mean)
    misuse(ValueError, "`weights` must be >= 0", losses, -weights, function=softjax.weighted_mean)
