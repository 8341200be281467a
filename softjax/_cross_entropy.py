"""cross_entropy of logits, and the weighted mean of losses."""

from functools import partial
from typing import Literal, TypeGuard

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from softjax import _checks
from softjax._checks import is_number
from softjax._labels import ClassIndices, Labels, last, targets_of
from softjax._logsumexp import logsumexp_core
from softjax._losses import expected_loss, index_loss, spoiled
from softjax._numerics import compute_dtype, is_half, keeping_half, masked
from softjax._sharding import looked_up, together
from softjax._weights import in_unit, is_zero

Reduction = Literal["none", "sum", "mean", "class_weighted_mean"]
REDUCTIONS = ("none", "sum", "mean", "class_weighted_mean")


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
    reduction: Reduction = "none",
    weights: ArrayLike | None = None,
) -> Array:
    """Cross-entropy of labels and softmax(logits): one loss per example, or their sum or mean.

        l = -log p_y = logsumexp(x) - x_y                         a class index y
        l = -sum_k q_k log p_k                                    a distribution q
        l = c_y (1 - e) (-log p_y) + e mean_k c_k (-log p_k) + z logsumexp(x)^2    with options

        none: w_i l_i        sum: sum_i w_i l_i        mean: sum_i w_i l_i / sum_i w_i
        class_weighted_mean: sum_i w_i l_i / sum_i w_i c_y(i)

    The mean over k runs over the unmasked classes. For a class index the loss is the negative
    log-likelihood. It is computed as log1p(r) - (x_y - max x), which does not cancel and does not
    depend on an offset of the logits.

    Derivative: p - y; the entry at the label is minus the sum of the other entries. Both modes, any
    order; the Hessian is diag(p) - p p^T. The backward pass keeps the gradient, or the logits if
    these are in half precision.
    Edge cases: if every class is masked or -inf, the loss is 0; a target on a masked or -inf class
    gives +inf; 0 * inf = 0; under a trace, a label out of range gives NaN in loss and gradient.
    An example with weight 0 or with the ignored label is left out, even if it contains NaN or inf;
    a mean over no examples is 0.

    Two behaviours differ from optax on purpose. `where` masks classes here, whereas for integer
    labels optax's `where` masks examples. A target with mass on a masked class has loss +inf here,
    whereas optax drops the mass. `label_smoothing` spreads its mass over the unmasked classes only.
    Options and reductions have the same meaning in `linear_cross_entropy`. The mean of PyTorch and
    Liger is "class_weighted_mean" for class indices, and "mean" for distributions.

    Args:
        logits: real, any shape with classes along `axis`, nats.
        labels: class indices, shape of `logits` without `axis`; or a distribution over the
            classes, floating, shape of `logits`, which is not normalised; or TopKLabels [..., k],
            for classes on the last axis.
        axis: the axis of the classes.
        where: booleans of the rank of `logits`, which broadcast to it; False leaves the class
            out. To leave examples out, give them the weight 0.
        label_smoothing: e in [0, 1], scalar.
        class_weights: real [K], >= 0: the cost of class k is multiplied by c_k.
        ignore_index: examples with this label have loss 0 and gradient 0, and a mean leaves them
            out; integer labels only.
        z_loss: z >= 0, scalar: adds z logsumexp(x)^2, which keeps logits near log-probabilities.
        reduction: "none", "sum", "mean" or "class_weighted_mean". For a distribution c_y is
            sum_k q_k c_k.
        weights: real or boolean, >= 0, shape of `logits` without `axis`: the weights of the
            examples.

    Returns:
        Losses in nats, shape of `logits` without `axis`, or one number; at least float32.

    Raises:
        TypeError, ValueError: wrong shapes or dtypes, a known label outside [0, K), an option
            outside its range.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> logits = jnp.array([[0.0, 16.0], [0.0, 0.0]])
        >>> softjax.cross_entropy(logits, jnp.array([1, 0]))
        Array([1.1253518e-07, 6.9314718e-01], dtype=float32)

    Source: Zhang et al., "Dive into Deep Learning", eq. (4.1.8); C. Szegedy et al., "Rethinking
        the Inception architecture" (2016), section 7, for the smoothing.
    """
    name = "cross_entropy"
    checked_reduction(name, reduction)
    given = where, class_weights, ignore_index, weights
    is_plain = all(a is None for a in given) and is_number(label_smoothing, 0)
    is_plain &= is_number(z_loss, 0)
    if is_plain and type(axis) is int and _is_known_distribution(labels, logits):
        losses = _of_distribution(logits, labels, axis, reduction)
        _checks.not_negative(name, "labels", labels)
        return losses
    x = _checks.real_array(name, "logits", logits)
    axis = _checks.one_axis(name, axis, x.ndim)
    where = _checks.mask_of_classes(name, where, x.shape)
    x = last(x, axis)
    where = None if where is None else last(where, axis)
    dtype = compute_dtype(x.dtype)
    smoothing = z = None
    if not is_number(label_smoothing, 0):
        smoothing = _checks.unit_interval(name, "label_smoothing", label_smoothing, dtype)
    if not is_number(z_loss, 0):
        z = _checks.not_negative_scalar(name, "z_loss", z_loss, dtype)
    if ignore_index is not None:
        ignore_index = _checks.integer(name, "ignore_index", ignore_index)
    targets = _targets(labels, x, axis, ignore_index)  # first, since its error suggests an axis
    of_classes = _checks.weights(name, "class_weights", class_weights, x.shape[-1:], dtype)
    of_examples = _checks.weights(name, "weights", weights, x.shape[:-1], dtype)
    return _cross_entropy(x, targets, where, of_examples, (smoothing, of_classes, z), reduction)


