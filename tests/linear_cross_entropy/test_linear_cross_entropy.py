"""linear_cross_entropy: values and gradients against float64, for any size of the pieces."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from plain_heads import plain_linear_cross_entropy

import softjax

pytestmark = pytest.mark.compiled_quickly

N, D, V = 37, 6, 131
# None: the default pieces. The others: pieces of classes; one class at a time.
BUDGETS = (None, 9_000, 1)


def head(dtype, n=N, d=D, v=V, scale=1.0, seed=0):
    """hidden, kernel, bias and labels; sums of D products are exact to a few roundings."""
    rng = np.random.default_rng(seed)
    hidden = np.round(rng.standard_normal((n, d)) * 16) / 16
    kernel = scale * np.round(rng.standard_normal((d, v)) * 16) / 16
    bias = scale * np.round(rng.standard_normal(v) * 16) / 16
    return *(a.astype(dtype) for a in (hidden, kernel, bias)), rng.integers(v, size=n)


def expected(hidden, kernel, bias, labels, **options):
    """The losses, and the gradients of their sum by hidden, kernel and bias, in float64."""
    h, w, b = (np.asarray(a, np.float64) for a in (hidden, kernel, bias))
    logits = h @ w + b
    losses = oracles.cross_entropy(logits, labels, **options)
    g = oracles.cross_entropy_gradient(logits, labels, **options)
    return losses, g, (g @ w.T, h.T @ g, g.sum(0))


def close(actual, desired, dtype, roundings=64.0):
    """Within some roundings of the largest entry: the terms of a product cancel."""
    desired = np.asarray(desired, np.float64)
    atol = roundings * float(jnp.finfo(dtype).eps) * max(np.abs(desired).max(initial=0), 1e-30)
    np.testing.assert_allclose(np.asarray(actual, np.float64), desired, rtol=0, atol=atol)


def gradients(reduction, labels, **options):
    def loss(hidden, kernel, bias):
        losses = softjax.linear_cross_entropy(
            hidden, kernel, labels, bias, reduction=reduction, **options
        )
        return jnp.sum(losses)

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))


@pytest.mark.x64_once(True)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_value_and_gradient_do_not_depend_on_the_pieces(reduction, budget, dtype):
    """Also the label's class in every piece, and a bias that is not zero."""
    hidden, kernel, bias, labels = head(dtype)
    losses, _, expected_gradients = expected(hidden, kernel, bias, labels)
    value, actual = gradients(reduction, labels, max_temp_bytes=budget)(hidden, kernel, bias)
    share = 1 / N if reduction == "mean" else 1
    close(value, losses.sum() * share, dtype)
    for a, b in zip(actual, expected_gradients, strict=True):
        close(a, b * share, dtype)


@pytest.mark.x64_once
@pytest.mark.parametrize("size", [V - 1, V, V + 1])
def test_no_padded_class_enters_the_sum(size, dtype):
    """V one more than a piece and small logits: a padded zero column would dominate."""
    # Pieces of classes: the budget is that of some 16 columns.
    budget = 37 * D * 8 + 16 * 3 * (37 + D) * 8
    labels = head(dtype, v=size)[-1]
    run = gradients("sum", labels, max_temp_bytes=budget)
    for scale in (0.01, 30.0):
        hidden, kernel, bias, same_labels = head(dtype, v=size, scale=scale)
        np.testing.assert_array_equal(same_labels, labels)
        losses, _, (_, kernel_bar, _) = expected(hidden, kernel, bias, labels)
        value, (_, actual, _) = run(hidden, kernel, bias)
        close(value, losses.sum(), dtype)
        close(actual, kernel_bar, dtype)


@pytest.mark.x64_once
@pytest.mark.parametrize("n", [1, 7, 9, 17])
def test_a_last_piece_of_rows_of_its_own_size(n):
    hidden, kernel, bias, labels = head("float32", n=n)
    losses, _, (hidden_bar, kernel_bar, _) = expected(hidden, kernel, bias, labels)
    for budget in (None, 16_000):
        run = gradients("sum", labels, max_temp_bytes=budget)
        value, actual = run(hidden, kernel, bias)
        close(value, losses.sum(), "float32")
        close(actual[0], hidden_bar, "float32")
        close(actual[1], kernel_bar, "float32")


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_cotangents_that_differ_and_are_not_one(reduction, dtype):
    hidden, kernel, bias, labels = head(dtype)
    _, g, _ = expected(hidden, kernel, bias, labels)
    cotangent = np.linspace(-2, 3, N) if reduction == "none" else np.full(N, -2.5 / N)

    def loss(kernel):
        losses = softjax.linear_cross_entropy(hidden, kernel, labels, bias, reduction=reduction)
        return jnp.sum(losses * cotangent.astype(dtype)) if losses.ndim else -2.5 * losses

    actual = jax.jit(jax.grad(loss))(jnp.asarray(kernel))
    close(actual, hidden.astype(np.float64).T @ (g * cotangent[:, None]), dtype)


