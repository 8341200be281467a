"""Information from logits, against its definitions in 200-bit arithmetic."""

import gmpy2
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from entropies import (
    OF_TWO,
    cross_entropy,
    entropy,
    entropy_gradient,
    kl_divergence,
    logits,
    of_two,
    pairs,
    roundings,
)
from oracles import exact, rounded

import softjax
from softjax import information

# Where digits or equal bits are asserted, programs are compiled as users have them.
pytestmark = pytest.mark.compiled_quickly
compiled_fully = pytest.mark.compiled_quickly(False)

INF, NAN = np.inf, np.nan

modes = pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev])


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


# Axes, dtypes


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
