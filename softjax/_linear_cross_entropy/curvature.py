"""Products with the curvature of the loss of a linear head, without all logits at once."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from softjax import _checks
from softjax._linear_cross_entropy.blocks import (
    Rows,
    Scalars,
    block_of,
    class_logits,
    times_features,
)
from softjax._linear_cross_entropy.examples import scale_of
from softjax._linear_cross_entropy.heads import (
    Head,
    checked_head,
    checked_scalars,
    checked_weights,
)
from softjax._linear_cross_entropy.layout import Call, Layout, alike, call_of
from softjax._linear_cross_entropy.pieces import (
    Arguments,
    cut,
    put,
    shapes_of,
    some_rows,
    sweep,
    times_classes,
    times_rows,
)
from softjax._linear_cross_entropy.plans import rows_of_pairs
from softjax._linear_cross_entropy.sharded import gathered, mapped, scattered
from softjax._linear_cross_entropy.tops import distance
from softjax._numerics import maximum
from softjax._sharding import brought_to, varying
from softjax._softmax_core import softmax_core, softmax_tangent
from softjax._weights import is_zero

NAME = "linear_cross_entropy_ggn_vp"
Tangents = tuple[Array | None, Array | None, Array | None]


def linear_cross_entropy_ggn_vp(
    hidden: ArrayLike,
    kernel: ArrayLike,
    tangents: tuple[ArrayLike | None, ArrayLike | None, ArrayLike | None],
    bias: ArrayLike | None = None,
    *,
    transpose_kernel: bool = False,
    weights: ArrayLike | None = None,
    softcap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    reduction: Literal["sum", "mean"] = "mean",
    class_axis: str | tuple[str, ...] | None = None,
    feature_axis: str | tuple[str, ...] | None = None,
    max_temp_bytes: int | None = None,
) -> Tangents:
    """Generalised Gauss-Newton matrix of linear_cross_entropy times a vector.

        G v = J^T H J v,  H = diag(p) - p p^T,  J = d logits / d (hidden, kernel, bias)
        H z_dot = p * (z_dot - <p, z_dot>),  z_dot = J v

    It is also the Fisher information times a vector, since H is the covariance of the label. G is
    symmetric and positive semidefinite, and does not depend on the labels. Only the logits of some
    rows exist at a time.
    Derivative: by JAX, in both modes, at any order.
    Over a mesh: the devices exchange five numbers per example, and the products.
    Edge cases: an example with weight 0 has no effect.

    Args:
        hidden: real [..., D].
        kernel: real [D, V].
        tangents: v as (hidden_dot, kernel_dot, bias_dot), in the shapes of the arguments; None for
            an argument that is held fixed.
        bias: real [V].
        transpose_kernel: as in linear_cross_entropy.
        weights: real or boolean [...], >= 0: the weights of the examples.
        softcap: scalar > 0, as in linear_cross_entropy.
        temperature: scalar > 0.
        reduction: "mean", which divides by the sum of the weights, or "sum".
        class_axis: as in linear_cross_entropy.
        feature_axis: as in linear_cross_entropy.
        max_temp_bytes: as in linear_cross_entropy.

    Returns:
        G v in the form of `tangents`, each array in the dtype of its argument (of integers, the
        default float); None stays None.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype or shape, or a bad option.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> v = (None, jnp.array([[1.0, 0.0]]), None)
        >>> softjax.linear_cross_entropy_ggn_vp(jnp.ones((1, 1)), jnp.zeros((1, 2)), v)[1]
        Array([[ 0.25, -0.25]], dtype=float32)

    Source: N. N. Schraudolph, "Fast curvature matrix-vector products for second-order gradient
        descent", Neural Computation 14 (2002); J. Martens, "New insights and perspectives on the
        natural gradient method", JMLR 21 (2020), section 9.
    """
    if reduction not in ("sum", "mean"):
        expected = "'sum' or 'mean'"
        raise ValueError(_checks.message(NAME, "reduction", expected, repr(reduction)))
    head = checked_head(NAME, hidden, kernel, bias, transpose_kernel)
    w = checked_weights(NAME, weights, head)
    scalars = checked_scalars(NAME, head, softcap, temperature)
    dots = _checked_tangents(tangents, head)
    of_examples, how = (head.hidden, w, dots[0]), {"reduction": reduction, "budget": max_temp_bytes}
    call = call_of(NAME, head.classes, of_examples, dots, class_axis, feature_axis, **how)
    products = _reduced(call, head, scalars, w, dots)
    h, w, b = (
        None if a is None or of is None else a.astype(_checks.real_array(NAME, "", of).dtype)
        for a, of in zip(products, (hidden, kernel, bias), strict=True)
    )
    return h, w, b


def _checked_tangents(tangents, head: Head) -> Tangents:
    """The tangents in the dtypes of the head."""
    names = ("hidden", "kernel", "bias")
    if not isinstance(tangents, tuple) or len(tangents) != len(names):
        got = type(tangents).__name__
        raise TypeError(_checks.message(NAME, "tangents", "a tuple (hidden, kernel, bias)", got))
    checked: list[Array | None] = []
    arguments = head.hidden, *head.classes[:2]
    for name, dot, argument in zip(names, tangents, arguments, strict=True):
        if dot is None:
            checked.append(None)
            continue
        if argument is None:
            expected = f"None for {name}, which is None"
            raise ValueError(_checks.message(NAME, "tangents", expected, f"shape {jnp.shape(dot)}"))
        array = _checks.real_array(NAME, f"tangents of {name}", dot)
        _checks.same_shape(NAME, f"tangents of {name}", array, argument.shape)
        checked.append(array.astype(argument.dtype))
    hidden_dot, kernel_dot, bias_dot = checked
    return hidden_dot, kernel_dot, bias_dot


@partial(jax.jit, static_argnums=0)
def _reduced(
    call: Call, head: Head, scalars: Scalars, weights: Array | None, tangents: Tangents
) -> Tangents:
    lead, layout, budget = call.lead, call.layout, call.budget
    head, scalars, weights, tangents = alike(layout, (head, scalars, weights, tangents))
    hidden, weights, h_dot = jax.tree.map(lead.flat, (head.hidden, weights, tangents[0]))
    scale = scale_of(Rows(hidden), weights, None, call.reduction)
    counted = ~is_zero(scale)[:, None]
    hidden, h_dot = jax.tree.map(lambda a: jnp.where(counted, a, 0), (hidden, h_dot))
    arguments, dots = Arguments(Rows(hidden), head.classes, scalars), (h_dot, *tangents[1:])
    h, w, b = _products_on(layout, budget, arguments, scale, dots)
    return None if h is None else brought_to(lead.back(h), head.hidden), w, b


def _products_on(
    layout: Layout, budget: int | None, arguments: Arguments, scale: Array, tangents: Tangents
) -> Tangents:
    """The products, where each device of a mesh has some of the rows and of the classes."""
    rows, features, classes = layout.rows, layout.features, layout.classes
    axis = 1 - arguments.classes.axis

    def local(arguments: Arguments, scale: Array, tangents: Tangents) -> Tangents:
        h_dot, kernel_dot, bias_dot = tangents
        if kernel_dot is not None:
            kernel_dot = gathered(kernel_dot, features, axis)
        dots = varying((h_dot, kernel_dot, bias_dot), (*rows, *classes))
        h, w, b = _products(classes, budget, arguments, scale, dots)
        w = None if w is None else scattered(w, features, axis)
        left = tuple(name for name in rows if name not in features)
        sums = (h, classes), (w, left), (b, rows)
        h, w, b = (None if a is None else lax.psum(a, axes) for a, axes in sums)
        return h, w, b

    of_kernel = P(classes, features) if axis else P(features, classes)
    specs = P(rows, None), of_kernel, P(classes)
    specs = tuple(None if a is None else s for a, s in zip(tangents, specs, strict=True))
    products = mapped(layout, local, arguments, (scale, tangents), (P(rows), specs), specs)
    if layout.is_local:
        return products
    # Cut off the rows and classes that were added as padding.
    h, w, b = jax.tree.map(lambda a, dot: a[tuple(map(slice, dot.shape))], products, tangents)
    return jax.tree.map(layout.as_rows, h), w, b


def _products(
    axes: tuple[str, ...],
    budget: int | None,
    arguments: Arguments,
    scale: Array,
    tangents: Tangents,
) -> Tangents:
    """sum_i scale_i J_i^T H_i J_i v, computed some rows at a time; `axes` shard the classes."""
    dtype = scale.dtype

    def step(sums, operands, start, size):
        part, c = some_rows(operands[0], start, size), cut(operands[1], start, size, 0)
        h_dot, kernel_dot, bias_dot = operands[2]
        (rows, classes, scalars), block = part, block_of(*part)
        product_dot, axis = jnp.zeros((size, classes.length), dtype), classes.axis
        if h_dot is not None:
            h_dot = cut(h_dot, start, size, 0)
            product_dot += times_features(h_dot, classes.kernel, axis, dtype)
        if kernel_dot is not None:
            product_dot += times_features(rows.hidden, kernel_dot, axis, dtype)
        if block.bias is not None and bias_dot is None:
            bias_dot = jnp.zeros_like(block.bias)

        def scaled_logits(product, bias):
            x = class_logits(product, bias, scalars.softcap)
            top = maximum(lax.stop_gradient(x), (1,))
            return distance(x, lax.pmax(top, axes) if axes else top, scalars.temperature)

        d, pull = jax.vjp(scaled_logits, block.product, block.bias)
        primals, dots = (block.product, block.bias), (product_dot, bias_dot)
        d_dot = jax.jvp(scaled_logits, primals, dots)[1]
        if axes:
            p_dot = _softmax_tangent_over(axes, d, d_dot)
        else:
            p_dot = softmax_tangent(softmax_core(d, (1,)), d_dot, (1,))
        product_bar, bias_bar = pull(c[:, None] * p_dot)
        g = product_bar.astype(rows.hidden.dtype)
        of_hidden, of_kernel, of_bias = sums
        if of_hidden is not None:
            of_hidden = put(of_hidden, times_classes(g, classes.kernel, axis, dtype), start, 0)
        if of_kernel is not None:
            of_kernel += times_rows(rows.hidden, g, axis, dtype)
        if of_bias is not None:
            of_bias += bias_bar
        return of_hidden, of_kernel, of_bias

    sums = jax.tree.map(lambda dot: jnp.zeros(dot.shape, dtype), tangents)
    kernels = int(tangents[1] is not None)
    size = rows_of_pairs(shapes_of(arguments), budget, kernels)
    return sweep(step, sums, (arguments, scale, tangents), scale.shape[0], size)


def _softmax_tangent_over(axes: tuple[str, ...], d: Array, d_dot: Array) -> Array:
    """`softmax_tangent` for sharded classes: d is 0 at the top and <= 0 elsewhere."""

    def total(a: Array) -> Array:
        return lax.psum(jnp.sum(a, -1, keepdims=True), axes)

    e = jnp.exp(d)
    p = e / jnp.maximum(total(e), jnp.finfo(d.dtype).tiny)
    dominant = p > 0.5
    w = jnp.where(dominant, 0, d_dot - total(jnp.where(dominant, d_dot, 0)))
    v = p * (w - total(jnp.where(p == 0, 0, p * w)))
    return jnp.where(dominant, -total(jnp.where(dominant, 0, v)), v)