def _is_known_distribution(labels: Labels, logits: ArrayLike) -> TypeGuard[Array]:
    """Whether both are known arrays, and the labels are floating."""
    if not (isinstance(logits, Array) and isinstance(labels, Array)):
        return False
    is_traced = isinstance(logits, Tracer) or isinstance(labels, Tracer)
    return not is_traced and jnp.issubdtype(labels.dtype, jnp.floating)


@partial(jax.jit, static_argnums=(2, 3))
def _of_distribution(logits: Array, labels: Array, axis: int, reduction: Reduction) -> Array:
    """The loss without options, whose checks of shape and dtype run once, in the trace."""
    x = _checks.real_array("cross_entropy", "logits", logits)
    axis = _checks.one_axis("cross_entropy", axis, x.ndim)
    x = last(x, axis)
    targets = _targets(labels, x, axis)
    return _cross_entropy(x, targets, None, None, (None, None, None), reduction)


def _targets(
    labels: Labels, x: Array, axis: int, ignore_index: int | None = None
) -> ClassIndices | Array:
    """The targets of the logits x, whose classes were on `axis`."""
    # Labels in half precision are widened where they are used.
    dtype = labels.dtype if is_half(labels) else compute_dtype(x.dtype)
    return targets_of("cross_entropy", labels, x.shape, dtype, ignore_index, axis)


