"""The largest logit of each row, and the sum of all other exponentials relative to it.

With m = max x and d = (x - m) / T, the excess is r = sum_k exp(d_k) - 1. The 1 is the term of one
maximal entry, which is left out of the sum, so that it causes no rounding: log sum_k exp(x_k / T) =
m / T + log1p(r).
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from softjax._cpu_sums import Pair, sums_of_tiles, terms_beside_top
from softjax._custom_jvp import custom_jvp
from softjax._numerics import maximum
from softjax._platforms import platform_dependent
from softjax._reductions import behind_barrier_on_cpu, shift
from softjax._sharding import taken_along

Sum = tuple[Array, Array]  # the top and the excess of each row


@custom_jvp
def top_and_excess(x: Array, temperature: Array | None) -> Sum:
    """m = max x and the excess r of x / T, for each row.

    The tangent of m is the tangent of one maximal entry, and the tangent of r is relative to it:
    r_dot = sum_k exp(d_k) d_dot_k, which does not cancel in a row that one entry dominates.
    """
    operands = (x,) if temperature is None else (x, temperature)
    return platform_dependent(*operands, cpu=_in_two_passes, default=_in_one_pass)


@top_and_excess.defjvp
def _top_and_excess_jvp(primals, tangents):
    (x, temperature), (x_dot, temperature_dot) = primals, tangents
    top, r = top_and_excess(x, temperature)
    return (top, r), _slope(x, temperature, top, x_dot, temperature_dot)


@custom_jvp
def tops_and_gap(x: Array, y: Array, temperature: Array | None) -> tuple[Sum, Sum, Array]:
    """`top_and_excess` of two heads, and r_x - r_y, which keeps its digits between close heads.

    It is the sum of the differences of the exponentials, each relative to the top of its head.
    """
    operands = (x, y) if temperature is None else (x, y, temperature)
    return platform_dependent(*operands, cpu=_two_in_two_passes, default=_two_in_one_pass)


@tops_and_gap.defjvp
def _tops_and_gap_jvp(primals, tangents):
    (x, y, temperature), (x_dot, y_dot, temperature_dot) = primals, tangents
    of_x, of_y, gap = tops_and_gap(*primals)
    of_x_dot = _slope(x, temperature, of_x[0], x_dot, temperature_dot)
    of_y_dot = _slope(y, temperature, of_y[0], y_dot, temperature_dot)
    return (of_x, of_y, gap), (of_x_dot, of_y_dot, of_x_dot[1] - of_y_dot[1])


def _slope(
    x: Array, temperature: Array | None, top: Array, x_dot: Array, temperature_dot: Array | None
) -> Sum:
    """The tangents of m and r."""
    if x.shape[1] == 0:  # no entry is maximal
        return jnp.zeros_like(top), jnp.zeros_like(top)
    at = jnp.argmax(x, -1)[:, None]
    top_dot = taken_along(x_dot, at, -1, "promise_in_bounds")

    def exponentials(x, temperature, top):
        return jnp.exp(distance(x, top, temperature))

    tangents = x_dot, temperature_dot, top_dot
    _, e_dot = jax.jvp(exponentials, (x, temperature, top[:, None]), tangents)
    return top_dot[:, 0], jnp.sum(e_dot, -1)


def difference(e_x: Array, e_y: Array, delta: Array) -> Array:
    """e_x - e_y with all its digits, for two exponentials whose logarithms differ by delta."""
    near = jnp.abs(delta) < 0.5
    return jnp.where(near, e_y * jnp.expm1(jnp.where(near, delta, 0)), e_x - e_y)


def _two_in_two_passes(
    x: Array, y: Array, temperature: Array | None = None
) -> tuple[Sum, Sum, Array]:
    of_x, of_y = (_in_two_passes(a, temperature) for a in (x, y))
    d_x, d_y = (distance(a, m[:, None], temperature) for a, (m, _) in ((x, of_x), (y, of_y)))
    return of_x, of_y, jnp.sum(difference(jnp.exp(d_x), jnp.exp(d_y), d_x - d_y), -1)


def _in_two_passes(x: Array, temperature: Array | None = None) -> Sum:
    """The maximum, and then the sum of the exponentials of all other entries."""
    top = behind_barrier_on_cpu(maximum(x, (1,)))

    def terms(part: slice) -> Pair:
        if temperature is None:
            rest, is_top = terms_beside_top(x[:, part], top)
        else:
            d = distance(x[:, part], top, temperature)
            rest, is_top = terms_beside_top(d, jnp.zeros_like(top))
        return rest, is_top.astype(rest.dtype)

    rest, tops = sums_of_tiles(terms, x.shape[1], 1, last=True, in_any_order=True)
    return top[:, 0], rest + (tops - 1)


def _in_one_pass(x: Array, temperature: Array | None = None) -> Sum:
    """Both results for parts of a row, which are merged, so that the logits are read once.

    An entry is a part whose excess is 0, or NaN if the entry is NaN. The empty part has the excess
    -1. A reduction can use no arrays but its operands. T is therefore the third number of each
    part; the empty part has +inf there.
    """

    def merged(a: list[Array], b: list[Array]) -> list[Array]:
        t = jnp.minimum(a[2], b[2])
        return [*_joined(a[:2], b[:2], t)[0], t]

    t = jnp.ones((), x.dtype) if temperature is None else temperature
    entries = [x, jnp.where(jnp.isnan(x), x, 0), jnp.broadcast_to(t, x.shape)]
    nothing = [jnp.full((), a, x.dtype) for a in (jnp.finfo(x.dtype).min, -1, jnp.inf)]
    top, r, _ = lax.reduce(entries, nothing, merged, (1,))
    return top, r


def _two_in_one_pass(
    x: Array, y: Array, temperature: Array | None = None
) -> tuple[Sum, Sum, Array]:
    """As `_in_one_pass`, with the gap r_x - r_y of each part.

    Relative to the tops of both parts together, whose exponentials are e_x and e_y here, it is

        (1 + r_x) e_x - (1 + r_y) e_y = (1 + r_x) (e_x - e_y) + (r_x - r_y) e_y
    """

    def merged(a: list[Array], b: list[Array]) -> list[Array]:
        t, gap = jnp.minimum(a[5], b[5]), jnp.zeros_like(a[4])
        of_x, shares_x = _joined(a[:2], b[:2], t)
        of_y, shares_y = _joined(a[2:4], b[2:4], t)
        for part, (d_x, e_x), (d_y, e_y) in zip((a, b), shares_x, shares_y, strict=True):
            gap += (1 + part[1]) * difference(e_x, e_y, d_x - d_y) + part[4] * e_y
        return [*of_x, *of_y, gap, t]

    t = jnp.ones((), x.dtype) if temperature is None else temperature
    spoiled = [jnp.where(jnp.isnan(a), a, 0) for a in (x, y)]
    entries = [x, spoiled[0], y, spoiled[1], jnp.zeros_like(x), jnp.broadcast_to(t, x.shape)]
    lowest = jnp.finfo(x.dtype).min
    nothing = [jnp.full((), a, x.dtype) for a in (lowest, -1, lowest, -1, 0, jnp.inf)]
    m_x, r_x, m_y, r_y, gap, _ = lax.reduce(entries, nothing, merged, (1,))
    return (m_x, r_x), (m_y, r_y), gap


def _joined(
    a: list[Array], b: list[Array], t: Array
) -> tuple[list[Array], tuple[tuple[Array, Array], tuple[Array, Array]]]:
    """The top and excess of two parts (m, r) together, and d and e^d of the top of each part."""
    first = a[0] >= b[0]
    top, low_top = jnp.where(first, a[0], b[0]), jnp.where(first, b[0], a[0])
    r, low_r = jnp.where(first, a[1], b[1]), jnp.where(first, b[1], a[1])
    d = jnp.where(low_top < top, low_top - top, 0) / t
    e = jnp.where(low_top == -jnp.inf, 0, jnp.exp(d))
    of_a = jnp.where(first, 0, d), jnp.where(first, 1, e)
    of_b = jnp.where(first, d, 0), jnp.where(first, e, 1)
    return [top, r + (1 + low_r) * e], (of_a, of_b)


def distance(x: Array, top: Array, temperature: Array | None) -> Array:
    """d = (x - max x) / T; -inf stays -inf for every T."""
    d = shift(x, top)
    if temperature is None:
        return d
    empty = jnp.isneginf(d)
    return jnp.where(empty, d, jnp.where(empty, 0, d) / temperature)
