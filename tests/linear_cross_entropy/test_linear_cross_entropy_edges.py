"""Edge cases of linear_cross_entropy: excluded examples, bad labels, infinities, misuse."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax import export
from plain_heads import plain_linear_cross_entropy

import softjax

pytestmark = pytest.mark.compiled_quickly

INF, NAN = np.inf, np.nan
N, D, V = 4, 2, 5


def head(dtype, seed=0):
    rng = np.random.default_rng(seed)
    hidden, kernel, bias = (rng.standard_normal(s) for s in ((N, D), (D, V), V))
    return hidden.astype(dtype), kernel.astype(dtype), bias.astype(dtype)


def run(hidden, kernel, labels, bias=None, **options):
    """Losses as returned, the gradients of their sum, and its tangent along the arguments."""

    @jax.jit
    def of(head, labels):
        def loss(head):
            losses = softjax.linear_cross_entropy(*head[:2], labels, *head[2:], **options)
            return jnp.sum(losses), losses

        ones = jax.tree.map(jnp.ones_like, head)
        gradients, losses = jax.grad(loss, has_aux=True)(head)
        return losses, gradients, jax.jvp(lambda head: loss(head)[0], (head,), (ones,))[1]

    head = tuple(map(jnp.asarray, (hidden, kernel) if bias is None else (hidden, kernel, bias)))
    return of(head, labels)


# Who takes no part


@pytest.mark.x64_once
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_all_rows_ignored(reduction, dtype):
    hidden, kernel, bias = head(dtype)
    results = run(hidden * NAN, kernel, jnp.full(N, -1), bias, ignore_index=-1, reduction=reduction)
    for a in jax.tree.leaves(results):
        np.testing.assert_array_equal(a, 0)


@pytest.mark.x64_once
@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_what_a_row_without_part_brings_never_matters(reduction, budget, dtype):
    """Not where it has weight 0, nor where its label is ignored."""
    hidden, kernel, bias = head(dtype)
    labels, weights = np.array([1, 4, -1, 2]), np.array([2.0, 0.0, 1.0, 0.5], dtype)
    part = np.array([True, False, False, True])
    logits = hidden.astype(np.float64) @ kernel + bias
    share = weights * part / (weights[part].sum() if reduction == "mean" else 1)
    expected = share * oracles.cross_entropy(logits, np.where(part, labels, 0))
    g = share[:, None] * oracles.cross_entropy_gradient(logits, np.where(part, labels, 0))
    tolerance = 20 * float(jnp.finfo(dtype).eps)
    for behind in (NAN, INF, 1e30):
        hidden[~part] = behind
        losses, gradients, slope = run(
            hidden,
            kernel,
            labels,
            bias,
            weights=weights,
            ignore_index=-1,
            reduction=reduction,
            max_temp_bytes=budget,
        )
        desired = expected if reduction == "none" else expected.sum()
        np.testing.assert_allclose(losses, desired, tolerance)
        of_kernel = np.where(part[:, None], hidden, 0).T @ g
        for a, b in zip(gradients, (g @ kernel.T, of_kernel, g.sum(0)), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)
        np.testing.assert_array_equal(gradients[0][~part], 0)
        np.testing.assert_allclose(slope, sum(map(jnp.sum, gradients)), 0, 10 * tolerance)


# Labels


@pytest.mark.parametrize("label", [V, -1])
def test_a_known_bad_label_is_named(label, dtype):
    hidden, kernel, _ = head(dtype)
    labels = np.array([0, 1, label, 2])
    message = rf"softjax\.linear_cross_entropy: `labels` must be in \[0, 5\), got {label} at \(2,\)"
    with pytest.raises(ValueError, match=message):
        softjax.linear_cross_entropy(hidden, kernel, labels)
    with pytest.raises(ValueError, match=rf"`labels` must be in \[0, 5\), got {label}"):
        softjax.linear_cross_entropy(
            hidden, kernel, softjax.TopKLabels(labels[:, None], jnp.ones((N, 1), dtype))
        )


@pytest.mark.x64_once
@pytest.mark.parametrize("bias", [0.0, -INF])
@pytest.mark.parametrize("budget", [None, 1])
def test_a_traced_bad_label_is_nan(budget, bias, dtype):
    """Also in a row where no class is left, whose loss would be 0."""
    hidden, kernel, _ = head(dtype)
    labels, bad = jnp.asarray([0, V, -1, 2]), np.array([False, True, True, False])
    bias = np.full(V, bias, dtype)
    for reduction in ("none", "mean"):
        losses, gradients, slope = run(
            hidden, kernel, labels, bias, reduction=reduction, max_temp_bytes=budget
        )
        np.testing.assert_array_equal(np.isnan(losses), bad if reduction == "none" else True)
        np.testing.assert_array_equal(np.isnan(gradients[0]), np.repeat(bad[:, None], D, 1))
        assert np.all(np.isnan(gradients[1]))
        assert np.isnan(slope)


def test_a_traced_bad_index_among_top_k_is_nan(dtype):
    hidden, kernel, _ = head(dtype)
    halves, bad = jnp.full((N, 2), 0.5, dtype), np.array([False, True, True, False])

    @jax.jit
    def losses_and_gradient(indices):
        def losses(hidden):
            labels = softjax.TopKLabels(indices, halves)
            return softjax.linear_cross_entropy(hidden, jnp.asarray(kernel), labels)

        return losses(hidden), jax.grad(lambda h: jnp.sum(losses(h)))(jnp.asarray(hidden))

    losses, gradient = losses_and_gradient(jnp.asarray([[0, 1], [V, 0], [2, -1], [3, 3]]))
    np.testing.assert_array_equal(np.isnan(losses), bad)
    np.testing.assert_array_equal(np.isnan(gradient), np.repeat(bad[:, None], D, 1))


# Infinities and NaN


@pytest.mark.x64_once
@pytest.mark.parametrize("budget", [None, 1])
def test_a_bias_of_minus_infinity_takes_a_class_out(budget, dtype):
    hidden, kernel, bias = head(dtype)
    labels, kept = np.array([0, 1, 4, 0]), np.array([0, 1, 2, 4])
    bias[3] = -INF
    losses, gradients, _ = run(hidden, kernel, labels, bias, max_temp_bytes=budget)
    without = run(hidden, kernel[:, kept], np.minimum(labels, 3), bias[kept], max_temp_bytes=budget)
    tolerance = 20 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(losses, without[0], tolerance)
    for a, b in zip(gradients, without[1], strict=True):
        np.testing.assert_allclose(a if a.shape == b.shape else a[..., kept], b, 0, tolerance)
    np.testing.assert_array_equal(gradients[1][:, 3], 0)
    assert gradients[2][3] == 0
    # As a label that class costs infinity.
    losses, _, _ = run(hidden, kernel, labels - labels + 3, bias, max_temp_bytes=budget)
    np.testing.assert_array_equal(losses, INF)


@pytest.mark.x64_once
@pytest.mark.parametrize("budget", [None, 1])
def test_no_class_is_left(budget, dtype):
    hidden, kernel, _ = head(dtype)
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "max_temp_bytes": budget}
    results = run(hidden, kernel, np.arange(N), np.full(V, -INF, dtype), **options)
    for a in jax.tree.leaves(results):
        np.testing.assert_array_equal(a, 0)


@pytest.mark.x64_once
@pytest.mark.parametrize("budget", [None, 1])
def test_nan_spreads_over_its_row_only(budget, dtype):
    hidden, kernel, bias = head(dtype)
    hidden[1, 0], bad = NAN, np.array([False, True, False, False])
    losses, gradients, _ = run(hidden, kernel, np.arange(N), bias, max_temp_bytes=budget)
    np.testing.assert_array_equal(np.isnan(losses), bad)
    np.testing.assert_array_equal(np.isnan(gradients[0]), np.repeat(bad[:, None], D, 1))


@pytest.mark.x64_once
def test_no_empty_piece_of_classes_overflows_in_second_derivatives(dtype):
    """By the temperature, whose derivatives have a distance to the top as a factor."""
    rng = np.random.default_rng(3)
    hidden, kernel = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((2, 3), (3, 4)))

    def slopes(loss):
        return jax.jit(jax.hessian(lambda t: loss(hidden, kernel, np.array([0, 3]), temperature=t)))

    fused = partial(softjax.linear_cross_entropy, max_temp_bytes=1, reduction="sum")
    plain = partial(plain_linear_cross_entropy, reduction="sum")
    for temperature in (0.3, 2.0):
        actual, desired = (slopes(f)(jnp.asarray(temperature, dtype)) for f in (fused, plain))
        np.testing.assert_allclose(actual, desired, rtol=1e-4)


@pytest.mark.x64_once
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_plus_infinity_is_that_of_cross_entropy(reduction, dtype):
    hidden, kernel, bias = head(dtype)
    bias[2] = INF
    losses, _, _ = run(hidden, kernel, np.array([2, 2, 0, 0]), bias, reduction=reduction)
    assert not np.any(np.isfinite(losses))


# Sizes


@pytest.mark.x64_once
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize(("n", "d", "v"), [(0, 2, 3), (1, 1, 1), (2, 1, 3), (2, 0, 2)])
def test_the_smallest_sizes(n, d, v, reduction, dtype):
    hidden, kernel = np.ones((n, d), dtype), np.arange(1, d * v + 1, dtype=dtype).reshape(d, v)
    labels = np.arange(n) % v
    losses, gradients, _ = run(hidden, kernel, labels, reduction=reduction)
    share = 1 / max(n, 1) if reduction == "mean" else 1
    logits = hidden.astype(np.float64) @ kernel
    expected = share * oracles.cross_entropy(logits, labels) if n else np.zeros(0)
    g = share * oracles.cross_entropy_gradient(logits, labels) if n else np.zeros((0, v))
    tolerance = 10 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        losses, expected if reduction == "none" else expected.sum(), tolerance
    )
    for a, b in zip(gradients, (g @ kernel.T, hidden.T @ g), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=10 * tolerance)


@pytest.mark.x64_once
def test_no_class_and_no_target(dtype):
    hidden, kernel = np.ones((2, 3), dtype), np.ones((3, 4), dtype)
    nothing = softjax.TopKLabels(np.zeros((2, 0), int), np.zeros((2, 0), dtype))
    np.testing.assert_array_equal(softjax.linear_cross_entropy(hidden, kernel, nothing), 0)
    losses = softjax.linear_cross_entropy(hidden, kernel[:, :0], np.zeros((2, 0), dtype))
    np.testing.assert_array_equal(losses, [0, 0])
    value, gradient = jax.value_and_grad(
        lambda h: jnp.max(softjax.linear_logsumexp(h, kernel[:, :0], temperature=2.0))
    )(hidden)
    assert value == -INF
    np.testing.assert_array_equal(gradient, np.zeros((2, 3)))
    with pytest.raises(ValueError, match="`labels`"):
        softjax.linear_cross_entropy(hidden, kernel[:, :0], np.zeros(2, int))


# Misuse


@pytest.mark.x64_once
def test_a_cap_far_above_the_logits_caps_nothing():
    """Up to infinity, though x / cap is then subnormal, which XLA:CPU reads as 0."""
    hidden, kernel, _ = (jnp.asarray(a) for a in head("float32"))
    bias, labels = jnp.asarray([0, 1, 2, -jnp.inf, 3], kernel.dtype), np.array([0, 1, 2, 4])

    @jax.jit
    def slopes(hidden, cap):
        def f(hidden):
            losses = [
                softjax.linear_cross_entropy(hidden, kernel, labels, b, softcap=cap)
                for b in (None, bias)
            ]
            return jnp.sum(jnp.stack(losses)), losses

        return jax.grad(f, has_aux=True)(hidden)

    desired = slopes(hidden, None)
    for cap in (2.0**100, jnp.finfo(jnp.float32).max, np.inf):
        for a, b in zip(*map(jax.tree.leaves, (slopes(hidden, cap), desired)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.x64_once
def test_packed_and_invariant_losses_are_exported_for_any_number_of_rows():
    hidden, kernel = np.arange(8.0, dtype="f4").reshape(4, 2), np.eye(2, 3, dtype="f4")
    labels = np.array([0, 1, 2, 0], "i4")

    def call(hidden, labels):
        operands = hidden, kernel, labels
        total = softjax.linear_cross_entropy(*operands, max_active=3, reduction="sum")
        return total, softjax.linear_cross_entropy(*operands, batch_invariant=True)

    (n,) = export.symbolic_shape("n")
    shapes = jax.ShapeDtypeStruct((n, 2), "f4"), jax.ShapeDtypeStruct((n,), "i4")
    exported = export.export(jax.jit(call))(*shapes)
    for rows in (1, 3, 4):
        operands = hidden[:rows], labels[:rows]
        total, each = exported.call(*operands)
        expected = softjax.linear_cross_entropy(operands[0], kernel, operands[1])
        np.testing.assert_allclose(each, expected, rtol=1e-6)
        np.testing.assert_allclose(total, expected.sum() if rows <= 3 else NAN, rtol=1e-6)


@pytest.mark.x64_once
@pytest.mark.parametrize("shape", ["d, 5", "2, v", "d, v"])
def test_symbolic_features_or_classes_are_refused(shape):
    """An exported program takes any number of examples, and D and V as they are."""
    d, v = export.symbolic_shape(shape)
    hidden, kernel = (jax.ShapeDtypeStruct(s, "float32") for s in ((N, d), (d, v)))
    with pytest.raises(ValueError, match="linear_logsumexp: `kernel` must be of known D and V"):
        export.export(jax.jit(softjax.linear_logsumexp))(hidden, kernel)


@pytest.mark.x64_once
def test_misuse():
    h, w, y = jnp.zeros((4, 3)), jnp.zeros((3, 5)), jnp.zeros(4, jnp.int32)

    def misuse(error, match, hidden=h, kernel=w, labels=y, **options):
        with pytest.raises(error, match=r"softjax\.linear_cross_entropy: " + match):
            softjax.linear_cross_entropy(hidden, kernel, labels, **options)

    misuse(TypeError, "`hidden` must be an array of real numbers", hidden=None)
    misuse(TypeError, "`hidden`.*complex64", hidden=h.astype(complex))
    misuse(ValueError, r"`hidden` must be of rank >= 1, got shape \(\)", hidden=0.0)
    misuse(TypeError, "`kernel`.*complex64", kernel=w.astype(complex))
    misuse(ValueError, r"`kernel` must be of rank 2, got shape \(3,\)", kernel=w[:, 0])
    misuse(ValueError, r"`kernel` must be of shape \(3, V\), .*got shape \(5, 3\)", kernel=w.T)
    misuse(ValueError, r"`labels` must be of shape \(4,\), got shape \(1,\)", labels=y[:1])
    misuse(ValueError, "`labels` must be of an integer dtype as class", labels=jnp.zeros(4))
    misuse(ValueError, r"`labels` must be of shape \(4, 5\), got shape", labels=jnp.zeros((4, 4)))
    misuse(ValueError, "`labels` must be >= 0, got -1.0", labels=jnp.full((4, 5), -1.0))
    misuse(TypeError, "`labels`.*got dtype bool", labels=y == 0)
    misuse(TypeError, "`labels`.*got text", labels="cat")
    two = softjax.TopKLabels(jnp.zeros((4, 2), jnp.int32), jnp.ones((4, 3)))
    misuse(ValueError, r"`labels.probabilities` must be of shape \(4, 2\)", labels=two)
    misuse(ValueError, r"`bias` must be of shape \(5,\), got shape \(1, 5\)", bias=w[:1])
    misuse(TypeError, "`bias`.*complex64", bias=w[0].astype(complex))
    for e in (-0.1, 1.1, NAN):
        misuse(ValueError, r"`label_smoothing` must be a number in \[0, 1\]", label_smoothing=e)
    misuse(ValueError, r"`class_weights` must be of shape \(5,\)", class_weights=jnp.ones(4))
    misuse(ValueError, "`class_weights` must be >= 0", class_weights=-jnp.ones(5))
    misuse(TypeError, "`ignore_index`", labels=jnp.ones((4, 5)), ignore_index=0)
    misuse(ValueError, r"`z_loss` must be a scalar, got shape \(2,\)", z_loss=jnp.ones(2))
    misuse(TypeError, "`z_loss`", z_loss="cat")
    for name in ("softcap", "temperature"):
        for number in (0.0, -1.0, NAN):
            misuse(ValueError, f"`{name}` must be > 0", **{name: number})
        misuse(ValueError, f"`{name}` must be a scalar", **{name: jnp.ones(4)})
    misuse(ValueError, "`reduction` must be one of .*got 'average'", reduction="average")
    misuse(ValueError, r"`weights` must be of shape \(4,\), got shape \(1,\)", weights=jnp.ones(1))
    misuse(ValueError, "`weights` must be >= 0, got -1.0", weights=-jnp.ones(4))
    misuse(ValueError, "`max_temp_bytes` must be >= 1, got 0", max_temp_bytes=0)
    for number in (1e9, True):
        misuse(TypeError, "`max_temp_bytes` must be an integer, got", max_temp_bytes=number)