def weighted_mean(losses: ArrayLike, weights: ArrayLike | None = None) -> Array:
    """Weighted mean of the losses.

        sum_i w_i l_i / sum_i w_i,  and 0 if all weights are 0

    Derivative: w_i / sum(w) with respect to l_i; both modes, any order.
    Edge cases: a loss with weight 0 is left out, even if it is NaN or inf; without examples the
    mean is 0. The scale of the weights does not matter: their sum may overflow, and all of them may
    be subnormal.

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
        size = jnp.asarray(losses.size, losses.dtype)  # the size may be symbolic
        return jnp.sum(losses) / jnp.maximum(size, 1)
    w = _checks.real_array("weighted_mean", "weights", weights)
    _checks.same_shape("weighted_mean", "weights", w, losses.shape)
    _checks.not_negative("weighted_mean", "weights", weights)
    w = w.astype(compute_dtype(w.dtype))
    return _weighted_mean(losses, w, ~is_zero(w), None)


def checked_reduction(function: str, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        expected = f"one of {REDUCTIONS}"
        raise ValueError(_checks.message(function, "reduction", expected, repr(reduction)))


@jax.jit
def _weighted_mean(losses: Array, weights: Array, counted: Array, costs: Array | None) -> Array:
    """sum_i w_i l_i / sum_i w_i c_i over the counted examples; without costs every c_i is 1."""
    w = in_unit(weights, counted).astype(losses.dtype)
    losses = jnp.where(counted, losses, 0)
    # A weight that is tiny relative to the others becomes 0, but an infinite loss still counts.
    infinite = jnp.isinf(losses) & (w == 0)
    terms = jnp.where(infinite, losses, w * jnp.where(infinite, 0, losses))
    total = jnp.sum(w if costs is None else jnp.where(counted, w * costs, 0))
    return jnp.where(total == 0, 0, jnp.sum(terms) / jnp.where(total == 0, 1, total))


@partial(jax.jit, static_argnums=(5,))
def _cross_entropy(x, targets, where, weights, options, reduction) -> Array:
    x, *operands = together((x, targets, where, weights))
    return keeping_half(_loss, (x.ndim - 1,), x, *operands, options, reduction=reduction)


def _loss(x, targets, where, weights, options, *, axes, reduction) -> Array:
    """The loss of logits in any dtype; `targets` are ClassIndices or a distribution."""
    exact = x.dtype if where is None else None
    x, (label_smoothing, class_weights, z_loss) = masked(x, where), options
    if class_weights is not None and reduction == "class_weighted_mean" and z_loss is None:
        class_weights = in_unit(class_weights)  # their scale does not matter
    index = bad = absent = q = costs = None
    if isinstance(targets, tuple):
        index, bad, absent = targets
    else:
        q = targets.astype(x.dtype)
        q = q if class_weights is None else _of_classes(class_weights, x) * q
    if weights is not None:
        absent = is_zero(weights) if absent is None else absent | is_zero(weights)
    if index is not None:
        loss = index_loss(x, index, absent, exact)
        if class_weights is not None:
            costs = looked_up(class_weights, index)
            loss = _times(costs, loss)
    if absent is not None:
        # Examples that are left out may contain any values; in an empty row all terms are 0.
        x = jnp.where(absent[..., None], -jnp.inf, x)
        bad = None if bad is None else bad & ~absent
    if q is not None:
        loss, costs = expected_loss(x, q), jnp.sum(q, -1)

    if label_smoothing is not None:
        loss = _times(1 - label_smoothing, loss)
        loss += _times(label_smoothing, _mean_loss(x, where, class_weights))
    if z_loss is not None:
        log_partition = logsumexp_core(x, axes)[..., 0]
        square = jnp.where(jnp.isneginf(log_partition), 0, log_partition) ** 2
        loss += z_loss * square
    loss = spoiled(loss, bad)
    if reduction in ("none", "sum"):
        loss = loss if weights is None else weights * loss
        return loss if reduction == "none" else jnp.sum(loss)
    costs = costs if reduction == "class_weighted_mean" else None
    if weights is None and absent is None and costs is None:
        return weighted_mean(loss)
    weights = jnp.ones_like(loss) if weights is None else weights
    return _weighted_mean(loss, weights, True if absent is None else ~absent, costs)


def _times(factor: Array, loss: Array) -> Array:
    """factor * loss with 0 * inf = 0; NaN stays NaN."""
    return factor * jnp.where((factor == 0) & (loss == jnp.inf), 0, loss)


def _of_classes(weights: Array, x: Array) -> Array:
    """The class weights [K] with the rank of x [..., K]."""
    return jnp.expand_dims(weights, range(x.ndim - 1))


def _mean_loss(x: Array, where: Array | None, weights: Array | None) -> Array:
    """mean_k w_k (-log p_k) over the unmasked classes."""
    uniform = jnp.ones_like(x) if where is None else where.astype(x.dtype)
    uniform /= jnp.maximum(jnp.sum(uniform, -1, keepdims=True), 1)
    return expected_loss(x, uniform if weights is None else _of_classes(weights, uniform) * uniform)
