"""Information from logits, against its definitions in 200-bit arithmetic."""

from typing import Any

import gmpy2
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.experimental import checkify
from oracles import exact, rounded
from orders import check_two_orders

import softjax
from softjax import information

# Where digits or equal bits are asserted, programs are compiled as users have them.
pytestmark = pytest.mark.compiled_quickly
compiled_fully = pytest.mark.compiled_quickly(False)

INF, NAN = np.inf, np.nan
HALF: Any = 0.5  # where only an integer will do
OF_ONE = {"entropy": information.entropy, "perplexity": information.perplexity}
OF_TWO = {"cross_entropy": information.cross_entropy, "kl_divergence": information.kl_divergence}

of_one = pytest.mark.parametrize("f", OF_ONE.values(), ids=OF_ONE.keys())
of_two = pytest.mark.parametrize("f", OF_TWO.values(), ids=OF_TWO.keys())
modes = pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev])


# Definitions, for finite logits in 200 bits


def entropy(x):
    return -(oracles.softmax(x) * oracles.log_softmax(x)).sum(-1)


def cross_entropy(t, x):
    return -(oracles.softmax(t) * oracles.log_softmax(x)).sum(-1)


def kl_divergence(t, x):
    return cross_entropy(t, x) - entropy(t)


def entropy_gradient(x):
    return -oracles.softmax(x) * (oracles.log_softmax(x) + entropy(x))


def entropy_hessian(x):
    p, h, g = oracles.softmax(x), oracles.hessian(x), entropy_gradient(x)
    surprise = oracles.log_softmax(x) + entropy(x)
    return -h * surprise[:, None] - h - p[:, None] * g


def cross_entropy_target_gradient(t, x):
    return oracles.softmax(t) * (-oracles.log_softmax(x) - cross_entropy(t, x))


def kl_target_gradient(t, x):
    return cross_entropy_target_gradient(t, x) - entropy_gradient(t)


def kl_target_hessian(t, x):
    p, h, g = oracles.softmax(t), oracles.hessian(t), kl_target_gradient(t, x)
    log_ratio = oracles.log_softmax(t) - oracles.log_softmax(x) - kl_divergence(t, x)
    return h * log_ratio[:, None] + h - p[:, None] * g


# Logits


def logits(dtype, *shape, scale=1.0, seed=0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def pairs(dtype):
    """(p, q) from nearly equal to nothing in common, with and without an offset."""
    for n, seed in ((2, 2), (100, 10), (100, 100)):
        for scale in (0.1, 1.0, 10.0):
            t = logits(dtype, n, scale=scale, seed=seed)
            for apart in (1e-6, 1e-3, 0.1, 1.0, 20.0):
                for offset in (0.0, 1e3):
                    step = logits(dtype, n, scale=apart, seed=seed + 1) + np.asarray(offset, dtype)
                    yield t, (t + step).astype(dtype)


def roundings(actual, reference, scale):
    """The largest |actual - reference| in eps * scale; below the normal numbers all is 0."""
    info = jnp.finfo(actual.dtype)
    error = np.abs(rounded(exact(actual) - reference))
    return np.max(error / (float(info.eps) * np.abs(rounded(scale)) + 2 * float(info.tiny)))


# Values


@compiled_fully
@pytest.mark.parametrize("n", [2, 10, 300])
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0, 40.0])
def test_entropy(n, scale, dtype):
    x = logits(dtype, n, scale=scale)
    # 5 and the gap, as for logsumexp: each nat of a gap rounds the exponential by half an ulp.
    gap = np.diff(np.sort(x)[-2:])[0]
    actual = information.entropy(x)
    assert roundings(actual, entropy(exact(x)), entropy(exact(x))) <= 5 + gap


@compiled_fully
@pytest.mark.parametrize("gap", [1, 6, 20, 40, 80])
def test_entropy_of_a_sure_distribution_keeps_its_digits(gap, dtype):
    x = np.array([0, -gap], dtype)
    actual, gradient = jax.value_and_grad(information.entropy)(x)
    assert oracles.ulps(actual, entropy(exact(x))).max() <= 4
    assert oracles.ulps(gradient, entropy_gradient(exact(x))).max() <= 4


