"""Bradley-Terry and Plackett-Luce, against their definitions in 200-bit arithmetic."""

import itertools
import math

import gmpy2
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from oracles import exact, rounded
from orders import check_two_orders

import softjax
from softjax.choice import bradley_terry_loss, bradley_terry_probability, plackett_luce_loss

# Where digits or equal bits are asserted, programs are compiled as users have them.
pytestmark = pytest.mark.compiled_quickly
compiled_fully = pytest.mark.compiled_quickly(False)

INF, NAN = np.inf, np.nan
modes = pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev])


def plackett_luce(scores, ranking, where=None):
    """(loss, gradient) of one ranking: a choice from what is left, again and again."""
    x = exact(scores)
    left = np.ones(len(x), bool) if where is None else np.array(where)
    loss, gradient = gmpy2.mpfr(0), exact(np.zeros(len(x)))
    for item in ranking:
        if item == -1:
            continue
        label = np.asarray(item)
        loss = loss + oracles.cross_entropy(x, label, left)
        gradient = gradient + oracles.cross_entropy_gradient(x, label, left)
        left[item] = False
    return loss, gradient


def plackett_luce_hessian(scores, ranking):
    left = np.ones(len(scores), bool)
    total = np.zeros((len(scores), len(scores)))
    for item in ranking:
        total[np.ix_(left, left)] += rounded(oracles.hessian(exact(scores)[left]))
        left[item] = False
    return total


