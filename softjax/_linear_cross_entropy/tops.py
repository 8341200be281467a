"""The largest logit of each row, and the sum of all other exponentials relative to it.

With m = max x and d = (x - m) / T, the excess is r = sum_k exp(d_k) - 1. The 1 is the term of one
maximal entry, which is left out of the sum, so that it causes no rounding: log sum_k exp(x_k / T) =
m / T + log1p(r).
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from softjax._cpu_sums import Pair, sums_of_tiles, terms_beside_top
from softjax._numerics import maximum
from softjax._platforms import platform_dependent
from softjax._reductions import behind_barrier_on_cpu, shift


@jax.custom_jvp
def top_and_excess(x: Array, temperature: Array | None) -> tuple[Array, Array]:
    """m = max x and the excess r of x / T, for each row.

    The tangent of m is the tangent of one maximal entry, and the tangent of r is relative to it:
    r_dot = sum_k exp(d_k) d_dot_k, which does not cancel in a row that one entry dominates.
    """
    operands = (x,) if temperature is None else (x, temperature)
    return platform_dependent(*operands, cpu=_in_two_passes, default=_in_one_pass)


@top_and_excess.defjvp
def _top_and_excess_jvp(primals, tangents):
    x, temperature = primals
    top, r = top_and_excess(x, temperature)
    if x.shape[1] == 0:  # no entry is maximal
        return (top, r), (jnp.zeros_like(top), jnp.zeros_like(r))
    at = jnp.argmax(x, -1)[:, None]
    top_dot = jnp.take_along_axis(tangents[0], at, -1, mode="promise_in_bounds")

    def exponentials(x, temperature, top):
        return jnp.exp(distance(x, top, temperature))

    _, e_dot = jax.jvp(exponentials, (x, temperature, top[:, None]), (*tangents, top_dot))
    return (top, r), (top_dot[:, 0], jnp.sum(e_dot, -1))


def _in_two_passes(x: Array, temperature: Array | None = None) -> tuple[Array, Array]:
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


def _in_one_pass(x: Array, temperature: Array | None = None) -> tuple[Array, Array]:
    """Both results for parts of a row, which are merged, so that the logits are read once.

    An entry is a part whose excess is 0, or NaN if the entry is NaN. The empty part has the excess
    -1. A reduction can use no arrays but its operands. T is therefore the third number of each
    part; the empty part has +inf there.
    """

    def merged(a: list[Array], b: list[Array]) -> list[Array]:
        first, t = a[0] >= b[0], jnp.minimum(a[2], b[2])
        top, low_top = jnp.where(first, a[0], b[0]), jnp.where(first, b[0], a[0])
        r, low_r = jnp.where(first, a[1], b[1]), jnp.where(first, b[1], a[1])
        d = jnp.where(low_top < top, low_top - top, 0) / t
        return [top, r + (1 + low_r) * jnp.where(low_top == -jnp.inf, 0, jnp.exp(d)), t]

    t = jnp.ones((), x.dtype) if temperature is None else temperature
    entries = [x, jnp.where(jnp.isnan(x), x, 0), jnp.broadcast_to(t, x.shape)]
    nothing = [jnp.full((), a, x.dtype) for a in (jnp.finfo(x.dtype).min, -1, jnp.inf)]
    top, r, _ = lax.reduce(entries, nothing, merged, (1,))
    return top, r


def distance(x: Array, top: Array, temperature: Array | None) -> Array:
    """d = (x - max x) / T; -inf stays -inf for every T."""
    d = shift(x, top)
    if temperature is None:
        return d
    empty = jnp.isneginf(d)
    return jnp.where(empty, d, jnp.where(empty, 0, d) / temperature)