@pytest.mark.x64_once
def test_entropy_where_the_definition_in_float32_is_wrong():
    x = jnp.array([0.0, -20.0])
    p = jax.nn.softmax(x)
    assert abs(-jnp.sum(p * jnp.log(p)) / 4.3284228e-8 - 1) > 0.04
    assert abs(information.entropy(x) / 4.3284228e-8 - 1) < 3e-7


@compiled_fully
def test_cross_entropy_and_kl_divergence(dtype):
    for t, x in pairs(dtype):
        h, kl = cross_entropy(exact(t), exact(x)), kl_divergence(exact(t), exact(x))
        # p and q have each the error of softmax, of some roundings and of the gap.
        gap = np.diff(np.sort(t)[-2:])[0] + np.diff(np.sort(x)[-2:])[0]
        assert roundings(information.cross_entropy(t, x), h, h) <= 10 + gap
        assert roundings(information.kl_divergence(t, x), kl, kl) <= 10 + gap


def test_kl_divergence_far_beyond_the_range_of_exp(dtype):
    t, x = np.array([0, -2000], dtype), np.array([-2000, 0], dtype)
    assert information.kl_divergence(t, x) == 2000
    assert information.cross_entropy(t, x) == 2000
    assert information.kl_divergence(np.array([0, -INF], dtype), x) == 2000


@compiled_fully
@pytest.mark.x64_once
def test_kl_divergence_is_zero_for_the_same_logits_and_never_negative(dtype):
    @jax.jit
    def of_pairs(x, y):
        gradients = jax.vmap(jax.grad(information.kl_divergence, (0, 1)))(x, y)
        return information.kl_divergence(x, y), gradients

    for scale in (0.1, 10.0, 100.0):
        x = logits(dtype, 50, 20, scale=scale)
        x[:, 3] = -INF
        jax.tree.map(lambda a: np.testing.assert_array_equal(a, 0), of_pairs(x, x))
        y = np.nextafter(x, np.where(np.arange(20) % 2, INF, -INF).astype(dtype))
        assert np.min(of_pairs(x, y)[0]) >= 0
    integers = np.arange(20).astype(dtype)
    assert information.kl_divergence(integers, integers + np.asarray(8, dtype)) == 0


@pytest.mark.x64_once
def test_cross_entropy_is_entropy_and_kl_divergence(dtype):
    for t, x in pairs(dtype):
        both = information.entropy(t) + information.kl_divergence(t, x)
        np.testing.assert_allclose(
            information.cross_entropy(t, x), both, 40 * float(jnp.finfo(dtype).eps)
        )


@compiled_fully
@pytest.mark.x64_once
def test_surprisal_is_the_loss(dtype):
    x, labels = logits(dtype, 6, 5, scale=4), np.arange(6) % 5
    losses = information.surprisal(x, labels)
    np.testing.assert_array_equal(losses, softjax.cross_entropy(x, labels))
    np.testing.assert_array_equal(losses, information.surprisal(x.T, labels, axis=0))
    reference = oracles.cross_entropy(exact(x), labels)
    assert oracles.ulps(losses, reference).max() <= 20


@pytest.mark.x64_once
@pytest.mark.parametrize("k", [1, 2, 3, 8, 1000])
def test_equally_likely_classes(k, dtype):
    x, eps = np.full(k, 7, dtype), float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(information.entropy(x), np.log(k), 4 * eps, 0)
    # exp makes the absolute error of its argument relative.
    np.testing.assert_allclose(information.perplexity(x), k, (2 + np.log(k)) * eps)
    np.testing.assert_allclose(information.joint_entropy(x, 5), 5 * np.log(k), 4 * eps, 0)
    bits = information.nats_to_bits(information.entropy(x))
    np.testing.assert_allclose(bits, np.log2(k), 6 * eps, 0)


