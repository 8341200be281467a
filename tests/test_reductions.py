"""The common options of cross_entropy and linear_cross_entropy, against float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import softjax

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once(True)]

N, D, V = 7, 3, 5
RNG = np.random.default_rng(0)
HIDDEN, KERNEL = RNG.standard_normal((N, D)), RNG.standard_normal((D, V))
INDEX, IGNORED = np.array([2, 0, -1, 4, 4, 1, -1]), -1
CLASS_WEIGHTS = np.array([0.5, 2.0, 0.0, 1.0, 3.0])
WEIGHTS = np.array([1.0, 0.0, 2.0, 0.5, 3.0, 1.5, 0.0])
DENSE = RNG.random((N, V))
CHOSEN, MASSES = RNG.integers(V, size=(N, 2)), RNG.random((N, 2))
LABELS = {
    "index": INDEX,
    "distribution": DENSE,
    "top-k": softjax.TopKLabels(CHOSEN, MASSES),
}
OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.01}
REDUCTIONS = ("none", "sum", "mean", "class_weighted_mean")
# Means by torch.nn.functional.cross_entropy (2.13), by the label smoothing: of class indices, of
# these with class weights, and of distributions with class weights.
PYTORCH = {
    0.0: [3.078421651192186, 3.224685652265593, 4.83603334309532],
    0.2: [2.8484216511921865, 2.795904373536462, 4.400174159541911],
}


def dense_labels(kind):
    if kind == "top-k":
        return np.einsum("nk,nkv->nv", MASSES, np.eye(V)[CHOSEN])
    return DENSE if kind == "distribution" else np.eye(V)[INDEX]


def reduced(losses, costs, counted, reduction):
    """The formulas of the docstring; `counted` has the weights, 0 where an example is left out."""
    losses = np.where(counted > 0, losses, 0)
    if reduction == "none":
        return counted * losses
    if reduction == "sum":
        return (counted * losses).sum()
    costs = costs if reduction == "class_weighted_mean" else np.ones(N)
    return (counted * losses).sum() / (counted * np.where(counted > 0, costs, 0)).sum()


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_reductions_and_that_one_loss_replaces_the_other(kind, reduction):
    """Values by the formulas; then the gradients by every array, which must be the same."""
    weights = jnp.asarray(WEIGHTS)
    options: dict[str, Any] = {"ignore_index": IGNORED} if kind == "index" else {}
    oracle = {"class_weights": CLASS_WEIGHTS, **OPTIONS, **options}
    labels = INDEX if kind == "index" else dense_labels(kind)
    losses = oracles.cross_entropy(HIDDEN @ KERNEL, labels, **oracle)
    is_ignored = (INDEX == IGNORED) & (kind == "index")
    costs = dense_labels(kind) @ CLASS_WEIGHTS
    # What takes no part may be anything.
    hidden = np.where((is_ignored | (WEIGHTS == 0))[:, None], np.nan, HIDDEN)
    options |= OPTIONS | {"reduction": reduction}

    def run(loss):
        def f(point, weights):
            values = loss(point, class_weights=point["class"], weights=weights, **options)
            return jnp.sum(values * jnp.arange(1.0, 1 + values.size)), values

        point = {"hidden": hidden, "kernel": KERNEL, "class": CLASS_WEIGHTS}
        return jax.jit(jax.grad(f, has_aux=True))(jax.tree.map(jnp.asarray, point), weights)

    given = LABELS[kind]
    plain = run(lambda p, **o: softjax.cross_entropy(p["hidden"] @ p["kernel"], given, **o))
    fused = run(lambda p, **o: softjax.linear_cross_entropy(p["hidden"], p["kernel"], given, **o))
    expected = reduced(losses, costs, WEIGHTS * ~is_ignored, reduction)
    np.testing.assert_allclose(plain[1], expected, rtol=1e-12)
    np.testing.assert_allclose(fused[1], expected, rtol=1e-12)
    plain[0]["hidden"], desired = fused[0]["hidden"], plain[0]  # that of NaN @ W is NaN
    for name in desired:
        assert np.all(np.isfinite(fused[0][name]))
        if name != "kernel":
            np.testing.assert_allclose(fused[0][name], desired[name], rtol=1e-9, atol=1e-12)


def test_examples_without_part_change_no_gradient_of_the_logits():
    """NaN behind a weight of 0 or an ignored label, for every kind of labels."""
    left_out = (INDEX == IGNORED) | (WEIGHTS == 0)
    logits = jnp.asarray(np.where(left_out[:, None], np.nan, HIDDEN @ KERNEL))

    @jax.jit
    def gradients(logits):
        def loss(logits, labels, weights, **options):
            return softjax.cross_entropy(
                logits, labels, reduction="mean", weights=weights, **OPTIONS, **options
            )

        of_index = jax.grad(loss)(logits, INDEX, WEIGHTS, ignore_index=IGNORED)
        counted = jnp.asarray(~left_out)
        return of_index, *(jax.grad(loss)(logits, LABELS[k], counted) for k in list(LABELS)[1:])

    for gradient in gradients(logits):
        np.testing.assert_array_equal(gradient[left_out], 0)
        assert np.all(np.abs(gradient[~left_out]).max(-1) > 0)


@pytest.mark.parametrize("reduction", REDUCTIONS[1:])
def test_nothing_left_for_a_reduction(reduction):
    for weights in (np.zeros(N), None):
        labels = np.full(N, IGNORED) if weights is None else INDEX
        options = {"reduction": reduction, "weights": weights, "ignore_index": IGNORED}
        assert softjax.cross_entropy(HIDDEN @ KERNEL, labels, **options) == 0
        assert softjax.linear_cross_entropy(HIDDEN, KERNEL, labels, **options) == 0
    # Every example has a class of weight 0, and smoothing a loss.
    options = {"class_weights": CLASS_WEIGHTS, "label_smoothing": 0.1}
    zeros = np.full(N, 2)
    for loss in (
        softjax.cross_entropy(HIDDEN @ KERNEL, zeros, reduction=reduction, **options),
        softjax.linear_cross_entropy(HIDDEN, KERNEL, zeros, reduction=reduction, **options),
    ):
        assert loss == 0 if reduction == "class_weighted_mean" else loss > 0


def test_the_scale_of_weights_and_a_traced_bad_label():
    """Weights that are all subnormal are as good as others; NaN only where a bad label counts."""
    logits, labels = HIDDEN @ KERNEL, np.maximum(INDEX, 0)
    options = {"class_weights": CLASS_WEIGHTS, "reduction": "class_weighted_mean"}
    expected = softjax.cross_entropy(logits, labels, weights=WEIGHTS, **options)
    for scale in (1e-310, 1e300):
        actual = softjax.cross_entropy(logits, labels, weights=scale * WEIGHTS, **options)
        np.testing.assert_allclose(actual, expected, rtol=1e-12)
    run = jax.jit(lambda y: softjax.cross_entropy(logits, y, reduction="sum", weights=WEIGHTS))
    assert np.isfinite(run(jnp.asarray(labels).at[1].set(V)))  # of weight 0
    assert np.isnan(run(jnp.asarray(labels).at[0].set(V)))


@pytest.mark.parametrize("smoothing", PYTORCH)
def test_means_are_those_of_pytorch(smoothing):
    logits = np.arange(15.0).reshape(3, 5) % 7 / 2
    labels = np.array([1, -1, 4])
    options = {"ignore_index": -1, "label_smoothing": smoothing}
    actual = [
        softjax.cross_entropy(logits, labels, reduction="mean", **options),
        softjax.cross_entropy(
            logits, labels, class_weights=CLASS_WEIGHTS, reduction="class_weighted_mean", **options
        ),
        softjax.cross_entropy(
            logits,
            np.eye(5)[[1, 0, 4]] * 0.75 + 0.05,
            class_weights=CLASS_WEIGHTS,
            label_smoothing=smoothing,
            reduction="mean",
        ),
    ]
    np.testing.assert_allclose(actual, PYTORCH[smoothing], rtol=1e-12)


def test_misuse():
    logits, labels = jnp.zeros((4, 3)), jnp.zeros(4, jnp.int32)

    def misuse(match, **options):
        with pytest.raises(ValueError, match=r"softjax\.cross_entropy: " + match):
            softjax.cross_entropy(logits, labels, **options)

    misuse("`reduction` must be one of .*got 'average'", reduction="average")
    misuse(r"`weights` must be of shape \(4,\), got shape \(1,\)", weights=jnp.ones(1))
    misuse("`weights` must be >= 0, got -1.0", weights=-jnp.ones(4))
