"""linear_cross_entropy: the documented function, and the reductions."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax import _checks
from softjax._labels import Labels
from softjax._linear_cross_entropy.arguments import (
    Head,
    Layout,
    Targets,
    checked_budget,
    checked_head,
    checked_scalars,
    checked_targets,
    checked_weights,
    layout_of,
)
from softjax._linear_cross_entropy.blocks import Classes, Rows, Scalars
from softjax._linear_cross_entropy.pieces import Arguments
from softjax._linear_cross_entropy.sharded import each_on, total_on
from softjax._numerics import compute_dtype
from softjax._sharding import Lead

NAME = "linear_cross_entropy"
REDUCTIONS = ("none", "sum", "mean")


def linear_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: Labels,
    bias: ArrayLike | None = None,
    *,
    label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    ignore_index: int | None = None,
    z_loss: ArrayLike = 0.0,
    softcap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    reduction: Literal["none", "sum", "mean"] = "none",
    weights: ArrayLike | None = None,
    class_axis: str | tuple[str, ...] | None = None,
    feature_axis: str | tuple[str, ...] | None = None,
    max_temp_bytes: int | None = None,
) -> Array:
    """Cross-entropy of labels and the logits hidden @ kernel + bias, which never exist at once.

        x = s tanh((h W + b) / s) / T                      s: softcap; x = (h W + b) / T without
        l = cross_entropy(x, labels), with all its options
        none: w_i l_i        sum: sum_i w_i l_i        mean: sum_i w_i l_i / sum_i w_i

    Derivative: that of cross_entropy, times W^T and h. Both modes, any order, by every array of
    real numbers among the arguments, never with all logits either. "sum" and "mean" compute value
    and gradient in one pass, in three matrix products or, in half precision, four; "none" in four.
    Over a mesh: three numbers an example and the gradients go over the wire, once; four products
    where the classes are sharded.
    Edge cases: as cross_entropy. An example of weight 0 or with the ignored label takes no part,
    NaN and inf included; nothing left for a mean: 0.

    Args:
        hidden: real [..., D].
        kernel: real [D, V]. Both are multiplied in their common dtype, with JAX's default
            precision as in `hidden @ kernel`; half precision is summed in float32.
        labels: class indices [...]; or a distribution over the classes, floating [..., V], used
            as it is; or TopKLabels [..., k], as of a teacher.
        bias: real [V]; -inf takes a class out.
        label_smoothing: in [0, 1], scalar.
        class_weights: real [V], >= 0: the cost of class k counts that many times.
        ignore_index: examples with this label have loss 0 and gradient 0, and a mean leaves them
            out; integer labels only.
        z_loss: scalar: adds z_loss * logsumexp(x)^2.
        softcap: scalar > 0: the logits, before T divides them, stay within (-softcap, softcap).
        temperature: scalar T > 0.
        reduction: "none", "sum" or "mean".
        weights: real or boolean [...], >= 0: the weights of the examples.
        class_axis: on an Auto mesh, whose shardings no trace can see, the axis or axes that the
            classes are over; () for none. The examples are over all other Auto axes; neither
            has to divide. On an Explicit mesh nothing needs to be said.
        feature_axis: the same for the features of the kernel, where they are sharded too (FSDP):
            its gradient is then scattered as it was, in place of one on every device.
        max_temp_bytes: the aim for the memory beside arguments, result and gradients; None for
            what is fastest. Smaller pieces reach it, down to one row or class at a time.

    Returns:
        Losses [...] in nats, or one number, at least float32.

    Raises:
        TypeError, ValueError: shapes, dtypes or options that do not fit, a known label outside
            [0, V).

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> hidden, kernel = jnp.eye(2), jnp.array([[16.0, 0.0], [0.0, 0.0]])
        >>> softjax.linear_cross_entropy(hidden, kernel, jnp.array([0, 1]))
        Array([1.1253518e-07, 6.9314718e-01], dtype=float32)

    Source: E. Wijmans et al., "Cut your losses in large-vocabulary language models" (2024); P.-L.
        Hsu et al., "Liger kernel" (2024), for the gradient in the forward pass.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(
            _checks.message(NAME, "reduction", f"one of {REDUCTIONS}", repr(reduction))
        )
    checked_budget(NAME, max_temp_bytes)
    head = checked_head(NAME, hidden, kernel, bias)
    targets = checked_targets(NAME, head, labels, label_smoothing, class_weights, ignore_index)
    dtype = compute_dtype(head.hidden.dtype)
    scalars = checked_scalars(NAME, dtype, softcap, temperature, z_loss)
    weights = checked_weights(NAME, weights, head)
    lead = Lead.of(len(head.lead), head.hidden, *jax.tree.leaves((targets.of_examples, weights)))
    layout = layout_of(NAME, lead, head.kernel, class_axis, feature_axis)
    return _reduced(head, targets, scalars, weights, reduction, lead, layout, max_temp_bytes)


@partial(jax.jit, static_argnums=(4, 5, 6, 7))
def _reduced(
    head: Head,
    targets: Targets,
    scalars: Scalars,
    weights: Array | None,
    reduction: str,
    lead: Lead,
    layout: Layout | None,
    budget: int | None,
) -> Array:
    of_examples = head.hidden, *targets.of_examples, weights
    hidden, index, mass, dense, ignored, weights = jax.tree.map(lead.flat, of_examples)
    active = None if ignored is None else ~ignored
    if weights is not None:
        active = weights != 0 if active is None else active & (weights != 0)
    if active is not None:
        # What an example brings that takes no part may be anything, and 0 * inf is not 0.
        hidden = jnp.where(active[:, None], hidden, 0)
    rows = Rows(hidden, index, mass, dense, active)
    classes = Classes(head.kernel, head.bias, targets.spread, targets.class_weights)
    arguments = Arguments(rows, classes, scalars)
    if reduction == "none":
        losses = each_on(layout, arguments, budget)
        return lead.back(losses if weights is None else losses * weights)
    scale = jnp.ones(len(hidden), compute_dtype(hidden.dtype)) if weights is None else weights
    scale = scale if active is None else jnp.where(active, scale, 0)
    if reduction == "mean":
        whole = jnp.sum(scale)
        scale = scale / jnp.where(whole == 0, 1, whole)
    if hidden.dtype != jnp.float16:
        return total_on(layout, arguments, scale, budget)
    # The gradient of a logit times 1 / N would be lost below the range of float16.
    largest = jax.lax.stop_gradient(jnp.max(scale, initial=jnp.finfo(scale.dtype).tiny))
    return largest * total_on(layout, arguments, scale / largest, budget)
