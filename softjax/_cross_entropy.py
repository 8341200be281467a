"""cross_entropy on logits, and the weighted mean of its losses."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax import _checks
from softjax._labels import Labels, class_indices, distribution, is_class_indices
from softjax._logsumexp import logsumexp_core
from softjax._losses import expected_loss, index_loss, spoiled
from softjax._numerics import compute_dtype, masked
from softjax._sharding import looked_up
from softjax._weights import in_unit, is_zero


def cross_entropy(
    logits: ArrayLike,
    labels: Labels,
    axis: int = -1,
    where: ArrayLike | None = None,
    *,
    label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    ignore_index: int | None = None,
    z_loss: ArrayLike = 0.0,
) -> Array:
    """Cross-entropy of labels and softmax(logits): one loss an example.

        l = -log p_y = logsumexp(x) - x_y                         a class index y
        l = -sum_k q_k log p_k                                    a distribution q
        l = w_y (1 - e) (-log p_y) + e mean_k w_k (-log p_k) + z logsumexp(x)^2    with options

    The mean is over the unmasked classes. For a class index the loss is the negative
    log-likelihood; as log1p(r) - (x_y - max x) it neither cancels nor feels an offset.

    Derivative: p - y, at the label minus the sum of the others. Both modes, any order; the
    Hessian is diag(p) - p p^T. The backward pass keeps the gradient.
    Edge cases: every class masked or -inf: 0; a target on a masked or -inf class: +inf;
    0 * inf = 0; a label out of range under a trace: NaN in loss and gradient.

    Two things differ from optax on purpose. `where` masks classes here; optax's masks examples
    where labels are integers. A target with mass on a masked class has loss +inf here; optax
    drops the mass. `label_smoothing` spreads its mass over the unmasked classes only.

    Args:
        logits: real, any shape with classes along `axis`, nats.
        labels: class indices, shape of `logits` without `axis`; or a distribution over the
            classes, floating, shape of `logits`, used as it is, whatever its sum; or TopKLabels
            [..., k], for classes on the last axis.
        axis: the axis of the classes.
        where: booleans of the rank of `logits`, which broadcast to it; False leaves the class
            out. To leave examples out, weight their losses: `weighted_mean`.
        label_smoothing: e in [0, 1], scalar.
        class_weights: real [K], >= 0: the cost of class k counts w_k times.
        ignore_index: examples with this label have loss 0 and gradient 0; integer labels only.
        z_loss: z >= 0, scalar: adds z logsumexp(x)^2, which keeps logits near log-probabilities.

    Returns:
        Losses in nats, shape of `logits` without `axis`, at least float32.

    Raises:
        TypeError, ValueError: shapes or dtypes that do not fit, a known label outside [0, K),
            an option outside its range.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> logits = jnp.array([[0.0, 16.0], [0.0, 0.0]])
        >>> softjax.cross_entropy(logits, jnp.array([1, 0]))
        Array([1.1253518e-07, 6.9314718e-01], dtype=float32)

    Source: Zhang et al., "Dive into Deep Learning", eq. (4.1.8); C. Szegedy et al., "Rethinking
        the Inception architecture" (2016), section 7, for the smoothing.
    """
    x = _checks.real_array("cross_entropy", "logits", logits)
    axis = _checks.one_axis("cross_entropy", axis, x.ndim)
    where = _checks.mask_of_classes("cross_entropy", where, x.shape)
    x = _checks.last(x, axis)
    where = None if where is None else _checks.last(where, axis)
    classes = x.shape[-1]
    dtype = compute_dtype(x.dtype)
    smoothing = z = weights = None
    if not _is_zero(label_smoothing):
        smoothing = _checks.unit_interval(
            "cross_entropy", "label_smoothing", label_smoothing, dtype
        )
    if not _is_zero(z_loss):
        z = _checks.not_negative_scalar("cross_entropy", "z_loss", z_loss, dtype)
    if ignore_index is not None:
        ignore_index = _checks.integer("cross_entropy", "ignore_index", ignore_index)
    if class_weights is not None:
        weights = _checks.real_array("cross_entropy", "class_weights", class_weights)
        _checks.same_shape("cross_entropy", "class_weights", weights, (classes,))
        _checks.not_negative("cross_entropy", "class_weights", class_weights)

    if is_class_indices(labels, "cross_entropy"):
        _checks.same_shape("cross_entropy", "labels", labels, x.shape[:-1])
        targets = class_indices("cross_entropy", labels, classes, ignore_index)
    elif ignore_index is not None:
        expected = "None where labels are a distribution"
        raise TypeError(_checks.message("cross_entropy", "ignore_index", expected, ignore_index))
    else:
        targets = distribution("cross_entropy", labels, x.shape, dtype, axis)
    return _cross_entropy(x, targets, where, smoothing, weights, z)


def weighted_mean(losses: ArrayLike, weights: ArrayLike | None = None) -> Array:
    """Mean of the losses, weighted.

        sum_i w_i l_i / sum_i w_i,  and 0 where all weights are 0

    Derivative: w_i / sum(w) with respect to l_i; both modes, any order.
    Edge cases: a loss of weight 0 takes no part, NaN and inf included; no examples: 0. The scale
    of the weights does not matter: their sum may overflow, and all may be subnormal.

    Args:
        losses: real, any shape.
        weights: real or boolean, >= 0, shape of `losses`; None for the plain mean.

    Returns:
        A scalar in the units of `losses`, at least float32.

    Raises:
        TypeError, ValueError: shapes that differ, a known negative weight.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> losses, labels = jnp.array([1.0, 0.0, 3.0]), jnp.array([4, -100, 2])
        >>> softjax.weighted_mean(losses, labels != -100)
        Array(2., dtype=float32)

    Source: the definition.
    """
    losses = _checks.real_array("weighted_mean", "losses", losses)
    losses = losses.astype(compute_dtype(losses.dtype))
    if weights is None:
        size = jnp.asarray(losses.size, losses.dtype)  # which may be symbolic
        return jnp.sum(losses) / jnp.maximum(size, 1)
    w = _checks.real_array("weighted_mean", "weights", weights)
    _checks.same_shape("weighted_mean", "weights", w, losses.shape)
    _checks.not_negative("weighted_mean", "weights", weights)
    return _weighted_mean(losses, w.astype(compute_dtype(w.dtype)))


@jax.jit
def _weighted_mean(losses: Array, weights: Array) -> Array:
    w = in_unit(weights).astype(losses.dtype)
    losses = jnp.where(is_zero(weights), 0, losses)
    # A weight that is tiny beside the others is 0 in their unit, and an infinite loss stays.
    infinite = jnp.isinf(losses) & (w == 0)
    terms = jnp.where(infinite, losses, w * jnp.where(infinite, 0, losses))
    total = jnp.sum(w)
    return jnp.sum(terms) / jnp.where(total == 0, 1, total)


@jax.jit
def _cross_entropy(x, targets, where, label_smoothing, class_weights, z_loss) -> Array:
    """The loss over the last axis. `targets` are ClassIndices or a distribution."""
    x = masked(x, where)
    weights = None if class_weights is None else class_weights.astype(x.dtype)

    if isinstance(targets, tuple):
        index, bad, ignored = targets
        loss = index_loss(x, index, ignored)
        if weights is not None:
            loss = _times(looked_up(weights, index), loss)
        if ignored is not None:
            x = jnp.where(ignored[..., None], -jnp.inf, x)
    else:
        bad = None
        loss = expected_loss(
            x, targets if weights is None else _of_classes(weights, targets) * targets
        )

    if label_smoothing is not None:
        loss = _times(1 - label_smoothing, loss)
        loss += _times(label_smoothing, _mean_loss(x, where, weights))
    if z_loss is not None:
        log_partition = logsumexp_core(x, (x.ndim - 1,))[..., 0]
        square = jnp.where(jnp.isneginf(log_partition), 0, log_partition) ** 2
        loss += z_loss * square
    return spoiled(loss, bad)


def _times(factor: Array, loss: Array) -> Array:
    """factor * loss with 0 * inf = 0; a NaN stays."""
    return factor * jnp.where((factor == 0) & (loss == jnp.inf), 0, loss)


def _of_classes(weights: Array, x: Array) -> Array:
    """The class weights [K] with the rank of x [..., K]."""
    return jnp.expand_dims(weights, range(x.ndim - 1))


def _mean_loss(x: Array, where: Array | None, weights: Array | None) -> Array:
    """mean_k w_k (-log p_k) over the unmasked classes."""
    uniform = jnp.ones_like(x) if where is None else where.astype(x.dtype)
    uniform /= jnp.maximum(jnp.sum(uniform, -1, keepdims=True), 1)
    return expected_loss(x, uniform if weights is None else _of_classes(weights, uniform) * uniform)


def _is_zero(option: ArrayLike) -> bool:
    return isinstance(option, (int, float)) and option == 0
