"""log_softmax of arrays in the dtype of the computation, and what shares its sums.

With d = x - m for m = max x, and the excess r: log softmax(x) = d - log1p(r).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from softjax._custom_jvp import custom_jvp
from softjax._numerics import (
    excess,
    excess_and_exponentials,
    log_total,
    maximum,
    not_negative,
)
from softjax._platforms import platform_dependent
from softjax._reductions import (
    Axes,
    behind_barrier_on_cpu,
    in_one_pass_if_long,
    is_place,
    plain_sums,
    relative_to,
    shift_row,
    sum_and_rest,
    weighted_sum,
)
from softjax._row_maps import row_map
from softjax._softmax_core import at_top, given, origin, place_of_top, softmax_tangent


@partial(custom_jvp, nondiff_argnums=(1,))
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


@partial(custom_jvp, nondiff_argnums=(1,))
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
    coefficients = (p, rest, mass, *given(top))
    y_dot = row_map(_centred, _centred_transposed, x_dot, coefficients, axes)
    p_dot = softmax_tangent(p, x_dot, axes, top)
    rest_dot = -at_top(p_dot, p, top, axes)
    return (y, p, rest, mass), (y_dot, p_dot, rest_dot, jnp.zeros_like(mass))


def _centred(
    v: Array, p: Array, rest: Array, mass: Array, top: Array | None = None, *, axes: Axes
) -> Array:
    """v - <p, v>, the tangent of log_softmax; 0 in an empty row."""
    v_top = origin(v, p, top, axes)
    return jnp.where(mass == 0, 0, relative_to(v, v_top) - weighted_sum(p, v, v_top, axes))


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


@custom_jvp
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
