"""The model, p(class | x) = softmax(x @ kernel + bias), and the objective of a fit."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from softjax import _checks
from softjax._auto_axes import on_auto_axes
from softjax._cross_entropy import cross_entropy, weighted_mean
from softjax._labels import numbers_as_classes
from softjax._softmax import log_softmax, softmax
from softjax.regression._features import Features, dense_or_sparse, linear


class SoftmaxRegression(NamedTuple):
    """The parameters of a softmax regression, a pytree.

    The parametrisation is redundant: adding the same vector to every column of the kernel changes
    no probability.

    Attributes:
        kernel: [D, K], nats per unit of a feature.
        bias: [K], nats.

    Example:
        >>> import softjax
        >>> params = softjax.regression.init(4, 3)
        >>> params.kernel.shape, params.bias.shape
        ((4, 3), (3,))
    """

    kernel: Array
    bias: Array


def init(num_features: int, num_classes: int, dtype: DTypeLike | None = None) -> SoftmaxRegression:
    """Parameters that are all zero: every class has the probability 1 / K.

    The objective is convex, so there is nothing to gain from a random start.

    Args:
        num_features: D.
        num_classes: K.
        dtype: floating; None for the default float.

    Returns:
        `SoftmaxRegression` of zeros.

    Example:
        >>> import softjax
        >>> softjax.regression.init(2, 3).bias
        Array([0., 0., 0.], dtype=float32)
    """
    dtype = jax.dtypes.canonicalize_dtype(float) if dtype is None else dtype
    # Arrays of NumPy are only transferred: nothing has to be compiled.
    kernel, bias = np.zeros((num_features, num_classes), dtype), np.zeros(num_classes, dtype)
    return SoftmaxRegression(*jax.device_put((kernel, bias)))


def logits(
    params: SoftmaxRegression, features: Features, *, offset: ArrayLike | None = None
) -> Array:
    """The scores of the classes.

        z_k = <x, kernel_k> + bias_k + offset_k

    Args:
        params: kernel [D, K] and bias [K].
        features: real [..., D], cast to the dtype of the kernel; or BCOO or BCSR [N, D]. Parameters
            have no names: the columns of a table are taken by their place, in the order of the fit.
        offset: real, broadcasts to [..., K], nats, as the fit was given it; None for zeros.

    Returns:
        [..., K], nats, in the dtype of the kernel.

    Raises:
        TypeError, ValueError: `features` is not a real array whose last axis has size D, or
            `offset` is not real or does not broadcast to the result.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> params = softjax.regression.SoftmaxRegression(jnp.eye(2), jnp.array([0.0, 1.0]))
        >>> softjax.regression.logits(params, jnp.array([3.0, 4.0]))
        Array([3., 5.], dtype=float32)

    Source: Zhang et al., "Dive into Deep Learning", section 4.1.1.2.
    """
    return _logits("logits", params, features, offset)


def predict(
    params: SoftmaxRegression, features: Features, *, offset: ArrayLike | None = None
) -> Array:
    """The most probable class; the first one in case of a tie.

    Edge cases: under a trace, or with `softjax.checks(False)`, a row with logits that are NaN has
        the class of the first of them.

    Args:
        params: kernel [D, K] and bias [K].
        features: as in `logits`.
        offset: as in `logits`.

    Returns:
        int32 [...], class indices.

    Raises:
        TypeError, ValueError: as in `logits`; also logits that are known to be NaN.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> params = softjax.regression.SoftmaxRegression(jnp.eye(2), jnp.zeros(2))
        >>> softjax.regression.predict(params, jnp.array([[3.0, 4.0], [2.0, 1.0]]))
        Array([1, 0], dtype=int32)
    """
    z = _logits("predict", params, features, offset)
    if not _checks.holds(_is_number, z):
        values, expected = np.asarray(z), "such that no logit is NaN"
        _checks.refuse_first("regression.predict", "features", expected, values, np.isnan(values))
    return jnp.argmax(z, -1).astype(jnp.int32)


def predict_proba(
    params: SoftmaxRegression, features: Features, *, offset: ArrayLike | None = None
) -> Array:
    """The probabilities of the classes.

        p_k = exp(z_k) / sum_j exp(z_j)

    Args:
        params: kernel [D, K] and bias [K].
        features: as in `logits`.
        offset: as in `logits`.

    Returns:
        [..., K], rows that sum to 1, in the dtype of the kernel.

    Raises:
        TypeError, ValueError: as in `logits`.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> params = softjax.regression.init(2, 4)
        >>> softjax.regression.predict_proba(params, jnp.array([3.0, 4.0]))
        Array([0.25, 0.25, 0.25, 0.25], dtype=float32)
    """
    return softmax(_logits("predict_proba", params, features, offset))


def predict_log_proba(
    params: SoftmaxRegression, features: Features, *, offset: ArrayLike | None = None
) -> Array:
    """The log-probabilities of the classes, accurate also for probabilities near 0 or 1.

        log p_k = z_k - logsumexp(z)

    Args:
        params: kernel [D, K] and bias [K].
        features: as in `logits`.
        offset: as in `logits`.

    Returns:
        [..., K], nats, in the dtype of the kernel.

    Raises:
        TypeError, ValueError: as in `logits`.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> params = softjax.regression.SoftmaxRegression(jnp.eye(2), jnp.zeros(2))
        >>> softjax.regression.predict_log_proba(params, jnp.array([20.0, 0.0]))
        Array([-2.0611537e-09, -2.0000000e+01], dtype=float32)
    """
    return log_softmax(_logits("predict_log_proba", params, features, offset))


@on_auto_axes
def objective(
    params: SoftmaxRegression,
    features: Features,
    labels: ArrayLike,
    *,
    l2: ArrayLike = 0.0,
    sample_weights: ArrayLike | None = None,
    class_weights: ArrayLike | None = None,
    offset: ArrayLike | None = None,
) -> Array:
    """The penalised mean loss of softmax regression.

        f = sum_i w_i loss_i / sum_i w_i + l2 / 2 |kernel|^2,  loss_i = -sum_k c_k y_ik log p_ik

    The bias is not penalised. scikit-learn's C is 1 / (l2 sum_i w_i) for more than two
    classes, and 2 / (l2 sum_i w_i) for two. Class weights c scale the losses but not the divisor.

    Derivative: kernel: X^T G + l2 kernel; bias: sum of the rows of G, with G_i = w_i / sum(w) *
        (p_i sum_k c_k y_ik - c y_i). Convex in `params`. Both modes, any order.
    Edge cases: if all weights are 0, the result is the penalty alone.

    Args:
        params: kernel [D, K] and bias [K].
        features: real [N, D], dense, BCOO or BCSR.
        labels: class indices, integer [N], or a distribution over the classes, floating [N, K].
        l2: >= 0, the strength of the penalty: a scalar, or one for each feature [D], which is the
            l2 of a fit times its penalty factors.
        sample_weights: real [N], >= 0; None for equal weights.
        class_weights: real [K], >= 0; None for equal weights.
        offset: real [N, K], nats; None for zeros.

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
    z = _logits("objective", params, features, offset)
    losses = cross_entropy(z, numbers_as_classes(labels), class_weights=class_weights)
    _checks.not_bool("regression.objective", "l2", l2)
    return weighted_mean(losses, sample_weights) + penalty(params, l2)


