"""What a linear head says of every example, without all logits at once."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from softjax import _checks
from softjax._labels import class_indices, is_class_indices
from softjax._linear_cross_entropy.arguments import checked_budget, checked_head, checked_scalars
from softjax._linear_cross_entropy.blocks import (
    Classes,
    Rows,
    block_of,
    class_logits,
    distance,
    log_partition,
    log_total,
    statistics,
    surprisals,
)
from softjax._linear_cross_entropy.chunked import of_rows
from softjax._linear_cross_entropy.pieces import Arguments
from softjax._linear_cross_entropy.sweep import jvp_along
from softjax._numerics import compute_dtype


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
    arguments, lead = _arguments(name, hidden, kernel, bias, None, softcap, temperature)
    checked_budget(name, max_temp_bytes)
    return _mapped(_log_partitions, arguments, max_temp_bytes)[0].reshape(lead)


def linear_cross_entropy_outputs(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    softcap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    top_k: int = 1,
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
    arguments, lead = _arguments(name, hidden, kernel, bias, labels, softcap, temperature)
    classes = arguments.classes.kernel.shape[1]
    if not isinstance(top_k, int) or isinstance(top_k, bool) or not 1 <= top_k <= classes:
        expected = f"an integer in [1, {classes}]"
        raise ValueError(_checks.message(name, "top_k", expected, repr(top_k)))
    reals, top_classes = _mapped(_outputs, arguments, max_temp_bytes, top_k)
    log_probability, *others = jax.tree.map(
        lambda a: a.reshape(*lead, *a.shape[1:]), (*reals, top_classes)
    )
    return LinearOutputs(log_probability, *others)


def _arguments(
    name: str, hidden, kernel, bias, labels, softcap, temperature
) -> tuple[Arguments, tuple[int, ...]]:
    head = checked_head(name, hidden, kernel, bias)
    dtype = compute_dtype(head.hidden.dtype)
    scalars = checked_scalars(name, dtype, softcap, temperature)
    index = mass = None
    if labels is not None:
        if not is_class_indices(labels, name):
            got = f"dtype {jnp.asarray(labels).dtype}"
            raise TypeError(_checks.message(name, "labels", "class indices (integer)", got))
        _checks.same_shape(name, "labels", labels, head.lead)
        index, bad, _ = class_indices(name, labels, head.kernel.shape[1])
        mass = jnp.ones(index.shape, dtype)
        mass = (mass if bad is None else jnp.where(bad, jnp.nan, mass)).reshape(-1, 1)
        index = index.reshape(-1, 1)
    rows = Rows(head.hidden, index, mass, None, None)
    return Arguments(rows, Classes(head.kernel, head.bias, None, None), scalars), head.lead


@partial(jax.jit, static_argnums=(0, 2, 3))
def _mapped(function, arguments: Arguments, budget: int | None, *options: int) -> Any:
    """The reals and the integers of `function`, with its derivative by JAX, some rows at a time."""

    def of(part: Arguments):
        return function(part, *options)

    def tangent(part: Arguments, dots: Arguments):
        dots = jax.tree.map(
            lambda a, dot: None if dot is None else dot.astype(a.dtype),
            part,
            dots,
            is_leaf=lambda a: a is None,
        )
        return jvp_along(lambda part: of(part)[0], (part,), (dots,))

    return of_rows(of, tangent, budget, arguments)


def _log_partitions(part: Arguments):
    s = statistics(block_of(*part), None, 0)
    return jnp.where(s.excess < 0, -jnp.inf, log_partition(s, part.scalars)), ()


def _outputs(part: Arguments, top_k: int):
    rows, _, scalars = part
    block = block_of(*part)
    s = statistics(block, rows.index, 0)
    x = class_logits(block.product, block.bias, scalars.softcap)
    d = distance(x, s.top[:, None], scalars.temperature)
    total = 1 + jnp.maximum(s.excess, 0)
    p = jnp.exp(d) / total[:, None]
    entropy = log_total(s) + jnp.sum(jnp.where(p == 0, 0, p * -d), -1)
    top_d, top_classes = lax.top_k(d, top_k)
    log_probability = None
    if rows.mass is not None:
        log_probability = -(rows.mass * surprisals(s, scalars))[:, 0]
    top_log_probabilities = top_d - log_total(s)[:, None]
    lse = jnp.where(s.excess < 0, -jnp.inf, log_partition(s, scalars))
    return (log_probability, lse, entropy, top_log_probabilities), top_classes