@pytest.mark.x64_once
@pytest.mark.parametrize("kind", ["index", "distribution", "top-k"])
def test_every_option_at_once_is_that_of_the_plain_form(kind, dtype):
    """softcap and temperature with their gradients, weights, smoothing, z-loss, class weights."""
    n, v = 36, 128  # pieces that divide: each is compiled once
    hidden, kernel, bias, labels = head(dtype, n=n, v=v)
    rng = np.random.default_rng(1)
    real = {
        "hidden": hidden,
        "kernel": kernel,
        "bias": bias,
        "label_smoothing": 0.1,
        "class_weights": rng.random(v) + 0.5,
        "z_loss": 0.01,
        "softcap": 5.0,
        "temperature": 0.7,
        "weights": rng.random(n) + 0.1,
    }
    if kind == "distribution":
        real["labels"] = rng.random((n, v))
    if kind == "top-k":
        real["probabilities"] = rng.random((n, 3))
        indices = rng.integers(v, size=(n, 3))
    real = jax.tree.map(lambda a: jnp.asarray(a, dtype), real)

    def value_and_gradient(function):
        def loss(real):
            options = dict(real)
            if kind == "top-k":
                options["labels"] = softjax.TopKLabels(indices, options.pop("probabilities"))
            if kind == "index":
                options["labels"] = labels
            return function(**options, reduction="mean")

        return jax.jit(jax.value_and_grad(loss))(real)

    plain, desired = value_and_gradient(plain_linear_cross_entropy)
    for budget in (None, 9_000):
        fused = partial(softjax.linear_cross_entropy, max_temp_bytes=budget)
        value, actual = value_and_gradient(fused)
        close(value, plain, dtype)
        for name in real:
            close(actual[name], desired[name], dtype, roundings=400)


@pytest.mark.x64_once
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("budget", [None, 4_000])
def test_confident_rows_keep_their_digits(budget, reduction):
    """Margins up to 40: the loss and the gradient at the label are tiny, and right, in pieces."""
    margins = np.arange(4, 40, 4, dtype=np.float32)
    kernel = np.zeros((1, 300), np.float32)
    kernel[0, 7] = 1
    hidden, labels = margins[:, None], np.full(len(margins), 7)
    logits = oracles.exact(hidden.astype(np.float64) @ kernel)
    losses = oracles.rounded(oracles.cross_entropy(logits, labels))
    g = oracles.rounded(oracles.cross_entropy_gradient(logits, labels))[:, 7]

    def loss(hidden):
        losses = softjax.linear_cross_entropy(
            hidden, kernel, labels, reduction=reduction, max_temp_bytes=budget
        )
        return jnp.sum(losses), losses

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, actual), hidden_bar = run(jnp.asarray(hidden))
    np.testing.assert_allclose(actual, losses if actual.ndim else losses.sum(), rtol=5e-6)
    # The kernel has one entry, so that the gradient by hidden is that at the label's logit.
    np.testing.assert_allclose(hidden_bar[:, 0], g, rtol=5e-6)


@pytest.mark.x64_once(True)
@pytest.mark.parametrize("budget", [None, 9_000])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_the_leading_shape_changes_no_bit(reduction, budget, dtype):
    hidden, kernel, bias, labels = head(dtype, n=24)
    lead = (2, 3, 4)
    run = gradients(reduction, labels, max_temp_bytes=budget)
    value, (flat, kernel_bar, _) = run(hidden, kernel, bias)
    run = gradients(reduction, labels.reshape(lead), max_temp_bytes=budget)
    same, (shaped, same_bar, _) = run(hidden.reshape(*lead, D), kernel, bias)
    np.testing.assert_array_equal(same, value)
    np.testing.assert_array_equal(shaped.reshape(24, D), flat)
    np.testing.assert_array_equal(same_bar, kernel_bar)


@pytest.mark.x64_once
@pytest.mark.parametrize("half", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_no_worse_than_the_plain_form(half):
    """Beside the gradients in float32 of the same rounded inputs; dW sums over 37 pieces."""
    hidden, kernel, bias, labels = head("float32", n=592)
    hidden, kernel = (jnp.asarray(a / 2).astype(half) for a in (hidden, kernel))

    def run(function, dtype, reduction):
        def loss(hidden, kernel):
            losses = function(hidden, kernel, labels, jnp.asarray(bias), reduction=reduction)
            return jnp.mean(losses)

        return jax.jit(jax.grad(loss, (0, 1)))(hidden.astype(dtype), kernel.astype(dtype))

    def error(actual, desired):
        difference = np.asarray(actual, np.float64) - np.asarray(desired, np.float64)
        return np.linalg.norm(difference) / np.linalg.norm(np.asarray(desired, np.float64))

    desired = run(plain_linear_cross_entropy, jnp.float32, "mean")
    plain = run(plain_linear_cross_entropy, half, "mean")
    for reduction in ("none", "mean"):
        actual = run(softjax.linear_cross_entropy, half, reduction)
        for a, b, c in zip(actual, plain, desired, strict=True):
            assert a.dtype == half
            assert error(a, c) <= 1.1 * error(b, c) + float(jnp.finfo(half).eps) / 4


@pytest.mark.x64_once
def test_float16_keeps_gradients_that_one_over_n_would_lose():
    """A loss scale reaches the products before they are rounded."""
    hidden, kernel, bias, labels = head("float32", n=512)
    _, _, (_, kernel_bar, _) = expected(hidden, kernel, bias, labels)
    half = [jnp.asarray(a, jnp.float16) for a in (hidden, kernel, bias)]

    def loss(kernel):
        return 512.0 * softjax.linear_cross_entropy(
            half[0], kernel, labels, half[2], reduction="mean"
        )

    actual = np.asarray(jax.jit(jax.grad(loss))(half[1]), np.float64)
    np.testing.assert_allclose(actual, kernel_bar, rtol=2e-2, atol=2e-3 * np.abs(kernel_bar).max())