def refuse_other_params(function: str, params: Any, argument: str = "params") -> None:
    """Refuses objects without a kernel and a bias, such as the result of a fit."""
    if not (hasattr(params, "kernel") and hasattr(params, "bias")):
        got = type(params).__name__
        got += "; pass its `params`" if hasattr(params, "params") else ""
        raise TypeError(_checks.message(function, argument, "a SoftmaxRegression", got))


def penalty(params: SoftmaxRegression, l2: ArrayLike) -> Array:
    """sum_j l2_j / 2 |kernel_j|^2, l2 a scalar or [D]."""
    strength = jnp.asarray(l2, params.kernel.dtype)
    if strength.ndim == 0:
        return strength / 2 * jnp.sum(jnp.square(params.kernel))
    return jnp.sum(strength * jnp.sum(jnp.square(params.kernel), 1)) / 2


def _is_number(z: Any) -> Any:
    return z == z


def _logits(
    function: str, params: SoftmaxRegression, features: Any, offset: ArrayLike | None
) -> Array:
    function = f"regression.{function}"
    refuse_other_params(function, params)
    kernel, bias = jnp.asarray(params.kernel), jnp.asarray(params.bias)
    x = dense_or_sparse(function, features)
    if x.ndim == 0 or x.shape[-1] != kernel.shape[0]:
        expected = f"of shape (..., {kernel.shape[0]})"
        raise ValueError(_checks.message(function, "features", expected, f"shape {x.shape}"))
    z = linear(x.astype(kernel.dtype), kernel, bias.astype(kernel.dtype))
    if offset is None:
        return z
    known = _checks.real_array(function, "offset", offset).astype(z.dtype)
    return z + _checks.broadcast(function, "offset", known, z.shape)
