"""Products with the curvature of the loss of a linear head, without all logits at once."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from softjax import _checks
from softjax._linear_cross_entropy.blocks import Classes, Rows, block_of, class_logits, distance
from softjax._linear_cross_entropy.entry import (
    checked_budget,
    checked_head,
    checked_scalars,
    checked_weights,
)
from softjax._linear_cross_entropy.pieces import (
    Arguments,
    cut,
    put,
    rows_of_losses,
    shapes_of,
    some_rows,
    sweep,
    times_classes,
    times_rows,
)
from softjax._numerics import compute_dtype, maximum
from softjax._softmax import softmax_core, softmax_tangent

NAME = "linear_cross_entropy_ggn_vp"
Tangents = tuple[Array | None, Array | None, Array | None]


def linear_cross_entropy_ggn_vp(
    hidden: ArrayLike,
    kernel: ArrayLike,
    tangents: tuple[ArrayLike | None, ArrayLike | None, ArrayLike | None],
    bias: ArrayLike | None = None,
    *,
    weights: ArrayLike | None = None,
    softcap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    reduction: Literal["sum", "mean"] = "mean",
    max_temp_bytes: int | None = None,
) -> Tangents:
    """Generalised Gauss-Newton matrix of linear_cross_entropy times a vector.

        G v = J^T H J v,  H = diag(p) - p p^T,  J = d logits / d (hidden, kernel, bias)
        H z_dot = p * (z_dot - <p, z_dot>),  z_dot = J v

    Also the Fisher information times a vector, for H is the covariance of the label. Symmetric and
    positive semidefinite, whatever the labels, which it does not need. The logits of some rows at
    a time exist, and no others.
    Derivative: by JAX, both modes, any order.
    Edge cases: an example of weight 0 takes no part. On a mesh it has no form of its own: Auto axes
    gather `hidden`, Explicit ones refuse.

    Args:
        hidden: real [..., D].
        kernel: real [D, V].
        tangents: v as (hidden_dot, kernel_dot, bias_dot), of the shapes of the arguments; None
            where the argument is held fixed.
        bias: real [V].
        weights: real or boolean [...], >= 0: the weights of the examples.
        softcap: scalar > 0, as in linear_cross_entropy.
        temperature: scalar > 0.
        reduction: "mean", divided by the sum of the weights, or "sum".
        max_temp_bytes: as in linear_cross_entropy.

    Returns:
        G v, as `tangents`: each in the dtype of its argument, None where that was None.

    Raises:
        TypeError, ValueError: shapes, dtypes or options that do not fit.

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
    checked_budget(NAME, max_temp_bytes)
    head = checked_head(NAME, hidden, kernel, bias)
    w = checked_weights(NAME, weights, head)
    dtype = compute_dtype(head.hidden.dtype)
    scalars = checked_scalars(NAME, dtype, softcap, temperature)
    originals = (hidden, kernel, bias)
    dots = _checked_tangents(tangents, originals, head[:3])
    w = jnp.ones(len(head.hidden), dtype) if w is None else w
    counted = (w != 0)[:, None]
    arguments = Arguments(
        Rows(jnp.where(counted, head.hidden, 0), None, None, None, None),
        Classes(head.kernel, head.bias, None, None),
        scalars,
    )
    scale = w / jnp.where(jnp.sum(w) == 0, 1, jnp.sum(w)) if reduction == "mean" else w
    if dots[0] is not None:
        dots = (jnp.where(counted, dots[0], 0), *dots[1:])
    products = _product(arguments, scale, dots, max_temp_bytes)
    h, w, b = (
        None if a is None or of is None else a.reshape(np.shape(of)).astype(jnp.result_type(of))
        for a, of in zip(products, originals, strict=True)
    )
    return h, w, b


def _checked_tangents(tangents, originals, flat: tuple[Array, Array, Array | None]) -> Tangents:
    """The tangents in the shape and dtype of the flattened arguments."""
    names = ("hidden", "kernel", "bias")
    if not isinstance(tangents, tuple) or len(tangents) != len(names):
        got = type(tangents).__name__
        raise TypeError(_checks.message(NAME, "tangents", "a tuple (hidden, kernel, bias)", got))
    checked: list[Array | None] = []
    for name, dot, original, argument in zip(names, tangents, originals, flat, strict=True):
        if dot is None:
            checked.append(None)
            continue
        if argument is None:
            expected = f"None for {name}, which is None"
            raise ValueError(_checks.message(NAME, "tangents", expected, f"shape {jnp.shape(dot)}"))
        array = _checks.real_array(NAME, f"tangents of {name}", dot)
        _checks.same_shape(NAME, f"tangents of {name}", array, jnp.shape(original))
        checked.append(array.reshape(argument.shape).astype(argument.dtype))
    hidden_dot, kernel_dot, bias_dot = checked
    return hidden_dot, kernel_dot, bias_dot


@partial(jax.jit, static_argnums=(3,))
def _product(
    arguments: Arguments, scale: Array, tangents: Tangents, budget: int | None
) -> Tangents:
    """sum_i scale_i J_i^T H_i J_i v, some rows at a time."""
    dtype = scale.dtype

    def step(sums, operands, start, size):
        part, c = some_rows(operands[0], start, size), cut(operands[1], start, size, 0)
        h_dot, kernel_dot, bias_dot = operands[2]
        (rows, classes, scalars), block = part, block_of(*part)
        matmul = partial(jnp.matmul, preferred_element_type=dtype)
        product_dot = jnp.zeros((size, classes.kernel.shape[1]), dtype)
        if h_dot is not None:
            product_dot += matmul(cut(h_dot, start, size, 0), classes.kernel)
        if kernel_dot is not None:
            product_dot += matmul(rows.hidden, kernel_dot)
        if block.bias is not None and bias_dot is None:
            bias_dot = jnp.zeros_like(block.bias)

        def scaled_logits(product, bias):
            x = class_logits(product, bias, scalars.softcap)
            return distance(x, jax.lax.stop_gradient(maximum(x, (1,))), scalars.temperature)

        d, pull = jax.vjp(scaled_logits, block.product, block.bias)
        primals, dots = (block.product, block.bias), (product_dot, bias_dot)
        d_dot = jax.jvp(scaled_logits, primals, dots)[1]
        product_bar, bias_bar = pull(
            c[:, None] * softmax_tangent(softmax_core(d, (1,)), d_dot, (1,))
        )
        g = product_bar.astype(rows.hidden.dtype)
        of_hidden, of_kernel, of_bias = sums
        if of_hidden is not None:
            of_hidden = put(of_hidden, times_classes(g, classes.kernel, dtype), start, 0)
        if of_kernel is not None:
            of_kernel += times_rows(rows.hidden, g, dtype)
        if of_bias is not None:
            of_bias += bias_bar
        return of_hidden, of_kernel, of_bias

    sums = jax.tree.map(lambda dot: jnp.zeros(dot.shape, dtype), tangents)
    shapes = shapes_of(arguments)
    size = -(-rows_of_losses(shapes, budget) // 2)
    return sweep(step, sums, (arguments, scale, tangents), shapes.rows, size)
