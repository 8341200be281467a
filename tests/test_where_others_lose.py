"""Every row of "Where others lose": inputs for which jax.nn, optax, torch or scipy were wrong.

The peers' figures are quoted in comments; only softjax is asserted. Tolerances are in units in the
last place: 5, plus one for each unit of the gap between the two largest logits.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import softjax

# Where neither digits nor a fusion are asserted.
quickly = pytest.mark.compiled_quickly


def test_logsumexp_of_a_dominated_row(dtype):
    for gap in (20.0, 40.0):  # jax, torch: 0
        x = np.array([0.0, -gap], dtype)
        y = softjax.logsumexp(x)
        assert oracles.ulps(y, oracles.logsumexp(oracles.exact(x))) <= 5 + gap
    np.testing.assert_allclose(softjax.logsumexp(np.array([0.0, -20.0], dtype)), 2.0611537e-9, 1e-6)


@pytest.mark.x64_once(True)
def test_logsumexp_of_a_dominated_row_in_float64():
    np.testing.assert_allclose(softjax.logsumexp(np.array([0.0, -40.0])), 4.248354255291589e-18)


def test_logsumexp_of_a_long_dominated_row(dtype):
    x = np.full(1024, -20, dtype)  # jax: 3.576e-6
    x[300] = 0
    np.testing.assert_allclose(softjax.logsumexp(x), 2.108558e-6, 1e-6)
    assert oracles.ulps(softjax.logsumexp(x), oracles.logsumexp(oracles.exact(x))) <= 5 + 20


@pytest.mark.parametrize("margin", [6.0, 10.0, 14.0, 16.0, 17.0, 40.0, 80.0])
def test_loss_and_gradient_of_a_confident_right_answer(margin, dtype):
    # optax, relative errors of the loss: 1.3e-5 / 4e-4 / 3.5e-3 / 6e-2; the gradient at the label
    # is exactly 0 from 17 on.
    x = np.array([0.0, margin, -1.0], dtype)
    value, gradient = jax.value_and_grad(softjax.cross_entropy)(jnp.asarray(x), 1)
    exact = oracles.exact(x)
    assert oracles.ulps(value, oracles.cross_entropy(exact, 1)) <= 5 + margin
    expected = oracles.cross_entropy_gradient(exact, 1)
    assert np.all(oracles.ulps(gradient, expected) <= 5 + margin + 1)


@pytest.mark.x64_once
def test_loss_and_gradient_in_bfloat16():
    # optax: loss 0, gradient [0, .00247]
    x = jnp.asarray([0.0, -6.0], jnp.bfloat16)
    value, gradient = jax.value_and_grad(softjax.cross_entropy)(x, 0)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, 0.0024756852, rtol=1e-6)
    assert gradient.dtype == jnp.bfloat16
    assert np.max(oracles.ulps(gradient, oracles.cross_entropy_gradient(x, 0))) <= 0.51


@pytest.mark.x64_once
def test_no_label_gradient_vanishes_in_bfloat16():
    # optax: 46.6 % of them are exactly 0.
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2000, 1000))
    x[:, 7] = x.max(-1) + rng.uniform(5, 20, 2000)
    labels = np.full(2000, 7)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(softjax.cross_entropy(x, labels))))
    assert np.all(np.asarray(gradient(x.astype(jnp.bfloat16)), np.float32)[:, 7] < 0)


def test_hessian_of_a_dominated_row(dtype):
    # jax: [[0, -2.06e-9], [-2.06e-9, 2.06e-9]], which has a negative eigenvalue
    x = np.asarray([0.0, -20.0], dtype)
    hessian = jax.jit(jax.hessian(softjax.logsumexp))(x)
    assert np.max(oracles.ulps(hessian, oracles.hessian(oracles.exact(x)))) <= 2 * (5 + 20)
    assert np.linalg.eigvalsh(np.asarray(hessian, np.float64))[0] >= -1e-6 * 4.2e-9


@pytest.mark.x64_once
def test_hessians_are_positive_semidefinite(dtype):
    # jax: 26 of 60 are not.
    x = jnp.asarray(20 * np.random.default_rng(1).standard_normal((60, 6)), dtype)
    hessians = np.asarray(jax.jit(jax.vmap(jax.hessian(softjax.logsumexp)))(x), np.float64)
    eigenvalues = np.linalg.eigvalsh((hessians + hessians.swapaxes(1, 2)) / 2)
    assert np.all(eigenvalues[:, 0] >= -1e-6 * eigenvalues[:, -1])


@pytest.mark.x64_once
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_loss_does_not_feel_an_offset(kind, x64):
    # optax, offset by 100: relative error 3.7e-5 in float32, 1 in bfloat16
    x = np.array([[1.0, -7.0, 0.5], [12.0, 0.0, -2.0]], jnp.dtype(kind))
    labels = np.array([2, 0])
    shifted = x + np.asarray(128, x.dtype)
    # What the shift rounds away is in the input, not in the loss.
    reference = oracles.cross_entropy(oracles.exact(shifted), labels)
    assert np.max(oracles.ulps(softjax.cross_entropy(shifted, labels), reference)) <= 5 + 12
    if kind == "float32":
        np.testing.assert_array_equal(
            softjax.cross_entropy(shifted, labels), softjax.cross_entropy(x, labels)
        )


@pytest.mark.x64_once
def test_a_long_row_in_float16():
    zeros = np.zeros(70_000, np.float16)  # jax: inf, softmax 0, loss inf
    assert float(softjax.logsumexp(zeros)) == np.float16(np.log(70_000))
    p = np.asarray(softjax.softmax(zeros))
    assert oracles.ulps(p[0], 1 / 70_000) <= 0.51
    loss = softjax.cross_entropy(zeros, 5)
    np.testing.assert_allclose(loss, np.log(70_000), rtol=1e-6)


def test_small_integers_do_not_wrap(dtype):
    # jax: [.731, .269] and [nan, 0]
    p = softjax.softmax(jnp.asarray([-128, 127], jnp.int8))
    np.testing.assert_allclose(p, [np.exp(-255.0) if dtype == "float64" else 0, 1], rtol=1e-13)
    p = softjax.softmax(jnp.asarray([3, 5], jnp.uint8))
    np.testing.assert_allclose(p, [0.11920292202211756, 0.8807970779778823], rtol=1e-6)


@pytest.mark.x64_once  # in float64 the rounding that is lost is 4e-6, and nothing overflows
@pytest.mark.parametrize("shape", [(64, 10), (64, 100), (100, 1000), (65536, 10), (16, 32000)])
def test_a_product_in_front_is_not_contracted(shape, dtype):
    # jax under jit, x near 2e10: NaN, from a fused multiply-add. The label is a maximal class of
    # the product, rounded as it is, so that every loss is at most log of the number of ties.
    x = np.random.default_rng(2).uniform(1e10, 2e10, shape).astype(dtype)
    c = np.asarray(1.3, dtype)
    labels = np.argmax(x * c, -1)

    def losses(x, c):
        return softjax.cross_entropy(x * c, labels)

    functions = (
        lambda x, c: softjax.softmax(x * c),
        losses,
        lambda x, c: softjax.log_softmax(x * c),
        lambda x, c: softjax.logsumexp(x * c, axis=-1),
        jax.grad(lambda x, c: jnp.sum(losses(x, c))),
    )

    # In one program, in which each function has a product of its own.
    @jax.jit
    def of_products(arguments):
        return [f(*own) for f, own in zip(functions, arguments, strict=True)]

    results = [np.asarray(a, np.float64) for a in of_products([(x, c)] * len(functions))]
    for result in results:
        assert np.all(np.isfinite(result))
    np.testing.assert_allclose(results[0].sum(-1), 1, rtol=1e-5)
    assert np.max(results[1]) <= np.log(shape[-1])


@quickly
@pytest.mark.x64_once
def test_gradient_of_a_row_of_minus_infinity(dtype):
    x = jnp.full(3, -jnp.inf, dtype)  # jax: NaN
    np.testing.assert_array_equal(jax.grad(softjax.logsumexp)(x), 0)


@quickly
@pytest.mark.x64_once
def test_forward_mode_where_nothing_is_left(dtype):
    x, where = jnp.ones(3, dtype), jnp.zeros(3, bool)  # jax: NaN
    y, y_dot = jax.jvp(lambda x: softjax.logsumexp(x, where=where), (x,), (x,))
    assert (y, y_dot) == (-jnp.inf, 0)


@quickly
@pytest.mark.x64_once
def test_derivative_with_respect_to_a_factor_of_zero(dtype):
    zeros, b = jnp.zeros(3, dtype), jnp.asarray([2.0, 0.0, 5.0], dtype)
    gradient = jax.grad(lambda b: softjax.logsumexp(zeros, b=b))(b)  # jax: [.143, 0, .143]
    np.testing.assert_allclose(gradient, np.full(3, 1 / 7), rtol=1e-6)


def test_entropy_of_a_dominated_row(dtype):
    # -sum p log p: 4.122e-8
    entropy = softjax.information.entropy(jnp.asarray([0.0, -20.0], dtype))
    p = oracles.softmax(oracles.exact([0.0, -20.0]))
    log_p = oracles.log_softmax(oracles.exact([0.0, -20.0]))
    expected = float(-(p * log_p).sum())
    np.testing.assert_allclose(entropy, expected, rtol=(5 + 20) * float(jnp.finfo(dtype).eps))
    np.testing.assert_allclose(expected, 4.328e-8, rtol=1e-3)


@jax.jit
def loss_and_gradient(x, labels):
    losses, pullback = jax.vjp(lambda x: softjax.cross_entropy(x, labels), x)
    return losses, pullback(jnp.ones_like(losses))[0]


@quickly
@pytest.mark.x64_once
@pytest.mark.parametrize("label", [3, -1, 1000, -(2**31)])
def test_a_bad_label_is_refused_or_nan(label, dtype):
    # optax: K gives a NaN loss with a finite, wrong gradient; -1 wraps to the last class.
    x = jnp.zeros((2, 3), dtype)
    labels = jnp.asarray([1, label])
    with pytest.raises(ValueError, match=r"`labels` must be in \[0, 3\), got"):
        softjax.cross_entropy(x, labels)
    losses, gradient = loss_and_gradient(x, labels)
    np.testing.assert_array_equal(np.isnan(losses), [False, True])
    np.testing.assert_array_equal(np.isnan(gradient), [[False] * 3, [True] * 3])


@quickly
@pytest.mark.x64_once
def test_the_mean_of_a_masked_batch(dtype):
    x = jnp.asarray([[0.0, 1.0], [2.0, 0.0], [0.0, 0.0]], dtype)
    labels = jnp.asarray([0, -100, 1])
    losses = softjax.cross_entropy(x, labels, ignore_index=-100)
    assert losses[1] == 0
    mean = softjax.weighted_mean(losses, labels != -100)  # .mean() divides by 3
    np.testing.assert_allclose(mean, (np.log1p(np.e) + np.log(2)) / 2, rtol=1e-6)


@quickly
@pytest.mark.x64_once
def test_smoothing_is_over_the_unmasked_classes(dtype):
    # optax puts mass on the masked class: infinite
    x = jnp.asarray([1.0, 2.0, 5.0], dtype)
    where = jnp.asarray([True, True, False])
    loss = softjax.cross_entropy(x, 0, where=where, label_smoothing=0.1)
    expected = oracles.cross_entropy(x[:2], 0, label_smoothing=0.1)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
