"""softmax of arrays in the dtype of the computation, with its derivatives."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import zero_from_primal
from jax.typing import DTypeLike

from softjax._cpu_sums import exponentials_alone
from softjax._custom_jvp import custom_jvp
from softjax._numerics import (
    excess_and_exponentials,
    maximum,
    stored_maximum,
    total,
)
from softjax._one_pass import maximum_and_value
from softjax._platforms import platform_dependent
from softjax._reductions import (
    Axes,
    are_long,
    in_one_pass_if_long,
    index_of_maximum,
    relative_to,
    rows_fit_a_kernel,
    shift_row,
    stored_exponentials,
    sums_are_written_out,
    taken,
    weighted_sum,
)
from softjax._row_maps import row_map
from softjax._sharding import is_split, shards


@partial(custom_jvp, nondiff_argnums=(1, 2))
def softmax_core(x: Array, axes: Axes, exact: DTypeLike | None = None) -> Array:
    """exp(x - m) / sum exp(x - m); 0 in a row of -inf. `taken` explains `exact`."""
    tiny = jnp.finfo(x.dtype).tiny

    def exponentials(x: Array) -> Array:
        return jnp.exp(shift_row(x, maximum(x, axes), axes))

    def in_two_passes(x: Array) -> Array:
        e = exponentials(x)
        return e / _positive_sum(e, axes)

    def with_excess(x: Array) -> Array:
        m, r, e = excess_and_exponentials(x, axes)
        return e / total(m, r)

    def plain(x: Array) -> Array:
        return in_one_pass_if_long(x, axes, with_excess, in_two_passes)

    def short(x: Array) -> Array:
        # A kernel of a GPU that holds whole rows needs no kernel of its own for this addition.
        e = exponentials(x)
        return e / (jnp.sum(e, axes, keepdims=True) + tiny)

    def short_on_cpu(x: Array) -> Array:
        # XLA:CPU gives the whole row to a library. It is faster if each operation with m has x
        # itself as its other operand. As in `shift_row`, x - m could be contracted.
        m = maximum(x, axes)
        e = jnp.exp(jnp.minimum(m, x) - jnp.maximum(m, x))
        return e / (jnp.sum(e, axes, keepdims=True) + tiny)

    def in_tiles(x: Array) -> Array:
        return _softmax_in_tiles(x, axes)[0]

    on_cpu = in_tiles if _has_tiles(x, axes) else short_on_cpu
    on_gpu = short if rows_fit_a_kernel(x, axes) else plain
    return platform_dependent(x, cpu=on_cpu, cuda=on_gpu, rocm=on_gpu, default=plain)


def _has_tiles(x: Array, axes: Axes) -> bool:
    """Whether softmax adds the exponentials on a CPU in tiles.

    XLA:CPU adds the entries of a row in an order that depends on the number of rows. With tiles the
    sum of a row does not depend on the other rows, but a short row takes half as long again. If the
    classes are sharded, the devices send one sum instead of two.
    """
    return not (sums_are_written_out(x, axes) or math.prod(shards(x, axes)) > 1)


def _softmax_in_tiles(x: Array, axes: Axes, has_place: bool = False) -> tuple[Array, ...]:
    """softmax on a CPU, and with `has_place` the index of a maximal entry, from one loop."""
    m = stored_maximum(x, axes)
    # The loop that looks up an index would take longer than a loop that sums both first.
    inlined = not has_place
    e, whole, *place = stored_exponentials(x, m, axes, exponentials_alone, has_place, inlined)
    # NaN where m is infinite; this second use of m also keeps it out of other loops.
    return e / (whole + (jnp.finfo(x.dtype).tiny + 0 * m)), *place


def _positive_sum(e: Array, axes: Axes) -> Array:
    """sum e over `axes`, which are kept, for exponentials of x - max x; > 0 in a row of -inf.

    The sum of any other row is at least 1, so that the tiny numbers do not change it. Added to the
    sums instead of the exponentials, they would take a kernel of their own.
    """
    return jnp.sum(e + jnp.finfo(e.dtype).tiny, axes, keepdims=True)


@softmax_core.defjvp
def _softmax_jvp(axes, exact, primals, tangents):
    (x,), (x_dot,) = primals, tangents
    if exact is not None and len(axes) == 1 and are_long(x, axes):
        return _long_softmax_jvp(x, x_dot, axes, exact)
    p, top = softmax_and_top(x, axes)
    return p, softmax_tangent(p, x_dot, axes, top)


@partial(custom_jvp, nondiff_argnums=(1,))
def softmax_and_top(x: Array, axes: Axes) -> tuple[Array, Array | None]:
    """`softmax_core`, and the result of `place_of_top`."""

    def in_tiles(x: Array) -> tuple[Array, ...]:
        return _softmax_in_tiles(x, axes, has_place=True)

    def plain(x: Array) -> tuple[Array, Array | None]:
        p, row = softmax_core(x, axes), x
        if rows_fit_a_kernel(x, axes):
            # A kernel of a GPU that holds whole rows of p need not read x again.
            row = platform_dependent(x, p, cuda=_second, rocm=_second, default=_first)
        return p, place_of_top(row, axes)

    if not (_has_place(x, axes) and _has_tiles(x, axes)):
        return plain(x)
    return platform_dependent(x, cpu=in_tiles, default=plain)


@partial(softmax_and_top.defjvp, symbolic_zeros=True)
def _softmax_and_top_jvp(axes, primals, tangents):
    (x,), (x_dot,) = primals, tangents
    p, top = softmax_and_top(x, axes)
    no_tangent = None if top is None else zero_from_primal(top, symbolic_zeros=True)
    return (p, top), (softmax_tangent(p, x_dot, axes, top), no_tangent)


def _has_place(x: Array, axes: Axes) -> bool:
    """Whether one loop of a CPU can find the index of a maximal entry beside sums."""
    return len(axes) == 1 and isinstance(x.shape[axes[0]], int) and not is_split(x, axes)


def _long_softmax_jvp(x: Array, x_dot: Array, axes: Axes, exact: DTypeLike) -> tuple[Array, Array]:
    """The derivative rule for long rows, which a TPU computes from x in the fewest passes."""
    m, top = _maximum_and_index(x, axes)
    p = _softmax_beside_tangent(x, m, axes, exact)
    source = platform_dependent(x, p, tpu=_first, default=_second)
    product, coefficients = _product_with_source, (source, m, top)
    return p, row_map(product, product, x_dot, coefficients, axes, exact=exact)


@partial(custom_jvp, nondiff_argnums=(2, 3))
def _softmax_beside_tangent(x: Array, m: Array, axes: Axes, exact: DTypeLike) -> Array:
    """`softmax_core`; on a TPU from the maximum and the sum that the tangent needs too."""

    def core(x: Array, m: Array) -> Array:
        return softmax_core(x, axes)

    def on_tpu(x: Array, m: Array) -> Array:
        e = jnp.exp(shift_row(x, m, axes))
        return e / _positive_sum(e, axes)

    return platform_dependent(x, m, tpu=on_tpu, default=core)


@_softmax_beside_tangent.defjvp
def _softmax_beside_tangent_jvp(axes, exact, primals, tangents):
    return _long_softmax_jvp(primals[0], tangents[0], axes, exact)


def _product_with_source(
    v: Array, source: Array, m: Array, top: Array, *, axes: Axes, exact: DTypeLike
) -> Array:
    """H v from the logits on a TPU, and from the probabilities on other platforms."""

    def from_p(v: Array, p: Array, m: Array, top: Array) -> Array:
        return _covariance_product(v, p, top, axes=axes)

    from_x = partial(_product_at, axes=axes, exact=exact)
    return platform_dependent(v, source, m, top, tpu=from_x, default=from_p)


def _first(a: Array, b: Array) -> Array:
    return a


def _second(a: Array, b: Array) -> Array:
    return b


def softmax_tangent(p: Array, v: Array, axes: Axes, top: Array | None = None) -> Array:
    """H v for the Jacobian H = diag(p) - p p^T of softmax, accurate entry by entry.

    Since H 1 = 0, a constant may be subtracted from v. With w = v - v_top, the mean <p, w> is a sum
    over the other entries:

        (H v)_i = p_i (w_i - <p, w>),    (H v)_top = -p_top <p, w>

    If the top entry has nearly all of the probability, this never computes 1 - p_top as a
    difference of nearly equal numbers. H is symmetric, so that forward and reverse mode are the
    same map.

    `top` is the index of the top entry (`place_of_top`), or None if it must be found from p.
    """
    top = place_of_top(p, axes) if top is None else top
    return row_map(_covariance_product, _covariance_product, v, (p, *given(top)), axes)


def tangent_at(x: Array, v: Array, axes: Axes, exact: DTypeLike | None = None) -> Array:
    """`softmax_tangent` at the logits x; `taken` explains `exact`.

    On GPU and TPU the sums of long rows need one pass over x and v: <p, w> = sum(e w) / sum(e) for
    the exponentials e. On a CPU, and if p is known, p takes less time.
    """
    through_probabilities = partial(_through_probabilities, axes=axes)
    if len(axes) != 1 or is_split(x, axes) or rows_fit_a_kernel(x, axes):
        return through_probabilities(v, x)

    def in_one_pass(v: Array, x: Array) -> Array:
        coefficients = (x, *_maximum_and_index(x, axes))
        return row_map(_product_at, _product_at, v, coefficients, axes, exact=exact)

    return platform_dependent(v, x, cpu=through_probabilities, default=in_one_pass)


def _through_probabilities(v: Array, x: Array, axes: Axes) -> Array:
    p, top = softmax_and_top(x, axes)
    return softmax_tangent(p, v, axes, top)


def _product_at(
    v: Array, x: Array, m: Array, top: Array, *, axes: Axes, exact: DTypeLike | None
) -> Array:
    """H v at the logits x, for rows along one axis with maximum m at the index `top`."""
    return _product_at_logits(v, x, m, top, axes, exact)


@partial(custom_jvp, nondiff_argnums=(4, 5))
def _product_at_logits(
    v: Array, x: Array, m: Array, top: Array, axes: Axes, exact: DTypeLike | None
) -> Array:
    e, w = jnp.exp(shift_row(x, m, axes)), relative_to(v, taken(v, top, axes[0], exact))
    whole = _positive_sum(e, axes)
    mean = jnp.sum(jnp.where(e == 0, 0, e * w), axes, keepdims=True) / whole
    return e / whole * (w - mean)


@_product_at_logits.defjvp
def _product_at_logits_jvp(axes, exact, primals, tangents):
    return jax.jvp(partial(_through_probabilities, axes=axes), primals[:2], tangents[:2])


def _maximum_and_index(x: Array, axes: Axes) -> tuple[Array, Array]:
    """The result of `maximum` and the index of a maximal entry, along one axis."""
    axis, x = axes[0], lax.stop_gradient(x)

    def in_one_pass(x: Array) -> tuple[Array, Array]:
        return maximum_and_value(x, lax.broadcasted_iota(jnp.uint32, x.shape, axis), axis)

    def plain(x: Array) -> tuple[Array, Array]:
        m = maximum(x, axes)
        return m, index_of_maximum(x, m, axis).astype(jnp.uint32)

    return platform_dependent(x, tpu=in_one_pass, default=plain)


def _covariance_product(v: Array, p: Array, top: Array | None = None, *, axes: Axes) -> Array:
    v_top = origin(v, p, top, axes)
    return p * (relative_to(v, v_top) - weighted_sum(p, v, v_top, axes))


def place_of_top(x: Array, axes: Axes) -> Array | None:
    """The index of a maximal entry; None over several axes or devices, where none is needed."""
    if len(axes) != 1 or is_split(x, axes):
        return None
    x = lax.stop_gradient(x)
    return index_of_maximum(x, maximum(x, axes), axes[0])


def given(top: Array | None) -> tuple[Array, ...]:
    return () if top is None else (top,)


def at_top(v: Array, p: Array, top: Array | None, axes: Axes) -> Array:
    """v at the top entry. Without its index: v where p > 1/2, and 0 if no entry dominates."""
    if top is not None:
        return taken(v, top, axes[0])
    return jnp.sum(jnp.where(p > 0.5, v, 0), axes, keepdims=True)


def origin(v: Array, p: Array, top: Array | None, axes: Axes) -> Array:
    """The result of `at_top`; where p has several maxima, v at any of them."""
    return at_top(v, p, top, axes) if top is None else _at_largest(v, p, top, axes)


@partial(custom_jvp, nondiff_argnums=(3,))
def _at_largest(v: Array, p: Array, top: Array, axes: Axes) -> Array:
    def by_index(v: Array, p: Array, top: Array) -> Array:
        return at_top(v, p, top, axes)

    def on_tpu(v: Array, p: Array, top: Array) -> Array:
        # This needs no index, which takes a TPU another pass.
        return maximum_and_value(p, v, axes[0])[1]

    return platform_dependent(v, p, top, cpu=by_index, cuda=by_index, rocm=by_index, default=on_tpu)


@_at_largest.defjvp
def _at_largest_jvp(axes, primals, tangents):
    v, p, top = primals
    return _at_largest(v, p, top, axes), at_top(tangents[0], p, top, axes)


def is_empty(p: Array, axes: Axes) -> Array:
    """Whether a row is empty: all its classes are -inf or masked, or it has no classes."""
    return jnp.all(p == 0, axes, keepdims=True)


def relative_to_dominant(dominant: Array, x_dot: Array, axes: Axes) -> Array:
    """x_dot minus x_dot of the dominant entry, if there is one; exactly 0 at that entry."""
    reference = jnp.sum(jnp.where(dominant, x_dot, 0), axes, keepdims=True)
    return jnp.where(dominant, 0, x_dot - reference)