def random_scores(dtype, *shape, scale=1.0, seed=0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def near(actual, desired, dtype, size=12.0):
    """Within `size` roundings of numbers of size one, or of the desired one where it is larger."""
    tolerance = size * float(jnp.finfo(dtype).eps)
    desired = rounded(desired)
    np.testing.assert_allclose(np.asarray(actual, np.float64), desired, tolerance, tolerance)


# Bradley and Terry


@compiled_fully
def test_the_probabilities_are_a_softmax(dtype):
    i, j, neither = random_scores(dtype, 3, 20, scale=3)
    given = (i, j), (i, j, neither)
    two, three = (np.asarray(bradley_terry_probability(*scores)) for scores in given)
    assert two.shape == (20, 2)
    assert three.shape == (20, 3)
    near(two, oracles.softmax(exact(np.stack([i, j], -1))), dtype)
    near(three, oracles.softmax(exact(np.stack([i, j, neither], -1))), dtype)
    near(two[:, 0], 1 / (1 + np.exp(rounded(j) - i)), dtype)
    # Neither takes from both in proportion.
    near(three[:, 0] / three[:, 1], np.exp(rounded(i) - j), dtype, 40)


@pytest.mark.x64_once
def test_a_larger_score_is_more_likely_to_win(dtype):
    scores = np.linspace(-3, 3, 13).astype(dtype)
    for neither in (None, 0.5):
        wins = bradley_terry_probability(scores, 0.0, neither)[:, 0]
        assert np.all(np.diff(wins) > 0)
    even = bradley_terry_probability(scores, 0.0)
    np.testing.assert_array_equal(even[:, 0] > 0.5, scores > 0)


@pytest.mark.x64_once
def test_neither_never_wins_with_a_score_of_minus_infinity(dtype):
    i, j = random_scores(dtype, 2, 9)
    three = bradley_terry_probability(i, j, -INF)
    np.testing.assert_array_equal(three[:, :2], bradley_terry_probability(i, j))
    np.testing.assert_array_equal(three[:, 2], 0)


@compiled_fully
def test_the_loss_is_the_log_likelihood_and_its_gradient_the_surprise(dtype):
    i, j, neither = random_scores(dtype, 3, 6, scale=3)
    outcome = np.arange(6) % 3
    table = exact(np.stack([i, j, neither], -1))
    loss = bradley_terry_loss(i, j, outcome, neither)
    near(loss, oracles.cross_entropy(table, outcome), dtype)
    total = lambda i, j, n: bradley_terry_loss(i, j, outcome, n).sum()  # noqa: E731
    gradients = jax.jit(jax.grad(total, (0, 1, 2)))(i, j, neither)
    near(np.stack(gradients, -1), oracles.cross_entropy_gradient(table, outcome), dtype)


@compiled_fully
def test_a_sure_win_keeps_its_digits(dtype):
    i, zero = np.asarray(20, dtype), np.asarray(0, dtype)
    both = jax.jit(jax.value_and_grad(bradley_terry_loss, (0, 1)))
    loss, gradients = both(i, zero, np.array(0))
    table = exact([20, 0])
    assert oracles.ulps(loss, oracles.cross_entropy(table, 0)) <= 4
    expected = oracles.cross_entropy_gradient(table, 0)
    assert oracles.ulps(np.stack(gradients), expected).max() <= 4


@pytest.mark.x64_once
def test_scores_broadcast_and_outcomes_do_not(dtype):
    champion, others = np.asarray(1, dtype), random_scores(dtype, 4)
    outcome = np.array([0, 1, 0, 1])
    each = [bradley_terry_loss(champion, s, y) for s, y in zip(others, outcome, strict=True)]
    near(bradley_terry_loss(champion, others, outcome), np.stack(each), dtype)
    assert bradley_terry_loss(champion, others, outcome, 0).dtype == dtype
    assert bradley_terry_probability(1, 2).dtype == dtype
    with pytest.raises(ValueError, match="bradley_terry_loss: `outcome`"):
        bradley_terry_loss(champion, others, np.array([0]))


@pytest.mark.x64_once
def test_half_precision():
    i, j = (jnp.asarray(x, jnp.bfloat16) for x in ([6.0, 1.0], [0.0, 2.0]))
    outcome = jnp.array([0, 1])
    assert bradley_terry_probability(i, j).dtype == jnp.bfloat16
    loss = bradley_terry_loss(i, j, outcome)
    assert loss.dtype == jnp.float32
    near(loss, oracles.cross_entropy(exact([[6, 0], [1, 2]]), outcome), jnp.float32)
    scores = jnp.asarray([0, 6, 3], jnp.bfloat16)
    ranking = [1, 2, 0]
    loss, gradient = jax.value_and_grad(plackett_luce_loss)(scores, jnp.array(ranking))
    assert (loss.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)
    near(loss, plackett_luce([0, 6, 3], ranking)[0], jnp.float32)


@pytest.mark.x64_once
@pytest.mark.parametrize("neither", [None, 0.0])
def test_bad_outcomes(neither, dtype):
    i, j = random_scores(dtype, 2, 2)
    for bad in (-1, 2 if neither is None else 3):
        outcome = jnp.array([0, bad])
        with pytest.raises(
            ValueError, match=rf"bradley_terry_loss: `outcome` .* got {bad} at \(1,\)"
        ):
            bradley_terry_loss(i, j, outcome, neither)

        def total(i, outcome):
            return bradley_terry_loss(i, j, outcome, neither).sum()

        loss, gradient = jax.jit(jax.value_and_grad(total))(i, outcome)
        assert np.isnan(loss)
        np.testing.assert_array_equal(np.isnan(gradient), [False, True])


# Plackett and Luce


@pytest.mark.x64_once
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_probabilities_of_all_rankings_sum_to_one(n, dtype):
    scores = random_scores(dtype, n, scale=2)
    every = [np.array([*itertools.permutations(range(n), k)], int) for k in range(n + 1)]

    @jax.jit
    def of_every_length(scores):
        given = [(jnp.broadcast_to(scores, (len(r), n)), r) for r in every]
        return [plackett_luce_loss(*one) for one in given]

    for losses in of_every_length(scores):
        near(np.sum(np.exp(-np.asarray(losses, np.float64))), 1, dtype, 20)


@compiled_fully
@pytest.mark.parametrize("k", [1, 3, 6])
def test_loss_and_gradient(k, dtype):
    scores = np.concatenate([random_scores(dtype, 5, 6, scale=s) for s in (0.1, 1.0, 10.0)])
    rankings = np.stack([np.random.default_rng(s).permutation(6)[:k] for s in 3 * [*range(5)]])
    actual = jax.jit(jax.vmap(jax.value_and_grad(plackett_luce_loss)))(scores, rankings)
    for loss, gradient, row, ranking in zip(*actual, scores, rankings, strict=True):
        expected = plackett_luce(row, ranking)
        near(loss, expected[0], dtype, 40)
        near(gradient, expected[1], dtype, 40)


@compiled_fully
def test_a_sure_ranking_keeps_its_digits(dtype):
    scores = np.array([0, 50, 20], dtype)
    ranking = np.array([1, 2, 0])
    loss, gradient = jax.jit(jax.value_and_grad(plackett_luce_loss))(scores, ranking)
    expected = plackett_luce(scores, ranking)
    assert oracles.ulps(loss, expected[0]) <= 4
    assert oracles.ulps(gradient, expected[1]).max() <= 4


@pytest.mark.x64_once
@modes
def test_second_derivatives(mode, dtype):
    scores, ranking = random_scores(dtype, 4), np.array([2, 0, 3])
    expected = plackett_luce_hessian(scores, ranking)
    for outer in (jax.jacfwd, jax.jacrev):
        hessian = jax.jit(outer(mode(plackett_luce_loss)))(scores, ranking)
        near(hessian, expected, dtype)
        assert np.linalg.eigvalsh(hessian).min() >= -8 * float(jnp.finfo(dtype).eps)


@pytest.mark.x64_once(True)  # finite differences say something in float64 only
def test_two_orders_in_both_modes():
    scores = random_scores("float64", 4)
    for f in (
        lambda s: plackett_luce_loss(s, np.array([2, 0, 3])),
        lambda s: bradley_terry_loss(s[0], s[1], jnp.array(2), s[2]),
    ):
        check_two_orders(f, scores)


@compiled_fully
@pytest.mark.x64_once
def test_one_choice_is_the_cross_entropy(dtype):
    scores, labels = random_scores(dtype, 6, 5), np.arange(6) % 5
    losses = plackett_luce_loss(scores, labels[:, None])
    np.testing.assert_array_equal(losses, softjax.cross_entropy(scores, labels))


@compiled_fully
@pytest.mark.x64_once
def test_two_items_are_a_comparison(dtype):
    scores, winner = random_scores(dtype, 6, 2), np.arange(6) % 2
    losses = plackett_luce_loss(scores, np.stack([winner, 1 - winner], -1))
    np.testing.assert_array_equal(losses, bradley_terry_loss(scores[:, 0], scores[:, 1], winner))


@pytest.mark.x64_once
@pytest.mark.parametrize("n", [1, 3, 20])
def test_equal_scores_make_all_rankings_equally_likely(n, dtype):
    loss = plackett_luce_loss(np.full(n, 3, dtype), np.arange(n)[::-1])
    near(loss, math.log(math.factorial(n)), dtype)


@pytest.mark.x64_once
def test_only_differences_and_names_matter(dtype):
    scores, ranking = random_scores(dtype, 6), np.array([4, 1, 0, 5])
    loss = plackett_luce_loss(scores, ranking)
    near(plackett_luce_loss(scores + 4, ranking), loss, dtype, 40)
    order = np.random.default_rng(1).permutation(6)
    near(plackett_luce_loss(scores[order], np.argsort(order)[ranking]), loss, dtype)
    # What comes before the last one decides it: a full ranking needs no last place.
    full = np.array([4, 1, 0, 5, 2, 3])
    short = plackett_luce_loss(scores, full[:-1])
    np.testing.assert_array_equal(plackett_luce_loss(scores, full), short)


@pytest.mark.x64_once
def test_padding_adds_nothing(dtype):
    scores = random_scores(dtype, 3, 5)
    rankings = np.array([[3, 0, 4], [2, -1, -1], [-1, -1, -1]], np.int8)
    losses = plackett_luce_loss(scores, rankings)
    near(losses[0], plackett_luce(scores[0], rankings[0])[0], dtype)
    assert losses[1] == plackett_luce_loss(scores[1], rankings[1, :1])
    assert losses[2] == 0
    gradients = jax.grad(lambda s: plackett_luce_loss(s, rankings).sum())(scores)
    near(gradients[1], plackett_luce(scores[1], [2])[1], dtype)
    np.testing.assert_array_equal(gradients[2], 0)
    assert plackett_luce_loss(scores, np.zeros((3, 0), int)).tolist() == [0, 0, 0]


@pytest.mark.x64_once
@pytest.mark.parametrize("hidden", [NAN, INF, -INF, 1e30])
def test_items_that_take_no_part_never_count(hidden, dtype):
    scores = random_scores(dtype, 5)
    where, ranking = np.array([True, False, True, True, False]), np.array([3, 0])
    scores[~where] = hidden

    def f(s):
        return plackett_luce_loss(s, ranking, where)

    loss, gradient = jax.value_and_grad(f)(scores)
    kept = jax.value_and_grad(plackett_luce_loss)(scores[where], np.array([2, 0]))
    near(loss, kept[0], dtype)
    near(gradient[where], kept[1], dtype)
    np.testing.assert_array_equal(gradient[~where], 0)
    tangent = np.where(where, np.arange(5), NAN).astype(dtype)
    near(jax.jvp(f, (scores,), (tangent,))[1], kept[1] @ tangent[where], dtype)


@pytest.mark.x64_once
def test_nobody_takes_part(dtype):
    scores, nobody = np.full(3, NAN, dtype), np.zeros(3, bool)
    loss, gradient = jax.value_and_grad(plackett_luce_loss)(scores, np.full(2, -1), nobody)
    assert loss == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.x64_once
def test_an_impossible_item_before_others(dtype):
    scores = np.array([0, -INF, 1], dtype)
    assert plackett_luce_loss(scores, np.array([1])) == INF
    near(plackett_luce_loss(scores, np.array([2, 0, 1])), math.log1p(math.exp(-1)), dtype)


@pytest.mark.x64_once
def test_jit_and_vmap(dtype):
    scores = random_scores(dtype, 4, 5)
    rankings = np.stack([np.random.default_rng(s).permutation(5)[:3] for s in range(4)])
    where = np.ones((4, 5), bool)
    losses = plackett_luce_loss(scores, rankings, where)
    np.testing.assert_array_equal(jax.jit(plackett_luce_loss)(scores, rankings, where), losses)
    np.testing.assert_array_equal(jax.vmap(plackett_luce_loss)(scores, rankings), losses)
    batches = plackett_luce_loss(scores.reshape(2, 2, 5), rankings.reshape(2, 2, 3))
    np.testing.assert_array_equal(batches.ravel(), losses)


@pytest.mark.x64_once
@pytest.mark.parametrize(
    ("ranking", "got"),
    [
        ([0, 3, 1], r"3 at \(1,\)"),  # takes no part
        ([0, 1, 0], r"0 at \(2,\)"),  # twice
        ([0, 4, 1], r"4 at \(1,\)"),  # out of range
        ([-2, 1, 0], r"-2 at \(0,\)"),
    ],
)
def test_bad_rankings(ranking, got, dtype):
    scores, where = random_scores(dtype, 4), np.array([True, True, True, False])
    with pytest.raises(ValueError, match=f"plackett_luce_loss: `ranking` .* got {got}"):
        plackett_luce_loss(scores, jnp.array(ranking), where)
    both = jax.jit(jax.value_and_grad(lambda s, r: plackett_luce_loss(s, r, where[None]).sum()))
    loss, gradient = both(scores[None], jnp.array([ranking]))
    assert np.isnan(loss)
    np.testing.assert_array_equal(np.isnan(gradient[0]), where)


@pytest.mark.x64_once
def test_what_is_known_is_refused_inside_of_a_trace_too(dtype):
    scores, ranking, outcome = np.zeros(3, dtype), np.array([0, 0]), np.array(2)
    with pytest.raises(ValueError, match="`ranking`"):
        jax.jit(lambda s: plackett_luce_loss(s, ranking))(scores)
    with pytest.raises(ValueError, match="`outcome`"):
        jax.jit(lambda s: bradley_terry_loss(s[0], s[1], outcome))(scores)
    # Known and traced ones together: NaN, since the mask is not known.
    masked = jax.jit(lambda where: plackett_luce_loss(scores, ranking[:1], where))
    assert np.isnan(masked(np.array([False, True, True])))


def test_integers_and_numbers_follow_the_floating_scores():
    for score in (0, 0.0, jnp.array(0), jnp.array(0, jnp.int8)):
        for i, j in ((score, jnp.bfloat16(1)), (jnp.bfloat16(1), score)):
            assert bradley_terry_probability(i, j).dtype == jnp.bfloat16


@pytest.mark.x64_once
@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda s: bradley_terry_loss(s, s[:2], np.zeros(3, int)),
            ValueError,
            "`score_i`, `score_j`",
        ),
        (lambda s: bradley_terry_loss(s, 1j, np.zeros(3, int)), TypeError, "`score_j`"),
        (lambda s: bradley_terry_probability(s, s, np.array("x")), TypeError, "`neither`"),
        (lambda s: bradley_terry_loss(s, s, s), TypeError, "`outcome`"),
        (lambda s: plackett_luce_loss(s[0], jnp.array(0)), ValueError, "`scores`"),
        (lambda s: plackett_luce_loss(s, jnp.array(0)), ValueError, "`ranking`"),
        (lambda s: plackett_luce_loss(s, jnp.zeros((1, 2), int)), ValueError, "`ranking`"),
        (lambda s: plackett_luce_loss(s, jnp.arange(4)), ValueError, "`ranking`"),
        (lambda s: plackett_luce_loss(s, s), TypeError, "`ranking`"),
        (lambda s: plackett_luce_loss(s, jnp.zeros(2, jnp.uint8)), TypeError, "`ranking`"),
        (lambda s: plackett_luce_loss(s, jnp.arange(3), s), TypeError, "`where`"),
    ],
)
def test_misuse(call, error, words):
    with pytest.raises(error, match=words):
        call(jnp.zeros(3))
