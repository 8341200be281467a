"""What a linear head says of every example, without all logits at once."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from softjax import _checks
from softjax._labels import TopKLabels, class_indices, is_class_indices
from softjax._linear_cross_entropy.blocks import (
    Classes,
    Rows,
    Scalars,
    Statistics,
    block_of,
    class_logits,
    distance,
    log_partition,
    log_total,
    statistics,
    surprisals,
)
from softjax._linear_cross_entropy.chunked import by_rows
from softjax._linear_cross_entropy.entry import (
    checked_budget,
    checked_head,
    checked_scalars,
)
from softjax._linear_cross_entropy.pieces import Arguments
from softjax._linear_cross_entropy.sharded import (
    Layout,
    cast,
    first_class,
    joined,
    layout_of,
    rows_on,
    statistics_over,
)
from softjax._numerics import compute_dtype, not_negative
from softjax._sharding import Lead, axes_of, mesh_of, varying, varying_alike


class LinearOutputs(NamedTuple):
    """What `linear_cross_entropy_outputs` returns; all in nats, at least float32.

    Attributes:
        log_probability: [...], log p of the label; None without labels.
        logsumexp: [...], the log-partition of the logits.
        entropy: [...], of the distribution over the classes.
        top_log_probabilities: [..., k], of the k most probable classes, in falling order.
        top_classes: int32 [..., k], these classes; the first is the argmax.

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


def linear_logsumexp(
    hidden: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    softcap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    class_axis: str | tuple[str, ...] | None = None,
    feature_axis: str | tuple[str, ...] | None = None,
    max_temp_bytes: int | None = None,
) -> Array:
    """Log-partition function of the logits hidden @ kernel + bias, which never exist at once.

        y = logsumexp(x),  x = s tanh((h W + b) / s) / T

    Derivative: softmax(x) times W^T and h. Both modes, any order, without all logits either.
    Edge cases: as logsumexp; every class at -inf: -inf with zero gradient.

    Args:
        hidden: real [..., D].
        kernel: real [D, V].
        bias: real [V].
        softcap: scalar s > 0.
        temperature: scalar T > 0.
        class_axis: as in linear_cross_entropy.
        feature_axis: as in linear_cross_entropy.
        max_temp_bytes: as in linear_cross_entropy.

    Returns:
        [...] in nats, at least float32.

    Raises:
        TypeError, ValueError: shapes, dtypes or options that do not fit.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> softjax.linear_logsumexp(jnp.ones((1, 1)), jnp.array([[0.0, -20.0]]))
        Array([2.0611537e-09], dtype=float32)

    Source: as logsumexp and linear_cross_entropy.
    """
    name = "linear_logsumexp"
    arguments = _arguments(name, hidden, kernel, bias, None, softcap, temperature)
    lead, layout = _places(name, arguments, class_axis, feature_axis)
    checked_budget(name, max_temp_bytes)
    y, _ = _mapped(_log_partitions, _log_partitions_over, arguments, lead, layout, max_temp_bytes)
    return y


def linear_cross_entropy_outputs(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    softcap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    top_k: int = 1,
    class_axis: str | tuple[str, ...] | None = None,
    feature_axis: str | tuple[str, ...] | None = None,
    max_temp_bytes: int | None = None,
) -> LinearOutputs:
    """Log-probability of the label, logsumexp, entropy and top k of hidden @ kernel + bias.

        x = s tanh((h W + b) / s) / T,  all of softmax(x), in one pass over the kernel

    Derivative: that of each output, both modes, any order, without all logits; top_classes has
    none.
    Edge cases: a label out of range: NaN under a trace. Equal logits: the first class comes first.

    Args:
        hidden: real [..., D].
        kernel: real [D, V].
        labels: class indices [...], or None.
        bias: real [V].
        softcap: scalar s > 0.
        temperature: scalar T > 0.
        top_k: how many classes to return, in [1, V].
        class_axis: as in linear_cross_entropy.
        feature_axis: as in linear_cross_entropy.
        max_temp_bytes: as in linear_cross_entropy.

    Returns:
        LinearOutputs.

    Raises:
        TypeError, ValueError: shapes, dtypes or options that do not fit, a known label outside
            [0, V).

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> hidden, kernel = jnp.ones((1, 1)), jnp.array([[0.0, 1.0]])
        >>> softjax.linear_cross_entropy_outputs(hidden, kernel, jnp.array([0])).log_probability
        Array([-1.3132616], dtype=float32)

    Source: the definitions; entropy as log sum exp(x - m) + sum p (m - x), which does not cancel.
    """
    name = "linear_cross_entropy_outputs"
    checked_budget(name, max_temp_bytes)
    arguments = _arguments(name, hidden, kernel, bias, labels, softcap, temperature)
    lead, layout = _places(name, arguments, class_axis, feature_axis)
    classes = arguments.classes.kernel.shape[1]
    is_integer = isinstance(top_k, (int, np.integer)) and not isinstance(top_k, bool)
    if not is_integer or not 1 <= top_k <= classes:
        expected = f"an integer in [1, {classes}]"
        raise ValueError(_checks.message(name, "top_k", expected, repr(top_k)))
    reals, top_classes = _mapped(
        _outputs, _outputs_over, arguments, lead, layout, max_temp_bytes, int(top_k)
    )
    log_probability, lse, entropy, top_log_probabilities = reals
    return LinearOutputs(log_probability, lse, entropy, top_log_probabilities, top_classes)