@pytest.mark.x64_once
@pytest.mark.parametrize("n", [0, 1, 3])
def test_joint_entropy_of_independent_draws(n, dtype):
    x = logits(dtype, 3)
    p = rounded(oracles.softmax(exact(x)))
    joint = np.ones(1)
    for _ in range(n):
        joint = np.outer(joint, p).ravel()
    reference = -np.sum(joint * np.log(joint))
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(information.joint_entropy(x, n), reference, 10 * eps)


@compiled_fully
def test_nats_and_bits(dtype):
    x = logits(dtype, 50, scale=100)
    bits, nats = information.nats_to_bits(x), information.bits_to_nats(x)
    log_2 = gmpy2.log(2)
    assert oracles.ulps(bits, exact(x) / log_2).max() <= 2
    assert oracles.ulps(nats, exact(x) * log_2).max() <= 2
    assert information.nats_to_bits(jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16
    assert information.bits_to_nats(1).dtype == dtype


# Derivatives


@compiled_fully
@pytest.mark.parametrize("n", [2, 10, 100])
def test_entropy_gradient(n, dtype):
    # Each mode has an argument of its own, so that the program shares nothing between them.
    @jax.jit
    def gradients(x, y):
        return jax.jacfwd(information.entropy)(x), jax.jacrev(information.entropy)(y)

    for scale in (0.1, 1.0, 10.0):
        x = logits(dtype, n, scale=scale)
        d = exact(x) - exact(x).max()
        p = oracles.softmax(exact(x))
        # p_i (x_i - <p, x>): the difference may cancel, so its two terms are the scale.
        size = p * (np.abs(d) + (p * np.abs(d)).sum())
        expected, bound = entropy_gradient(exact(x)), 8 + rounded(np.abs(d)).max()
        for gradient in gradients(x, x):
            assert roundings(gradient, expected, size) <= bound


@compiled_fully
@pytest.mark.x64_once
def test_gradients_of_two(dtype):
    # Each mode has arguments of its own, so that the program shares nothing between them.
    @jax.jit
    def gradients(pairs):
        return [
            [mode(f, (0, 1))(*pair) for f in (information.kl_divergence, information.cross_entropy)]
            for mode, pair in zip((jax.jacfwd, jax.jacrev), pairs, strict=True)
        ]

    for t, x in pairs(dtype):
        exact_t, exact_x = exact(t), exact(x)
        p, q = oracles.softmax(exact_t), oracles.softmax(exact_x)
        top, bound = np.argmax(t), 8 + np.ptp(t) + np.ptp(x)
        c = exact_x - exact_t
        ratio, distance = np.abs(c - c[top]), np.abs(exact_x - exact_x[top])
        spread = ratio + (p * ratio).sum()

        # Where q and p are near, q - p counts in their ratio, else in themselves.
        near = np.maximum(p, q) * (spread + kl_divergence(exact_t, exact_x))
        size = np.minimum(4 * near, p + q)
        of_kl = kl_target_gradient(exact_t, exact_x)
        of_cross = cross_entropy_target_gradient(exact_t, exact_x)
        scale = p * (distance + (p * distance).sum())
        for of_mode in gradients([(t, x), (t, x)]):
            (by_t, by_x), of_cross_entropy = of_mode
            assert roundings(by_t, of_kl, p * spread) <= bound
            assert roundings(by_x, q - p, size) <= bound
            by_t, by_x = of_cross_entropy
            assert roundings(by_t, of_cross, scale) <= bound
            assert roundings(by_x, q - p, size) <= bound


# A sure p and q with the same top, with different tops, an even p, nearly equal ones, any two.
SECOND_T = [[0, -20, -18], [0, -20, -25], [0.5, 0, 0.25], [1, 0.5, -1], [0, 3, -2]]
SECOND_X = [[0, -18, -20], [0.5, 9, 0], [0, -20, -25], [1, 0.5 + 2**-12, -1], [2, -1, 0]]


@pytest.mark.x64_once
@pytest.mark.parametrize(
    "hessian",
    [lambda f, i: jax.jacfwd(jax.jacrev(f, i), i), lambda f, i: jax.jacrev(jax.jacfwd(f, i), i)],
    ids=["forward over reverse", "reverse over forward"],
)
def test_second_derivatives(hessian, dtype):
    t, x = (np.array(rows, dtype) for rows in (SECOND_T, SECOND_X))
    each_t, each_x = [exact(row) for row in t], [exact(row) for row in x]
    covariance_t, covariance_x = (np.abs(oracles.hessian(exact(rows))) for rows in (t, x))
    gap_t, gap_x = (np.ptp(rows, -1)[:, None, None] for rows in (t, x))

    def check(f, argument, expected, size):
        actual = jax.jit(jax.vmap(hessian(f, argument)))(t, x)
        error = np.abs(rounded(exact(actual) - np.stack(expected)))
        # Entries of the size of the products of probabilities and gaps that they consist of.
        assert np.all(error <= 20 * float(jnp.finfo(dtype).eps) * rounded(size))

    expected = [entropy_hessian(row) for row in each_t]
    check(lambda t, x: information.entropy(t), 0, expected, covariance_t * (1 + gap_t))
    expected = [kl_target_hessian(*rows) for rows in zip(each_t, each_x, strict=True)]
    size = covariance_t * (1 + gap_t + gap_x)
    check(information.kl_divergence, 0, expected, size)
    for f in OF_TWO.values():
        check(f, 1, [oracles.hessian(row) for row in each_x], covariance_x)


@pytest.mark.x64_once
def test_mixed_derivatives_of_two(dtype):
    t, x = (np.array(rows[0], dtype) for rows in (SECOND_T, SECOND_X))
    for f in OF_TWO.values():
        mixed = jax.jacfwd(jax.grad(f, 1), 0)(t, x)
        assert oracles.ulps(mixed, -oracles.hessian(exact(t))).max() <= 8


@pytest.mark.x64_once(True)  # finite differences say something in float64 only
@pytest.mark.parametrize("f", [*OF_ONE.values(), *OF_TWO.values(), information.temper])
def test_two_orders_in_both_modes(f):
    arguments = (logits("float64", 4), logits("float64", 4, seed=1))
    if f in OF_ONE.values():
        arguments = arguments[:1]
    elif f is information.temper:
        arguments = (arguments[0], 1.5)
    check_two_orders(f, *arguments)


@compiled_fully
@pytest.mark.x64_once
@of_two
def test_differentiating_does_not_change_the_value(f, dtype):
    t, x = logits(dtype, 7), logits(dtype, 7, seed=1)
    assert jax.value_and_grad(f, (0, 1))(t, x)[0] == f(t, x)
    assert jax.value_and_grad(information.entropy)(x)[0] == information.entropy(x)


# Masks, axes, dtypes


@pytest.mark.x64_once
@of_two
def test_what_is_masked_never_counts(f, dtype):
    t, x = logits(dtype, 5), logits(dtype, 5, seed=1)
    where = np.array([True, False, True, True, False])
    t[1], t[4], x[1], x[4] = NAN, INF, 1e30, NAN

    def masked(t, x):
        return f(t, x, where=where)

    tangents = np.where(where, 1, NAN).astype(dtype), np.where(where, 2, INF).astype(dtype)
    tangents[0][0] = 3
    kept = [a[where] for a in (t, x)]
    kept_tangents = [a[where] for a in tangents]
    eps = float(jnp.finfo(dtype).eps)
    actual = jax.jvp(masked, (t, x), tangents)
    expected = jax.jvp(f, tuple(kept), tuple(kept_tangents))
    np.testing.assert_allclose(actual, expected, 10 * eps)
    for g, k in zip(jax.grad(masked, (0, 1))(t, x), jax.grad(f, (0, 1))(*kept), strict=True):
        assert np.all(g[~where] == 0)
        np.testing.assert_allclose(g[where], k, 10 * eps, eps)


@pytest.mark.x64_once
def test_what_is_masked_never_counts_in_one(dtype):
    x = np.array([0.5, NAN, -1, INF], dtype)
    where = np.array([True, False, True, False])
    kept = x[where]
    for f in OF_ONE.values():
        np.testing.assert_array_equal(f(x, where=where), f(kept))
        gradient = jax.grad(lambda x, f=f: f(x, where=where))(x)
        np.testing.assert_array_equal(gradient[where], jax.grad(f)(kept))
        assert np.all(gradient[~where] == 0)
    np.testing.assert_array_equal(
        information.temper(x, 2.0, where=where)[where], information.temper(kept, 2.0)
    )
    assert np.all(information.temper(x, 2.0, where=where)[~where] == -INF)
    label = jnp.array(2)
    loss, gradient = jax.value_and_grad(information.surprisal)(x, label, where=where)
    assert loss == information.surprisal(kept, jnp.array(1))
    assert np.all(gradient[~where] == 0)
    assert information.surprisal(x, jnp.array(1), where=where) == INF


@pytest.mark.x64_once
def test_nothing_left_is_zero_with_zero_gradients_in_both_modes(dtype):
    x, ones = np.array([NAN, 1, INF], dtype), np.ones(3, dtype)
    nothing = np.zeros(3, bool)
    for f in (
        lambda x: information.entropy(x, where=nothing),
        lambda x: information.surprisal(x, jnp.array(0), where=nothing),
        lambda x: information.kl_divergence(x, x, where=nothing),
        lambda x: information.cross_entropy(x, x, where=nothing),
        lambda x: information.perplexity(x, where=nothing) - 1,
    ):
        assert jax.jvp(f, (x,), (ones,)) == (0, 0)
        np.testing.assert_array_equal(jax.grad(f)(x), 0)
    empty = jnp.zeros((2, 0), dtype)
    assert np.all(information.entropy(empty) == 0)
    assert np.all(information.kl_divergence(empty, empty) == 0)
    impossible = np.full(3, -INF, dtype)
    assert information.entropy(impossible) == 0
    for f in OF_TWO.values():
        assert f(impossible, ones) == 0
        for g in jax.grad(f, (0, 1))(impossible, ones):
            np.testing.assert_array_equal(g, 0)


@pytest.mark.x64_once
def test_no_nan_is_computed_on_the_way_to_finite_numbers(dtype):
    """In rows without a class and beside impossible classes, as `checkify` sees them."""
    x = np.array([[-INF, -INF], [-INF, -INF], [1, -INF], [0, 2]], dtype)
    t = np.array([[-INF, -INF], [0, 0], [0, 1], [1, -INF]], dtype)
    one, nothing = jnp.ones((), dtype), jnp.zeros((2, 2), dtype)

    def every(x, t):
        heads = softjax.linear_cross_entropy_outputs(nothing, nothing, bias=x[2])
        losses = [f(t, x) for f in OF_TWO.values()]
        return [softjax.logsumexp(x, -1, b=one), heads[1:4], *losses]

    def slopes(x, t):
        return jax.grad(lambda x, t: sum(map(finite_sum, every(x, t))), (0, 1))(x, t)

    def finite_sum(tree):
        return sum(jnp.sum(jnp.where(jnp.isfinite(a), a, 0)) for a in jax.tree.leaves(tree))

    error, _ = checkify.checkify(jax.jit(slopes), errors=checkify.float_checks)(x, t)
    assert error.get() is None


@pytest.mark.x64_once
def test_the_largest_logits_have_finite_slopes(dtype):
    big = float(jnp.finfo(dtype).max)
    x = np.array([0.5, big, big], dtype)
    np.testing.assert_array_equal(jax.grad(information.entropy)(x), 0)
    for f in OF_TWO.values():
        for slope in jax.grad(f, (0, 1))(x, x):
            np.testing.assert_array_equal(slope, 0)


@pytest.mark.x64_once
def test_impossible_classes(dtype):
    sure, even = np.array([0, -INF], dtype), np.array([0, 0], dtype)
    assert information.entropy(sure) == 0
    np.testing.assert_array_equal(jax.grad(information.entropy)(sure), 0)
    for f in OF_TWO.values():
        assert f(sure, sure) == 0
        np.testing.assert_allclose(f(sure, even), np.log(2), 1e-6)
        assert f(even, sure) == INF
        by_t, by_x = jax.grad(f, (0, 1))(even, sure)
        np.testing.assert_array_equal(by_t, 0)
        np.testing.assert_array_equal(by_x, [0.5, -0.5])
        # What underflows has no probability in the arithmetic: 0 * inf = 0.
        assert f(np.array([0, -1e4], dtype), sure) == 0
    # p has a zero where q has none: the identity sum_i q_i - p_i = 0 needs that class too.
    two = np.array([0, 0, -INF], dtype)
    kl = information.kl_divergence(two, np.zeros(3, dtype))
    np.testing.assert_allclose(kl, np.log(1.5), 1e-6)


@pytest.mark.x64_once
def test_nan_and_infinite_logits_are_nan(dtype):
    good = np.zeros(2, dtype)
    for value in (NAN, INF):
        bad = np.array([value, 0], dtype)
        assert np.isnan(information.entropy(bad))
        for f in OF_TWO.values():
            assert np.isnan(f(bad, good))
            assert np.isnan(f(good, bad))


@pytest.mark.x64_once
@pytest.mark.parametrize("axis", [1, (0, 2), None])
def test_axes(axis, dtype):
    t, x = logits(dtype, 3, 4, 5), logits(dtype, 3, 4, 5, seed=1)
    axes = tuple(range(3)) if axis is None else np.atleast_1d(axis) % 3
    rest = [a for a in range(3) if a not in axes]
    shape = [x.shape[a] for a in rest]

    def last(x):
        return np.transpose(x, [*rest, *axes]).reshape(*shape, -1)

    def results(t, x, axis):
        of_two = [f(t, x, axis) for f in OF_TWO.values()]
        return information.entropy(x, axis), of_two, information.temper(x, 0.5, axis)

    @jax.jit
    def in_both_ways(t, x, t_last, x_last):
        return results(t, x, axis), results(t_last, x_last, -1)

    eps = float(jnp.finfo(dtype).eps)
    actual, expected = in_both_ways(t, x, last(t), last(x))
    np.testing.assert_allclose(actual[0], expected[0], 8 * eps)
    np.testing.assert_allclose(actual[1], expected[1], 16 * eps)
    np.testing.assert_allclose(last(np.asarray(actual[2])), expected[2], 8 * eps)


@pytest.mark.x64_once
@of_two
def test_permutation_offset_jit_and_vmap(f, dtype):
    t, x = logits(dtype, 3, 6), logits(dtype, 3, 6, seed=1)
    eps, order = float(jnp.finfo(dtype).eps), np.random.default_rng(2).permutation(6)
    value = f(t, x)
    np.testing.assert_allclose(f(t[:, order], x[:, order]), value, 8 * eps)
    np.testing.assert_allclose(f(t + 4, x - 2), value, 40 * eps)
    np.testing.assert_allclose(jax.jit(f)(t, x), value, 4 * eps)
    np.testing.assert_allclose(jax.vmap(f)(t, x), value, 4 * eps)
    np.testing.assert_allclose(information.entropy(t[:, order]), information.entropy(t), 8 * eps)
    np.testing.assert_allclose(jax.jit(information.entropy)(t), information.entropy(t), 4 * eps)


@pytest.mark.x64_once
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(dtype):
    t, x = (logits("float32", 9, seed=s).astype(dtype) for s in (0, 1))

    @jax.jit
    def results(t, x):
        of_two = [f(t, x) for f in OF_TWO.values()]
        return [information.entropy(t), *of_two], information.temper(t, 0.5)

    (values, tempered), (of_wide, wide) = results(t, x), results(*np.float32([t, x]))
    assert all(value.dtype == np.float32 for value in values)
    np.testing.assert_array_equal(values, of_wide)
    np.testing.assert_array_equal(tempered, np.asarray(wide).astype(dtype))
    for f in OF_TWO.values():
        assert all(g.dtype == dtype for g in jax.eval_shape(jax.grad(f, (0, 1)), t, x))


# Tempering


def test_temper_is_a_power(dtype):
    x, eps = logits(dtype, 4, 6, scale=2), float(jnp.finfo(dtype).eps)
    np.testing.assert_array_equal(information.temper(x, 1.0), softjax.log_softmax(x))
    p = rounded(oracles.softmax(exact(x)))
    for alpha in (-1.0, 0.0, 0.5, 2.0, 7.0):
        power = p**alpha / np.sum(p**alpha, -1, keepdims=True)
        tempered = information.temper(x, alpha)
        np.testing.assert_allclose(np.exp(np.asarray(tempered, np.float64)), power, 100 * eps)
        once = information.temper(information.temper(x, alpha), 3.0)
        np.testing.assert_allclose(once, information.temper(x, 3 * alpha), 20 * eps, 100 * eps)


@pytest.mark.x64_once
def test_temper_at_large_offsets_and_powers(dtype):
    x = np.array([8192, 8191, 8190, -INF], dtype)
    cold = np.array([0, -1e4, -2e4, -INF], dtype)
    np.testing.assert_array_equal(information.temper(x, 1e4), cold)
    uniform = np.append(np.full(3, -np.log(3)), -INF)
    np.testing.assert_allclose(information.temper(x, 0.0), uniform, 2e-7)
    np.testing.assert_array_equal(information.temper(np.full(2, -INF, dtype), 2.0), -INF)


@pytest.mark.x64_once
@modes
def test_temper_gradients(mode, dtype):
    x, alpha = logits(dtype, 5), np.asarray(1.5, dtype)
    x[2] = -INF
    finite, eps = np.arange(5) != 2, float(jnp.finfo(dtype).eps)
    by_x, by_alpha = mode(information.temper, (0, 1))(x, alpha)
    q = rounded(oracles.softmax(exact(x) * gmpy2.mpfr(1.5), finite))
    expected = np.where(finite, x - np.sum(q[finite] * x[finite]), by_alpha)
    np.testing.assert_allclose(by_alpha, expected, 40 * eps, 20 * eps)
    jacobian = 1.5 * (np.eye(5) - q)
    np.testing.assert_allclose(by_x[finite][:, finite], jacobian[finite][:, finite], 40 * eps)


# Bad input


@pytest.mark.x64_once
def test_bad_labels(dtype):
    x = np.zeros((2, 3), dtype)
    for bad in (-1, 3):
        labels = jnp.array([0, bad])
        with pytest.raises(ValueError, match=rf"surprisal: `labels` .* \[0, 3\), got {bad}"):
            information.surprisal(x, labels)
        total = jax.jit(jax.value_and_grad(lambda x, y: information.surprisal(x, y).sum()))
        loss, gradient = total(x, labels)
        assert np.isnan(loss)
        assert np.all(np.isfinite(gradient[0]))
        assert np.all(np.isnan(gradient[1]))


@pytest.mark.x64_once
@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x: information.entropy(x, axis=2), ValueError, "entropy: `axis`"),
        (lambda x: information.entropy(x, where=x), TypeError, "entropy: `where`"),
        (lambda x: information.entropy(jnp.array([1j])), TypeError, "entropy: `logits`"),
        (lambda x: information.perplexity(x, axis=2), ValueError, "perplexity: `axis`"),
        (lambda x: information.kl_divergence(x, x[0]), ValueError, "kl_divergence: `logits`"),
        (lambda x: information.cross_entropy(x, x[:1]), ValueError, "cross_entropy: `logits`"),
        (lambda x: information.surprisal(x, x[:, 0]), TypeError, "surprisal: `labels`"),
        (lambda x: information.surprisal(x, jnp.zeros(3, int)), ValueError, "surprisal: `labels`"),
        (lambda x: information.joint_entropy(x, -1), ValueError, "joint_entropy: `n`"),
        (lambda x: information.joint_entropy(x, HALF), TypeError, "joint_entropy: `n`"),
        (lambda x: information.temper(x, x), ValueError, "temper: `alpha`"),
        (lambda x: information.nats_to_bits(np.array("x")), TypeError, "nats_to_bits: `nats`"),
    ],
)
def test_misuse(call, error, words):
    with pytest.raises(error, match=words):
        call(jnp.zeros((2, 3)))
