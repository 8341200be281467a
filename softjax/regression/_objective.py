"""What a fit makes small."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._cross_entropy import cross_entropy, weighted_mean
from softjax.regression._model import SoftmaxRegression, logits


def objective(
    params: SoftmaxRegression,
    features: ArrayLike,
    labels: ArrayLike,
    *,
    l2: ArrayLike = 0.0,
    sample_weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
) -> Array:
    """The penalised mean loss of softmax regression.

        f = sum_i w_i loss_i / sum_i w_i + l2 / 2 |kernel|^2,  loss_i = -sum_k c_k y_ik log p_ik

    The bias is not penalised. scikit-learn's C is 1 / (l2 N). Class weights c scale the losses
    and leave the divisor as it is.

    Derivative: kernel: X^T G + l2 kernel; bias: sum of the rows of G, with G_i = w_i / sum(w) *
        (p_i sum_k c_k y_ik - c y_i). Convex in `params`. Both modes, any order.
    Edge cases: all weights 0: the penalty alone.

    Args:
        params: kernel [D, K] and bias [K].
        features: real [N, D].
        labels: class indices, integer [N], or a distribution over the classes, floating [N, K].
        l2: scalar >= 0, the strength of the penalty.
        sample_weights: real [N], >= 0; None for equal weights.
        class_weights: real [K], >= 0; None for equal weights.

    Returns:
        A scalar, nats, at least float32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, a label out of range.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> params = softjax.regression.init(2, 4)
        >>> softjax.regression.objective(params, jnp.ones((3, 2)), jnp.array([0, 1, 3]))  # log 4
        Array(1.3862944, dtype=float32)

    Source: Zhang et al., "Dive into Deep Learning", section 4.1.2.
    """
    losses = cross_entropy(logits(params, features), labels, class_weights=class_weights)
    return weighted_mean(losses, sample_weights) + penalty(params, l2)


def penalty(params: SoftmaxRegression, l2: ArrayLike) -> Array:
    """l2 / 2 |kernel|^2."""
    return jnp.asarray(l2, params.kernel.dtype) / 2 * jnp.sum(jnp.square(params.kernel))
