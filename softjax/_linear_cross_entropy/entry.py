"""linear_cross_entropy: the documented function and its reductions."""

from functools import partial

import jax
from jax import Array
from jax.typing import ArrayLike

from softjax._cross_entropy import Reduction, checked_reduction
from softjax._labels import Labels
from softjax._linear_cross_entropy.blocks import Rows, Scalars
from softjax._linear_cross_entropy.examples import (
    checked_room,
    reduced,
    refuse_too_many,
    scale_of,
    with_active_rows,
    with_zeroed_rows,
)
from softjax._linear_cross_entropy.heads import (
    Head,
    Targets,
    checked_head,
    checked_scalars,
    checked_targets,
    checked_weights,
)
from softjax._linear_cross_entropy.layout import Call, alike, call_of
from softjax._linear_cross_entropy.pieces import Arguments
from softjax._linear_cross_entropy.sharded import losses_on

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
    every real argument, and never hold all logits. Sums and means compute value and gradient in one
    pass of three matrix products, or of four on a CPU in half precision or if `max_temp_bytes` is
    small. The reduction "none" takes four.
    Over a mesh: the devices exchange three numbers per example, and the gradients once. If the
    classes are sharded, the numbers are sent separately for each piece of the rows.
    Edge cases: as for cross_entropy. An example with weight 0 or with the ignored label has no
    effect, even if it contains NaN or inf. The mean of no examples is 0.

    Args:
        hidden: real [..., D].
        kernel: real [D, V]. Both are multiplied in their common dtype, with JAX's default
            precision as in `hidden @ kernel`; half precision is summed in float32.
        labels: class indices [...]; or a distribution over the classes, floating [..., V], which is
            not normalised; or TopKLabels [..., k], for example of a teacher.
        bias: real [V]; -inf removes a class.
        transpose_kernel: whether the kernel is [V, D], like an embedding or the weight of a linear
            layer in PyTorch and Equinox; it is not copied.
        label_smoothing: in [0, 1], scalar.
        class_weights: real [V], >= 0, the factors of the losses of the classes.
        ignore_index: examples with this label have loss 0 and gradient 0, and a mean leaves them
            out; integer labels only.
        z_loss: scalar >= 0: adds z_loss * logsumexp(x)^2.
        softcap: scalar > 0: the logits, before they are divided by T, stay within
            (-softcap, softcap).
        temperature: scalar T > 0.
        reduction: "none", "sum", "mean" or "class_weighted_mean", which uses the class weights c as
            in cross_entropy and is the mean of PyTorch and Liger.
        weights: real or boolean [...], >= 0: the weights of the examples.
        class_axis: on an Auto mesh, whose shardings JAX hides while it traces, the mesh axis or
            axes over which the classes are sharded; () and None for none. The examples are divided
            over all other Auto axes; the numbers need not be divisible. On an Explicit mesh it is
            not needed. Within jax.shard_map it is the manual axis or axes of the classes: arrays of
            classes are then the parts of this device, labels are indices into all classes, and a
            sum or mean is taken over the examples of this device.
        feature_axis: the mesh axis or axes of the features of the kernel, if they are sharded too
            (FSDP). Its gradient is then sharded in the same way, instead of replicated.
        max_temp_bytes: the target for the memory beside arguments, result and gradients; None for
            the fastest plan of the platform. The pieces are made as small as the target needs, down
            to one row or class. Two arrays do not become smaller and may exceed a small target: in
            half precision, the float32 sum of the kernel's gradients if the losses are not reduced;
            and on a TPU, the bfloat16 copy of a float32 kernel.
        max_active: the largest number of examples whose weight is not 0 and whose label is not
            ignored. These are gathered first, so that no product is computed for the others. If
            there are more, the function raises a ValueError if labels and weights are known, and
            otherwise returns NaN. On a mesh each of n devices has room for
            ceil(max_active / n) of its own examples: one with more gives NaN, or the error.
        batch_invariant: whether the loss of an example, with the reduction "none", has the same
            bits in every batch, of any size and order. The examples are then computed a fixed
            number at a time, and `max_temp_bytes` has no effect. Not available for sharded classes.

    Returns:
        Losses [...] in nats, or one number, at least float32.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, a bad option, a known label
            outside [0, V), or more than `max_active` active examples, if these are known.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> hidden, kernel = jnp.eye(2), jnp.array([[16.0, 0.0], [0.0, 0.0]])
        >>> softjax.linear_cross_entropy(hidden, kernel, jnp.array([0, 1]))
        Array([1.1253518e-07, 6.9314718e-01], dtype=float32)

    Source: E. Wijmans et al., "Cut your losses in large-vocabulary language models" (2024); P.-L.
        Hsu et al., "Liger kernel" (2024), for the gradient in the forward pass.
    """
    checked_reduction(NAME, reduction)
    head = checked_head(NAME, hidden, kernel, bias, transpose_kernel)
    options = label_smoothing, class_weights, ignore_index, class_axis
    with_costs = reduction == "class_weighted_mean"
    targets = checked_targets(NAME, head, labels, *options, with_costs=with_costs, z_loss=z_loss)
    scalars = checked_scalars(NAME, head, softcap, temperature, z_loss)
    weights = checked_weights(NAME, weights, head)
    max_active = checked_room(NAME, max_active, head.lead)
    of_examples = head.hidden, targets.of_examples, weights
    how = {"reduction": reduction, "budget": max_temp_bytes, "max_active": max_active}
    how["batch_invariant"] = batch_invariant
    call = call_of(NAME, head.classes, of_examples, targets, class_axis, feature_axis, **how)
    refuse_too_many(NAME, call, targets.ignored, weights)
    return _reduced(call, head, targets, scalars, weights)


@partial(jax.jit, static_argnums=0)
def _reduced(
    call: Call, head: Head, targets: Targets, scalars: Scalars, weights: Array | None
) -> Array:
    head, targets, scalars, weights = alike(call.layout, (head, targets, scalars, weights))
    of_examples = head.hidden, *targets.of_examples, weights
    flat = jax.tree.map(call.lead.flat, of_examples)
    hidden, index, mass, dense, ignored, costs, weights = flat
    active = None if ignored is None else ~ignored
    rows = with_active_rows(Rows(hidden, index, mass, dense, active), weights)
    of_targets = {"spread": targets.spread, "class_weights": targets.class_weights}
    classes = head.classes._replace(**of_targets)
    arguments = Arguments(with_zeroed_rows(call, rows), classes, scalars)

    def losses(heads: tuple[Arguments, ...], scale: Array | None) -> Array:
        return losses_on(call, heads[0], scale)

    scale = scale_of(rows, weights, costs, call.reduction)
    return reduced(call, (arguments,), weights, scale, losses)
