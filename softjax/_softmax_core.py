"""softmax and log_softmax of arrays in the dtype of the computation, with their derivatives."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from softjax._cpu_sums import exponentials_alone, sums_in_tiles
from softjax._numerics import (
    excess,
    excess_and_exponentials,
    log_total,
    maximum,
    not_negative,
    stored_maximum,
    total,
)
from softjax._one_pass import maximum_and_value
from softjax._platforms import platform_dependent
from softjax._reductions import (
    Axes,
    are_long,
    behind_barrier_on_cpu,
    in_one_pass_if_long,
    index_of_maximum,
    is_place,
    plain_sums,
    relative_to,
    rows_fit_a_kernel,
    shift_row,
    sum_and_rest,
    sums_are_written_out,
    taken,
    weighted_sum,
)
from softjax._row_maps import row_map
from softjax._sharding import is_split, shards


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
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
        m = stored_maximum(x, axes)
        e = lax.optimization_barrier(jnp.exp(shift_row(x, m, axes)))
        (whole,) = sums_in_tiles(e, m, axes, exponentials_alone)
        return e / (whole + (tiny + 0 * m))  # the second use of m keeps it out of other loops

    # XLA:CPU adds the entries of a row in an order that depends on the number of rows. With tiles
    # the sum of a row does not depend on the other rows, but a short row takes half as long again.
    # If the classes are sharded, the devices send one sum instead of two.
    is_plain = sums_are_written_out(x, axes) or math.prod(shards(x, axes)) > 1
    on_cpu = short_on_cpu if is_plain else in_tiles
    on_gpu = short if rows_fit_a_kernel(x, axes) else plain
    return platform_dependent(x, cpu=on_cpu, cuda=on_gpu, rocm=on_gpu, default=plain)


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
    p = softmax_core(x, axes)
    row = x
    if rows_fit_a_kernel(x, axes):
        # A kernel of a GPU that holds whole rows of p need not read x again.
        row = platform_dependent(x, p, cuda=_second, rocm=_second, default=_first)
    return p, softmax_tangent(p, x_dot, axes, place_of_top(row, axes))


def _long_softmax_jvp(x: Array, x_dot: Array, axes: Axes, exact: DTypeLike) -> tuple[Array, Array]:
    """The derivative rule for long rows, which a TPU computes from x in the fewest passes."""
    m, top = _maximum_and_index(x, axes)
    p = _softmax_beside_tangent(x, m, axes, exact)
    source = platform_dependent(x, p, tpu=_first, default=_second)
    product, coefficients = _product_with_source, (source, m, top)
    return p, row_map(product, product, x_dot, coefficients, axes, exact=exact)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
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
    return row_map(_covariance_product, _covariance_product, v, (p, *_given(top)), axes)


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
    return softmax_tangent(softmax_core(x, axes), v, axes, place_of_top(x, axes))


@partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def _product_at(
    v: Array, x: Array, m: Array, top: Array, axes: Axes, exact: DTypeLike | None
) -> Array:
    """H v at the logits x, for rows along one axis with maximum m at the index `top`."""
    e, w = jnp.exp(shift_row(x, m, axes)), relative_to(v, taken(v, top, axes[0], exact))
    whole = _positive_sum(e, axes)
    mean = jnp.sum(jnp.where(e == 0, 0, e * w), axes, keepdims=True) / whole
    return e / whole * (w - mean)


@_product_at.defjvp
def _product_at_jvp(axes, exact, primals, tangents):
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
    at_top = _origin(v, p, top, axes)
    return p * (relative_to(v, at_top) - weighted_sum(p, v, at_top, axes))


def place_of_top(x: Array, axes: Axes) -> Array | None:
    """The index of a maximal entry; None over several axes or devices, where none is needed."""
    if len(axes) != 1 or is_split(x, axes):
        return None
    x = lax.stop_gradient(x)
    return index_of_maximum(x, maximum(x, axes), axes[0])


def _given(top: Array | None) -> tuple[Array, ...]:
    return () if top is None else (top,)


def _at_top(v: Array, p: Array, top: Array | None, axes: Axes) -> Array:
    """v at the top entry. Without its index: v where p > 1/2, and 0 if no entry dominates."""
    if top is not None:
        return taken(v, top, axes[0])
    return jnp.sum(jnp.where(p > 0.5, v, 0), axes, keepdims=True)


def _origin(v: Array, p: Array, top: Array | None, axes: Axes) -> Array:
    """The result of `_at_top`; where p has several maxima, v at any of them."""
    return _at_top(v, p, top, axes) if top is None else _at_largest(v, p, top, axes)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _at_largest(v: Array, p: Array, top: Array, axes: Axes) -> Array:
    def by_index(v: Array, p: Array, top: Array) -> Array:
        return _at_top(v, p, top, axes)

    def on_tpu(v: Array, p: Array, top: Array) -> Array:
        # This needs no index, which takes a TPU another pass.
        return maximum_and_value(p, v, axes[0])[1]

    return platform_dependent(v, p, top, cpu=by_index, cuda=by_index, rocm=by_index, default=on_tpu)


@_at_largest.defjvp
def _at_largest_jvp(axes, primals, tangents):
    v, p, top = primals
    return _at_largest(v, p, top, axes), _at_top(tangents[0], p, top, axes)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def log_softmax_core(x: Array, axes: Axes) -> Array:
    """(x - m) - log1p(r)."""

    def on_cpu(x: Array) -> Array:
        m, r = excess(x, axes)
        return shift_row(x, m, axes) - behind_barrier_on_cpu(log_total(m, r))

    def plain(x: Array) -> Array:
        return _logarithms_and_probabilities(x, axes)[0]

    return platform_dependent(x, cpu=on_cpu, default=plain)


@log_softmax_core.defjvp
def _log_softmax_jvp(axes, primals, tangents):
    return jax.jvp(lambda x: _logarithms_and_probabilities(x, axes)[0], primals, tangents)


def probabilities(x: Array, axes: Axes) -> tuple[Array, Array, Array]:
    """p = softmax(x); the share r / (1 + r) of all entries but one maximal entry; the sum of p.

    The share is 1 - p at the top, computed without a difference. The sum is 1, or 0 in an empty
    row, in which all classes are -inf or masked, or which has no classes. Both keep the axes.
    """
    _, p, rest, mass = _logarithms_and_probabilities(x, axes)
    return p, rest, mass


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _logarithms_and_probabilities(x: Array, axes: Axes) -> tuple[Array, Array, Array, Array]:
    """log softmax(x), and the results of `probabilities`, from the same sums."""

    def parts(d: Array, e: Array, r: Array) -> tuple[Array, Array, Array, Array]:
        others = not_negative(r)
        whole = 1 + others
        mass = jnp.where(r < 0, 0, 1).astype(r.dtype)
        logarithm = behind_barrier_on_cpu(jnp.log1p(others))
        return d - logarithm, e / whole, others * (1 / whole), mass

    def with_excess(x: Array) -> tuple[Array, Array, Array, Array]:
        m, r, e = excess_and_exponentials(x, axes)
        return parts(shift_row(x, m, axes), e, r + 0 * m)  # NaN beside +inf

    def plain(x: Array) -> tuple[Array, Array, Array, Array]:
        d = shift_row(x, maximum(x, axes), axes)  # NaN beside +inf
        rest, tops = plain_sums(d, axes)
        return parts(d, jnp.exp(d), rest + (tops - 1))

    def off_cpu(x: Array) -> tuple[Array, Array, Array, Array]:
        return in_one_pass_if_long(x, axes, with_excess, plain)

    return platform_dependent(x, cpu=with_excess, default=off_cpu)


@_logarithms_and_probabilities.defjvp
def _logarithms_and_probabilities_jvp(axes, primals, tangents):
    (x,), (x_dot,) = primals, tangents
    y, p, rest, mass = _logarithms_and_probabilities(x, axes)
    top = place_of_top(x, axes)
    coefficients = (p, rest, mass, *_given(top))
    y_dot = row_map(_centred, _centred_transposed, x_dot, coefficients, axes)
    p_dot = softmax_tangent(p, x_dot, axes, top)
    rest_dot = -_at_top(p_dot, p, top, axes)
    return (y, p, rest, mass), (y_dot, p_dot, rest_dot, jnp.zeros_like(mass))


def _centred(
    v: Array, p: Array, rest: Array, mass: Array, top: Array | None = None, *, axes: Axes
) -> Array:
    """v - <p, v>, the tangent of log_softmax; 0 in an empty row."""
    at_top = _origin(v, p, top, axes)
    return jnp.where(mass == 0, 0, relative_to(v, at_top) - weighted_sum(p, v, at_top, axes))


def _centred_transposed(
    v: Array, p: Array, rest: Array, mass: Array, top: Array | None = None, *, axes: Axes
) -> Array:
    """v - p sum(v); at a dominant entry computed as (1 - p) sum(v) minus the sum of the other v."""

    def by_place(p: Array, rest: Array, top: Array) -> Array:
        # XLA:GPU would compute p from x once more for the sums.
        return is_place(top, p, axes[0]) & (rest < 0.5)

    def by_size(p: Array, *others: Array) -> Array:
        return p > 0.5

    if top is None:
        dominates = by_size(p)
    else:
        dominates = platform_dependent(p, rest, top, cuda=by_place, rocm=by_place, default=by_size)
    whole, others = sum_and_rest(v, dominates, axes)
    return jnp.where(mass == 0, 0, jnp.where(dominates, rest * whole - others, v - p * whole))


@jax.custom_jvp
def softmax_and_complement(x: Array) -> tuple[Array, Array]:
    """p = softmax(x) over the last axis, and 1 - p.

    An entry with p > 1/2 is the only maximal one, and its 1 - p is the share r / (1 + r) of all
    others. For other entries the difference 1 - p is accurate.
    """
    p, rest, _ = probabilities(x, (x.ndim - 1,))
    return p, jnp.where(p > 0.5, rest, 1 - p)


@softmax_and_complement.defjvp
def _softmax_and_complement_jvp(primals, tangents):
    (x,), (x_dot,) = primals, tangents
    axes = (x.ndim - 1,)
    p, complement = softmax_and_complement(x)
    p_dot = softmax_tangent(p, x_dot, axes, place_of_top(x, axes))
    return (p, complement), (p_dot, -p_dot)


def is_empty(p: Array, axes: Axes) -> Array:
    """Whether a row is empty: all its classes are -inf or masked, or it has no classes."""
    return jnp.all(p == 0, axes, keepdims=True)


def relative_to_dominant(dominant: Array, x_dot: Array, axes: Axes) -> Array:
    """x_dot minus x_dot of the dominant entry, if there is one; exactly 0 at that entry."""
    reference = jnp.sum(jnp.where(dominant, x_dot, 0), axes, keepdims=True)
    return jnp.where(dominant, 0, x_dot - reference)