def _arguments(name: str, hidden, kernel, bias, labels, softcap, temperature) -> Arguments:
    head = checked_head(name, hidden, kernel, bias)
    dtype = compute_dtype(head.hidden.dtype)
    scalars = checked_scalars(name, dtype, softcap, temperature)
    index = mass = None
    if labels is not None:
        if not is_class_indices(labels, name):
            is_sparse = isinstance(labels, TopKLabels)
            got = "TopKLabels" if is_sparse else f"dtype {jnp.asarray(labels).dtype}"
            raise TypeError(_checks.message(name, "labels", "class indices (integer)", got))
        _checks.same_shape(name, "labels", labels, head.lead)
        index, bad, _ = class_indices(name, labels, head.kernel.shape[1])
        mass = jnp.ones(index.shape, dtype)
        mass = _checks.nan_where(bad, mass)[..., None]
        index = index[..., None]
    rows = Rows(head.hidden, index, mass, None, None)
    return Arguments(rows, Classes(head.kernel, head.bias, None, None), scalars)


def _places(
    name: str, arguments: Arguments, class_axis, feature_axis
) -> tuple[Lead, Layout | None]:
    """Where the examples are, and where all is."""
    rows, classes, _ = arguments
    lead = Lead.of(mesh_of(arguments), rows.hidden.ndim - 1, classes.kernel, *jax.tree.leaves(rows))
    return lead, layout_of(name, lead, classes.kernel, class_axis, feature_axis)


@partial(jax.jit, static_argnums=(0, 1, 3, 4, 5, 6))
def _mapped(
    function: Callable,
    over: Callable,
    arguments: Arguments,
    lead: Lead,
    layout: Layout | None,
    budget: int | None,
    *options: int,
) -> Any:
    """The reals and the integers of `function`, some rows at a time, for the examples as they came.

    Where the classes are sharded, `over` gives them, from those of a device.
    """
    arguments = varying_alike(arguments)
    arguments = arguments._replace(rows=jax.tree.map(lead.flat, arguments.rows))

    def whole(arguments: Arguments) -> Any:
        return by_rows(lambda part: function(part, *options), budget, arguments)

    if layout is None:
        return jax.tree.map(lead.back, whole(arguments))
    axes = layout.classes

    def local(arguments: Arguments) -> Any:
        arguments = cast(layout, arguments)
        return over(axes, budget, arguments, *options) if axes else whole(arguments)

    return jax.tree.map(lead.back, rows_on(layout, local, arguments))


def _log_partitions(part: Arguments):
    return _log_partition(statistics(block_of(*part), None, 0), part.scalars), ()


def _log_partitions_over(axes: tuple[str, ...], budget: int | None, arguments: Arguments):
    return _log_partition(statistics_over(axes, budget, arguments), arguments.scalars), ()


def _log_partition(s: Statistics, scalars: Scalars) -> Array:
    return jnp.where(s.excess < 0, -jnp.inf, log_partition(s, scalars))


def _outputs(part: Arguments, top_k: int):
    rows, _, scalars = part
    s, surprise, top_d, top_classes = _of_classes(part, 0, top_k)
    entropy = log_total(s) + surprise / (1 + not_negative(s.excess))
    top_log_probabilities = top_d - log_total(s)[:, None]
    log_probability = _label_log_probability(s, rows.mass, scalars)
    lse = _log_partition(s, scalars)
    return (log_probability, lse, entropy, top_log_probabilities), top_classes


def _outputs_over(axes: tuple[str, ...], budget: int | None, arguments: Arguments, top_k: int):
    """With d = (m_s - M) / T for the shard s: sum e^d (surprise - (1 + r_s) d) is that of all."""
    rows, classes, scalars = arguments
    own_k = min(top_k, classes.kernel.shape[1])

    def local(part: Arguments):
        first = first_class(axes, part)
        s, surprise, top_d, top_classes = _of_classes(part, first, own_k)
        return (s, surprise, top_d), top_classes + first

    (own, surprise, top_d), top_classes = by_rows(local, budget, varying(arguments, axes))
    s = joined(own, axes, scalars.temperature)
    d = distance(jnp.where(own.excess < 0, s.top, own.top), s.top, scalars.temperature)
    surprise = lax.psum(jnp.exp(d) * (surprise - (1 + own.excess) * d), axes)
    entropy = log_total(s) + surprise / (1 + not_negative(s.excess))
    every_d = _side_by_side(axes, top_d + d[:, None])
    top_d, at = lax.top_k(every_d, top_k)
    top_classes = jnp.take_along_axis(_side_by_side(axes, top_classes), at, -1)
    log_probability = _label_log_probability(s, rows.mass, scalars)
    lse, top_log_probabilities = _log_partition(s, scalars), top_d - log_total(s)[:, None]
    return (log_probability, lse, entropy, top_log_probabilities), top_classes


def _of_classes(part: Arguments, start: Array | int, top_k: int):
    """The statistics of a block, sum_k e^d_k (-d_k) and the largest d, with their places."""
    rows, _, scalars = part
    block = block_of(*part)
    s = statistics(block, rows.index, start)
    x = class_logits(block.product, block.bias, scalars.softcap)
    d = distance(x, s.top[:, None], scalars.temperature)
    e = jnp.exp(d)
    return s, jnp.sum(jnp.where(e == 0, 0, e * -d), -1), *lax.top_k(d, top_k)


def _label_log_probability(s: Statistics, mass: Array | None, scalars: Scalars) -> Array | None:
    return None if mass is None else -(mass * surprisals(s, scalars))[:, 0]


def _side_by_side(axes: tuple[str, ...], a: Array) -> Array:
    """[n, k] of every device in the order of the classes, the same on each."""
    (n, k), shards = a.shape, lax.axis_size(axes)
    every = varying(jnp.zeros((n, k * shards), a.dtype), axes_of(a))
    placed = lax.dynamic_update_slice_in_dim(every, a, k * lax.axis_index(axes), axis=1)
    return lax.psum(placed, axes)
