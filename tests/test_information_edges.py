"""Entropies at the edges: masks, empty rows, infinities, bad labels, misuse."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from entropies import OF_ONE, OF_TWO, logits, of_two
from jax.experimental import checkify

import softjax
from softjax import information

pytestmark = pytest.mark.compiled_quickly

INF, NAN = np.inf, np.nan


HALF: Any = 0.5  # where only an integer will do


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
