"""Outputs of a linear head for every example, without all logits at once."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from softjax import _checks
from softjax._cross_entropy import Reduction, checked_reduction
from softjax._labels import refuse_distributions
from softjax._linear_cross_entropy.blocks import Rows, block_of, statistics
from softjax._linear_cross_entropy.examples import (
    Packed,
    checked_room,
    packed,
    refuse_too_many,
    scale_of,
    scaled_total,
    unpacked,
    with_active_rows,
)
from softjax._linear_cross_entropy.gradients import by_rows, in_tiles, statistics_over
from softjax._linear_cross_entropy.heads import (
    checked_head,
    checked_labels,
    checked_scalars,
    checked_weights,
)
from softjax._linear_cross_entropy.layout import Call, Layout, alike, all_classes, call_of
from softjax._linear_cross_entropy.pieces import Arguments
from softjax._linear_cross_entropy.row_outputs import (
    log_partition_of,
    outputs_of_rows,
    read,
    read_over,
)
from softjax._linear_cross_entropy.sharded import mapped, total_with_readings_on
from softjax._numerics import compute_dtype


class LinearOutputs(NamedTuple):
    """The result of `linear_cross_entropy_outputs`; all values are in nats, at least float32.

    Attributes:
        log_probability: log p of each label, in the shape of the labels; None without labels.
        logsumexp: [...], the log-partition of the logits.
        entropy: [...], the entropy of the distribution over the classes.
        top_log_probabilities: [..., top_k], of the most probable classes, in falling order.
        top_classes: int32 [..., top_k], these classes; the first is the predicted class.
        loss: as linear_cross_entropy, [...] or one number; None without labels of the shape [...].

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> outputs = softjax.linear_cross_entropy_outputs(jnp.ones((1, 1)), jnp.zeros((1, 4)))
        >>> outputs.entropy  # log 4
        Array([1.3862944], dtype=float32)
    """

    log_probability: Array | None
    logsumexp: Array
    entropy: Array
    top_log_probabilities: Array
    top_classes: Array
    loss: Array | None


def linear_logsumexp(
    hidden: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    transpose_kernel: bool = False,
    softcap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    class_axis: str | tuple[str, ...] | None = None,
    feature_axis: str | tuple[str, ...] | None = None,
    max_temp_bytes: int | None = None,
    batch_invariant: bool = False,
) -> Array:
    """Log-partition function of the logits hidden @ kernel + bias, which never exist at once.

        y = logsumexp(x),  x = s tanh((h W + b) / s) / T

    Derivative: softmax(x) times W^T and h. Both modes work at any order and never hold all logits.
    Edge cases: as for logsumexp. If every class is at -inf, the result is -inf with zero gradient.

    Args:
        hidden: real [..., D].
        kernel: real [D, V].
        bias: real [V].
        transpose_kernel: as in linear_cross_entropy.
        softcap: scalar s > 0.
        temperature: scalar T > 0.
        class_axis: as in linear_cross_entropy.
        feature_axis: as in linear_cross_entropy.
        max_temp_bytes: as in linear_cross_entropy.
        batch_invariant: as in linear_cross_entropy.

    Returns:
        [...] in nats, at least float32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, or a bad option.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.linear_logsumexp(jnp.ones((1, 1)), jnp.array([[0.0, -20.0]]))
        Array([2.0611537e-09], dtype=float32)

    Source: as for logsumexp and linear_cross_entropy.
    """
    name = "linear_logsumexp"
    head = checked_head(name, hidden, kernel, bias, transpose_kernel)
    scalars = checked_scalars(name, head, softcap, temperature)
    arguments = Arguments(Rows(head.hidden), head.classes, scalars)
    how = {"budget": max_temp_bytes, "batch_invariant": batch_invariant}
    call = call_of(name, head.classes, head.hidden, None, class_axis, feature_axis, **how)
    return _mapped(call, _log_partitions, _log_partitions_over, arguments, None)[0]


def linear_cross_entropy_outputs(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    transpose_kernel: bool = False,
    label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    ignore_index: int | None = None,
    z_loss: ArrayLike = 0.0,
    softcap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    top_k: int = 1,
    reduction: Reduction = "none",
    weights: ArrayLike | None = None,
    class_axis: str | tuple[str, ...] | None = None,
    feature_axis: str | tuple[str, ...] | None = None,
    max_temp_bytes: int | None = None,
    max_active: int | None = None,
    batch_invariant: bool = False,
) -> LinearOutputs:
    """Log-probabilities of labels, loss, logsumexp, entropy and top k of hidden @ kernel + bias.

        x = s tanh((h W + b) / s) / T,  all of softmax(x), in one pass over the kernel
        log_probability = x_y - logsumexp(x),  for each label y of an example
        loss = linear_cross_entropy(hidden, kernel, labels, bias), with its options

    Derivative: every output except top_classes is differentiable, in both modes, at any order,
    without all logits. Value and gradient take four matrix products. With a reduction, the loss and
    its gradient take three, as in linear_cross_entropy, and all other outputs are computed from the
    same logits, so that metrics take no product. A gradient of these other outputs takes three
    more.
    Edge cases: a label out of range gives NaN under a trace. For an ignored label log_probability
    and loss are 0, with gradient 0. For equal logits the first class comes first. Features of an
    example without weight or label that are not finite count as 0.

    Args:
        hidden: real [..., D].
        kernel: real [D, V].
        labels: class indices [...], one for each example; or [..., k], several for each example,
            whose log-probabilities are computed; or None.
        bias: real [V].
        transpose_kernel: as in linear_cross_entropy.
        label_smoothing: for the loss, as in linear_cross_entropy.
        class_weights: for the loss, as in linear_cross_entropy.
        ignore_index: the label that is ignored.
        z_loss: for the loss, as in linear_cross_entropy.
        softcap: scalar s > 0.
        temperature: scalar T > 0.
        top_k: the number of classes to return, in [1, V].
        reduction: for the loss, as in linear_cross_entropy.
        weights: for the loss, as in linear_cross_entropy.
        class_axis: as in linear_cross_entropy.
        feature_axis: as in linear_cross_entropy.
        max_temp_bytes: as in linear_cross_entropy.
        max_active: as in linear_cross_entropy. An example with k labels is active if at least one
            of them is not ignored. All outputs of inactive examples are then 0.
        batch_invariant: as in linear_cross_entropy.

    Returns:
        LinearOutputs.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, a bad option, a known label
            outside [0, V), an option of the loss without labels [...], or more than `max_active`
            active examples, if these are known.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> hidden, kernel = jnp.ones((1, 1)), jnp.array([[0.0, 1.0]])
        >>> softjax.linear_cross_entropy_outputs(hidden, kernel, jnp.array([0])).log_probability
        Array([-1.3132616], dtype=float32)

    Source: the definitions; the entropy is log sum exp(x - m) + sum p (m - x), which does not
    cancel.
    """
    name = "linear_cross_entropy_outputs"
    checked_reduction(name, reduction)
    head = checked_head(name, hidden, kernel, bias, transpose_kernel)
    scalars = checked_scalars(name, head, softcap, temperature, z_loss)
    of_loss = {"label_smoothing": label_smoothing, "class_weights": class_weights}
    rank = len(head.lead)
    if labels is not None:
        refuse_distributions(name, labels)
    has_loss = labels is not None and len(_checks.shape_of(labels)) == rank
    if not has_loss:
        _refuse_options(name, {**of_loss, "z_loss": z_loss, "weights": weights}, reduction)
    of_loss |= {"with_costs": reduction == "class_weighted_mean", "z_loss": z_loss}
    rows, spread, costs = checked_labels(name, head, labels, ignore_index, class_axis, **of_loss)
    weights = checked_weights(name, weights, head)
    if ignore_index is not None and not has_loss and rows.mass is not None:
        rows = rows._replace(active=jnp.any(rows.mass != 0, -1))
    ignored = None if rows.active is None else ~rows.active
    max_active = checked_room(name, max_active, head.lead)
    arguments = Arguments(rows, head.classes._replace(spread=spread), scalars)
    how = {"reduction": reduction, "budget": max_temp_bytes, "max_active": max_active}
    how["batch_invariant"] = batch_invariant
    of_examples = rows, weights, costs
    call = call_of(name, head.classes, of_examples, spread, class_axis, feature_axis, **how)
    refuse_too_many(name, call, ignored, weights)
    top_k = _checked_top_k(name, top_k, all_classes(head.classes, class_axis))
    if reduction != "none":
        return _reduced(call, top_k, arguments, weights, costs)
    reals, top_classes = _mapped(call, _outputs, _outputs_over, arguments, weights, top_k, has_loss)
    log_probability, lse, entropy, top_log_probabilities, loss = reals
    if has_loss:
        log_probability = log_probability[..., 0]
        loss = loss if weights is None else loss * weights
    return LinearOutputs(log_probability, lse, entropy, top_log_probabilities, top_classes, loss)


def _refuse_options(name: str, options: dict[str, Any], reduction: str) -> None:
    """Raises an error for options of the loss if there is no loss."""
    options = options if reduction == "none" else options | {"reduction": reduction}
    for option, value in options.items():
        if value is not None and not _checks.is_number(value, 0):
            expected = "left out unless there is one label for each example, labels [...]"
            raise ValueError(_checks.message(name, option, expected, repr(value)))


def _checked_top_k(name: str, top_k: Any, classes: int) -> int:
    is_integer = isinstance(top_k, (int, np.integer)) and not isinstance(top_k, bool)
    if not is_integer or not 1 <= top_k <= classes:
        expected = f"an integer in [1, {classes}]"
        raise ValueError(_checks.message(name, "top_k", expected, repr(top_k)))
    return int(top_k)


@partial(jax.jit, static_argnums=(0, 1, 2, 5, 6))
def _mapped(
    call: Call,
    function: Callable,
    over: Callable,
    arguments: Arguments,
    weights: Array | None,
    *options: int,
) -> Any:
    """The results of `function`, some rows at a time, or of `over` if the classes are sharded."""
    layout, budget = call.layout, call.budget
    arguments, weights = alike(layout, (arguments, weights))
    rows, weights = jax.tree.map(call.lead.flat, (arguments.rows, weights))
    rows = _with_finite_rows(call, with_active_rows(rows, weights))
    arguments = arguments._replace(rows=rows)
    packing = None
    if call.max_active is not None:
        ones = jnp.ones_like(rows.hidden[:, 0], compute_dtype(rows.hidden.dtype))
        packing = packed(layout, (arguments,), ones, call.max_active)
        (arguments,) = packing.heads

    def of_part(part: Arguments) -> Any:
        return function(part, *options)

    def local(arguments: Arguments) -> Any:
        if layout.classes:
            return over(layout.classes, budget, arguments, *options)
        whole = partial(by_rows, of_part, budget)
        return in_tiles(of_part, whole, arguments) if call.batch_invariant else whole(arguments)

    results = mapped(layout, local, arguments, (), (), P(layout.rows))
    results = layout.rows_of(results, arguments.rows.hidden.shape[0])
    results = _in_their_places(layout, results, packing, rows.hidden.shape[0])
    return jax.tree.map(call.lead.back, results)


def _with_finite_rows(call: Call, rows: Rows) -> Rows:
    """The rows, without features of inactive rows that are not finite, unless packing removes them.

    The outputs of the other inactive rows are those of their features.
    """
    if rows.active is None or call.max_active is not None:
        return rows
    finite = jnp.all(jnp.isfinite(rows.hidden), -1)
    kept = (rows.active | finite)[:, None]
    return rows._replace(hidden=jnp.where(kept, rows.hidden, 0))


def _in_their_places(layout: Layout, results: Any, packing: Packed | None, count: int) -> Any:
    """The results of all rows, reals and integers, from the results of the packed rows."""
    if packing is None:
        return results
    reals, integers = unpacked(layout, results, packing.places, count)
    return jax.tree.map(lambda a: a * packing.spoiled, reals), integers


@partial(jax.jit, static_argnums=(0, 1))
def _reduced(
    call: Call, top_k: int, arguments: Arguments, weights: Array | None, costs: Array | None
) -> LinearOutputs:
    """The reduced loss and the other outputs, from one pass over the logits."""
    lead, layout, max_active = call.lead, call.layout, call.max_active
    arguments, weights, costs = alike(layout, (arguments, weights, costs))
    rows, weights, costs = jax.tree.map(lead.flat, (arguments.rows, weights, costs))
    rows, count = with_active_rows(rows, weights), rows.hidden.shape[0]
    scale, packing = scale_of(rows, weights, costs, call.reduction), None
    arguments = arguments._replace(rows=_with_finite_rows(call, rows))
    if max_active is not None:
        packing = packed(layout, (arguments,), scale, max_active)
        (arguments,), scale, *_ = packing
    rows = arguments.rows
    assert rows.index is not None
    assert rows.mass is not None
    # The last label, with its mass, belongs to the loss.
    of_loss = rows._replace(index=rows.index[:, -1:], mass=rows.mass[:, -1:])
    every: Any = None

    def total(scale: Array) -> Array:
        nonlocal every
        operands = arguments._replace(rows=of_loss), scale
        value, every = total_with_readings_on(layout, *operands, call.budget, top_k)
        return value

    value = scaled_total(total, scale, rows.hidden.dtype)
    (s, surprise, top_d), top_classes = every
    of_labels = arguments._replace(rows=rows._replace(index=None, mass=rows.mass[:, :-1]))
    reals = outputs_of_rows(of_labels, s, surprise, top_d, has_loss=False)
    results = _in_their_places(layout, (reals, top_classes), packing, count)
    (log_p, lse, entropy, top_log_p, _), top_classes = jax.tree.map(lead.back, results)
    value = value if packing is None else value * packing.spoiled
    return LinearOutputs(log_p[..., 0], lse, entropy, top_log_p, top_classes, value)


def _log_partitions(part: Arguments):
    return log_partition_of(statistics(block_of(*part), None, 0), part.scalars), ()


def _log_partitions_over(axes: tuple[str, ...], budget: int | None, arguments: Arguments):
    return log_partition_of(statistics_over(axes, budget, arguments), arguments.scalars), ()


def _outputs(part: Arguments, top_k: int, has_loss: bool):
    (s, surprise, top_d), top_classes = read(part, 0, top_k)
    return outputs_of_rows(part, s, surprise, top_d, has_loss), top_classes


def _outputs_over(
    axes: tuple[str, ...], budget: int | None, arguments: Arguments, top_k: int, has_loss: bool
):
    (s, surprise, top_d), top_classes = read_over(axes, budget, arguments, top_k)
    return outputs_of_rows(arguments, s, surprise, top_d, has_loss), top_classes
