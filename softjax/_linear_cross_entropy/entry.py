"""linear_cross_entropy: the documented function, its plain form, its arguments and reductions."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from softjax._cross_entropy import Reduction, checked_reduction, cross_entropy
from softjax._labels import Labels
from softjax._linear_cross_entropy.blocks import Rows, Scalars
from softjax._linear_cross_entropy.calls import Call, call_of
from softjax._linear_cross_entropy.examples import (
    checked_room,
    reduced,
    scale_of,
    taking_part,
    without_the_others,
)
from softjax._linear_cross_entropy.heads import (
    Head,
    Targets,
    checked_budget,
    checked_head,
    checked_scalars,
    checked_targets,
    checked_weights,
)
from softjax._linear_cross_entropy.layout import alike
from softjax._linear_cross_entropy.pieces import Arguments
from softjax._linear_cross_entropy.sharded import each_on, total_on
from softjax._numerics import compute_dtype

NAME = "linear_cross_entropy"


def linear_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: Labels,
    bias: ArrayLike | None = None,
    *,
    transpose_kernel: bool = False,
    label_smoothing: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    ignore_index: int | None = None,
    z_loss: ArrayLike = 0.0,
    softcap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    reduction: Reduction = "none",
    weights: ArrayLike | None = None,
    class_axis: str | tuple[str, ...] | None = None,
    feature_axis: str | tuple[str, ...] | None = None,
    max_temp_bytes: int | None = None,
    max_active: int | None = None,
    batch_invariant: bool = False,
) -> Array:
    """Cross-entropy of labels and the logits hidden @ kernel + bias, which never exist at once.

        x = s tanh((h W + b) / s) / T                      s: softcap; x = (h W + b) / T without
        l = cross_entropy(x, labels), with all its options
        none: w_i l_i        sum: sum_i w_i l_i        mean: sum_i w_i l_i / sum_i w_i
        class_weighted_mean: sum_i w_i l_i / sum_i w_i c_y(i)

    Derivative: the derivative of cross_entropy, times W^T and h. Both modes work at any order for
    every real argument, and never hold all logits. Sums and means compute value and gradient in
    one pass of three matrix products; of four on a CPU in half precision, or if `max_temp_bytes`
    is small. The reduction "none" takes four.
    Over a mesh: three numbers per example and the gradients go over the wire, once. Where the
    classes are sharded, the numbers are sent with each piece of the rows.
    Edge cases: as for cross_entropy. An example with weight 0 or with the ignored label takes no
    part, even if it holds NaN or inf. The mean of no examples is 0.

    Args:
        hidden: real [..., D].
        kernel: real [D, V]. Both are multiplied in their common dtype, with JAX's default
            precision as in `hidden @ kernel`; half precision is summed in float32.
        labels: class indices [...]; or a distribution over the classes, floating [..., V], used
            as it is; or TopKLabels [..., k], as of a teacher.
        bias: real [V]; -inf takes a class out.
        transpose_kernel: whether the kernel is [V, D], as an embedding, and as the weights of
            linear layers in PyTorch and Equinox; it is not copied.
        label_smoothing: in [0, 1], scalar.
        class_weights: real [V], >= 0: the cost of class k counts that many times.
        ignore_index: examples with this label have loss 0 and gradient 0, and a mean leaves them
            out; integer labels only.
        z_loss: scalar >= 0: adds z_loss * logsumexp(x)^2.
        softcap: scalar > 0: the logits, before T divides them, stay within (-softcap, softcap).
        temperature: scalar T > 0.
        reduction: "none", "sum", "mean" or "class_weighted_mean", with the class weights c as in
            cross_entropy: the mean of PyTorch and Liger.
        weights: real or boolean [...], >= 0: the weights of the examples.
        class_axis: on an Auto mesh, whose shardings JAX hides while it traces, the axis or axes
            that the classes are over; () and None for none. The examples are shared over all
            other Auto axes; neither has to divide. On an Explicit mesh nothing needs to be said.
            Within jax.shard_map the manual axis or axes that the classes are over: all that has
            classes is then the part of this device, labels count all classes, and a sum or mean
            is one of the examples of this device.
        feature_axis: the same for the features of the kernel, where they are sharded too (FSDP):
            its gradient is then scattered as it was, in place of one on every device.
        max_temp_bytes: the target for the memory beside arguments, result and gradients; None for
            the fastest plan of the platform. The pieces are made as small as the target needs,
            down to one row or class. Two arrays do not become smaller, and a smaller target is
            exceeded by them: in half precision, and where the losses are not reduced, the gradient
            of the kernel adds up in float32; and a TPU multiplies a float32 kernel as a copy of it
            in bfloat16.
        max_active: the largest number of examples that take part, as their weights and labels
            say. These are gathered first, so that the others cost no product. If there are more,
            the function raises a ValueError where labels and weights are known, and returns NaN
            elsewhere. On a mesh each device has room for its share.
        batch_invariant: whether the loss of an example, with the reduction "none", has the same
            bits in every batch, of any size and order. The examples are then computed a fixed
            number at a time, and `max_temp_bytes` has no effect. Not available for sharded
            classes.

    Returns:
        Losses [...] in nats, or one number, at least float32.

    Raises:
        TypeError, ValueError: shapes, dtypes or options that do not fit, a known label outside
            [0, V), more than `max_active` examples that are known to take part.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> hidden, kernel = jnp.eye(2), jnp.array([[16.0, 0.0], [0.0, 0.0]])
        >>> softjax.linear_cross_entropy(hidden, kernel, jnp.array([0, 1]))
        Array([1.1253518e-07, 6.9314718e-01], dtype=float32)

    Source: E. Wijmans et al., "Cut your losses in large-vocabulary language models" (2024); P.-L.
        Hsu et al., "Liger kernel" (2024), for the gradient in the forward pass.
    """
    checked_reduction(NAME, reduction)
    checked_budget(NAME, max_temp_bytes)
    head = checked_head(NAME, hidden, kernel, bias, transpose_kernel)
    options = label_smoothing, class_weights, ignore_index, class_axis
    with_costs = reduction == "class_weighted_mean"
    targets = checked_targets(NAME, head, labels, *options, with_costs=with_costs)
    dtype = compute_dtype(head.hidden.dtype)
    scalars = checked_scalars(NAME, dtype, softcap, temperature, z_loss)
    weights = checked_weights(NAME, weights, head)
    max_active = checked_room(NAME, max_active, head.lead, targets.ignored, weights)
    of_examples = head.hidden, targets.of_examples, weights
    how = {"reduction": reduction, "budget": max_temp_bytes, "max_active": max_active}
    how["batch_invariant"] = batch_invariant
    call = call_of(NAME, head.classes, of_examples, targets, class_axis, feature_axis, **how)
    return _reduced(call, head, targets, scalars, weights)


def plain_linear_cross_entropy(
    hidden: Array,
    kernel: Array,
    labels: Labels,
    bias: Array | None = None,
    *,
    transpose_kernel: bool = False,
    softcap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    **options: Any,
) -> Array:
    """The loss computed from all logits, as a user would write it; tests compare with it."""
    dtype = compute_dtype(hidden.dtype)
    kernel = kernel.T if transpose_kernel else kernel
    x = jnp.matmul(hidden, kernel, preferred_element_type=dtype)
    x = x if bias is None else x + bias.astype(dtype)
    if softcap is not None:
        out = jnp.isneginf(x)  # a class that the bias takes out stays out
        x = jnp.where(out, -jnp.inf, softcap * jnp.tanh(jnp.where(out, 0, x) / softcap))
    return cross_entropy(x / temperature, labels, **options)


@partial(jax.jit, static_argnums=0)
def _reduced(
    call: Call, head: Head, targets: Targets, scalars: Scalars, weights: Array | None
) -> Array:
    layout = call.layout
    head, targets, scalars, weights = alike(layout, (head, targets, scalars, weights))
    of_examples = head.hidden, *targets.of_examples, weights
    flat = jax.tree.map(call.lead.flat, of_examples)
    hidden, index, mass, dense, ignored, costs, weights = flat
    active = None if ignored is None else ~ignored
    rows = taking_part(Rows(hidden, index, mass, dense, active), weights)
    of_targets = {"spread": targets.spread, "class_weights": targets.class_weights}
    classes = head.classes._replace(**of_targets)
    arguments = Arguments(without_the_others(call, rows), classes, scalars)

    def losses(heads: tuple[Arguments, ...], scale: Array | None) -> Array:
        (arguments,) = heads
        if scale is None:
            return each_on(layout, arguments, call.budget, call.batch_invariant)
        return total_on(layout, arguments, scale, call.budget)

    scale = scale_of(rows, weights, costs, call.reduction)
    return reduced(call, (arguments,), weights, scale, losses)
