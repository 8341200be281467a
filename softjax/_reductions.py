"""Reductions of rows, in the form that compiles best on each backend; the results are the same.

The mathematics is in `_numerics`. It needs x - max x, the sums over a row without its maximal
entries, and the index of a maximal entry. On GPU and TPU the plain expressions compile into the
smallest possible number of passes over the memory. XLA:CPU needs other forms, which `_cpu_sums`
defines, and which are lowered for the CPU alone.

Comments about XLA:CPU are true for jaxlib 0.10 to 0.12. Comments about XLA:GPU and TPUs describe
programs that jaxlib 0.10 compiled for an H100 and a v5e (`python -m benchmarks aot`).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from softjax._cpu_sums import (
    FEW,
    UNROLLED,
    Axes,
    Pair,
    Sums,
    Terms,
    by_shard,
    has_long_vectors,
    over_shards,
    place_in_tiles,
    sums_in_tiles,
    sums_of_tiles,
    terms_of_exponentials,
)
from softjax._custom_jvp import custom_jvp
from softjax._one_pass import ROW_OF_ONE_KERNEL, has_blocks, sums_by_blocks
from softjax._platforms import platform_dependent
from softjax._sharding import is_split, shards, taken_along


def above_minus_infinity(x: Array) -> Array:
    """x with the lowest finite number in place of -inf."""
    return jnp.maximum(x, jnp.finfo(x.dtype).min)


@custom_jvp
def shift(x: Array, m: Array) -> Array:
    """x - m for m = max x: exactly 0 at a maximal entry and never above 0; NaN at NaN and +inf.

    If x is a product, a compiler may contract x - m into one multiply-add, in which the product is
    not rounded as it was for m. The maximal entry would then not be 0: a confident row of
    logits * scale would lose its digits, and the exponential of a logit of 2e10 would be infinite.
    min(m, x) equals x and is not contracted with the difference. Within a sum, compilers compute a
    minimum, but may store the results of a `where`.
    """
    # The order matters: if one argument is NaN, XLA:CPU returns the second as the minimum.
    return jnp.minimum(m, x) - m


@shift.defjvp
def _shift_jvp(primals, tangents):
    x_dot, m_dot = tangents
    return shift(*primals), x_dot - m_dot  # also where x and m are equal


@custom_jvp
def relative_to(x: Array, origin: Array) -> Array:
    """x - origin for an entry `origin` of x, which need not be the largest: exactly 0 there.

    As in `shift`, a compiler could contract the difference with a product in x. A barrier does not
    prevent that, since XLA:CPU of jaxlib 0.10 removes barriers before it fuses operations. The
    choice between x and an origin that is equal to x changes no value, but it separates product and
    difference.
    """
    return jnp.where(x != origin, x, origin) - origin


@relative_to.defjvp
def _relative_to_jvp(primals, tangents):
    x_dot, origin_dot = tangents
    return relative_to(*primals), x_dot - origin_dot  # also where x and origin are tied


def shift_row(x: Array, m: Array, axes: Axes) -> Array:
    """`shift` of whole rows, whose exponentials will be summed over `axes`."""

    def in_one_kernel(x: Array, m: Array) -> Array:
        # XLA:GPU keeps a row in one kernel if each maximum is subtracted once and has no other use.
        # So the maximum of min(x, m), which is m again, is computed.
        x = jnp.minimum(x, m)
        return x - jnp.max(x, axes, keepdims=True, initial=jnp.finfo(x.dtype).min)

    if not rows_fit_a_kernel(x, axes):
        return shift(x, m)
    return platform_dependent(x, m, cuda=in_one_kernel, rocm=in_one_kernel, default=shift)


def rows_fit_a_kernel(x: Array, axes: Axes) -> bool:
    """Whether one kernel of a GPU processes whole rows."""
    return _rows_are_at_most(ROW_OF_ONE_KERNEL, x, axes)


def are_long(x: Array, axes: Axes) -> bool:
    """Whether rows are known to be longer than those of one kernel, and not split over devices."""
    is_known = all(isinstance(x.shape[axis], int) for axis in axes)
    return is_known and not (rows_fit_a_kernel(x, axes) or is_split(x, axes))


def in_one_pass_if_long(x: Array, axes: Axes, one: Callable, two: Callable) -> Any:
    """one(x) for long rows on GPU and TPU, and otherwise two(x).

    A kernel of a GPU reads a short row once in any form, and a TPU can keep short rows in its fast
    memory. Mosaic, which compiles the kernels of Pallas for a TPU, has no reductions of pairs.
    """
    if not are_long(x, axes):
        return two(x)
    return platform_dependent(x, cpu=two, mosaic=two, default=one)


def sums_are_written_out(x: Array, axes: Axes) -> bool:
    """Whether rows are so short that XLA:CPU unrolls their sums."""
    return _rows_are_at_most(UNROLLED, x, axes)


def _rows_are_at_most(length: int, x: Array, axes: Axes) -> bool:
    """Whether rows over `axes` have at most this length; False if the length is a symbol."""
    sizes = [x.shape[axis] for axis in axes]
    return all(isinstance(n, int) for n in sizes) and math.prod(sizes) <= length


def sums_beside_top(x: Array, m: Array, axes: Axes) -> Pair:
    """The sum of exp(x - m) without maximal entries, and the number of these; `axes` are kept.

    An entry of +inf is maximal. If an entry is NaN, the first result is NaN.
    """

    def plain(x: Array, m: Array) -> Pair:
        return _finite(m, plain_sums(shift_row(x, m, axes), axes))

    on_cpu = partial(sums_in_tiles, axes=axes, inlined=True)
    return platform_dependent(x, m, cpu=on_cpu, default=plain)


def exponentials_and_sums(x: Array, m: Array, axes: Axes) -> tuple[Array, Sums]:
    """exp(x - m), and the sums of `sums_beside_top`, for callers that need both.

    If an entry is +inf, the exponentials are meaningless.
    """

    def on_cpu(x: Array, m: Array) -> tuple[Array, Sums]:
        e, rest, tops = stored_exponentials(x, m, axes, terms_of_exponentials)
        return e, (rest, tops)

    def plain(x: Array, m: Array) -> tuple[Array, Sums]:
        d = shift_row(x, m, axes)
        return jnp.exp(d), _finite(m, plain_sums(d, axes))

    return platform_dependent(x, m, cpu=on_cpu, default=plain)


def stored_exponentials(
    x: Array, m: Array, axes: Axes, terms: Terms, has_place: bool = False, inlined: bool = False
) -> Sums:
    """exp(x - m), and the sums of `terms` of it as in `sums_in_tiles`, on a CPU.

    XLA:CPU would compute each exponential twice; here it writes them to memory instead.
    """
    d = shift_row(x, jnp.minimum(m, jnp.finfo(m.dtype).max), axes)
    e = lax.optimization_barrier(jnp.exp(d))
    return e, *sums_in_tiles(e, jnp.ones_like(m), axes, terms, has_place, inlined)


def plain_sums(d: Array, axes: Axes) -> Pair:
    """The sums of `sums_beside_top` from d = x - m, for GPU and TPU; NaN if an entry is +inf."""
    is_top = d == 0
    rest = jnp.sum(jnp.where(is_top, 0, jnp.exp(d)), axes, keepdims=True)
    return rest, jnp.sum(is_top.astype(d.dtype), axes, keepdims=True)


def _finite(m: Array, sums: Pair) -> Pair:
    """`plain_sums`; for a row with +inf, the result for one maximal entry and no others."""
    rest, tops = sums
    return jnp.where(m == jnp.inf, 0, rest), jnp.where(m == jnp.inf, 1, tops)


def sums_beside_label(x: Array, m: Array, index: Array) -> Pair:
    """x - m at the class `index` of the last axis, and the sum of exp(x - m) over the others.

    The last axis is kept, and `index` has it too, with size 1. With sharded classes this takes two
    sums and a maximum between devices; `sums_beside_top` and a look-up would take three sums.
    """
    axes = (x.ndim - 1,)

    def plain(x: Array, m: Array, index: Array) -> Pair:
        d, is_label = shift_row(x, m, axes), is_place(index, x, x.ndim - 1)
        at_label = jnp.sum(jnp.where(is_label, d, 0), axes, keepdims=True)
        return at_label, jnp.sum(jnp.where(is_label, 0, jnp.exp(d)), axes, keepdims=True)

    return platform_dependent(x, m, index, cpu=_beside_label_on_cpu, default=plain)


def _beside_label_on_cpu(x: Array, m: Array, index: Array) -> Sums:
    """`sums_beside_label`, computed over tiles of the part on each device."""
    axes = (x.ndim - 1,)
    counts = shards(x, axes)
    is_label = is_place(index, x, x.ndim - 1)
    rows, labels = (by_shard(a, axes, counts) for a in (x, is_label))
    top = by_shard(m, axes, (1,))

    def terms(part: slice) -> Pair:
        d, is_label = shift(rows[..., part], top), labels[..., part]
        return jnp.where(is_label, d, 0), jnp.where(is_label, 0, jnp.exp(d))

    return over_shards(sums_of_tiles(terms, rows.shape[-1], rows.ndim - 1, last=True), axes)


def weighted_sum(p: Array, v: Array, origin: Array, axes: Axes) -> Array:
    """sum p w of w = v - origin over `axes`, which are kept, with 0 w = 0, for probabilities p.

    A class of probability 0 has no tangent.
    """

    def terms(p: Array, v: Array) -> Array:
        return jnp.where(p == 0, 0, p * relative_to(v, origin))

    # XLA:CPU of jaxlib 0.10 computes p (v - sum(p v)) wrongly if p is the same for a batch of v, as
    # in a Jacobian, unless the sum is behind a barrier.
    return behind_barrier_on_cpu(sum_of_terms(terms, (p, v), axes))


def sum_of_terms(terms: Callable[..., Array], operands: Sums, axes: Axes) -> Array:
    """The sum over `axes`, which are kept, of `terms`, which are computed entry by entry.

    On a CPU it is summed in tiles, since a library would first store the terms.
    """

    def plain(*operands: Array) -> Array:
        return jnp.sum(terms(*operands), axes, keepdims=True)

    def in_tiles(*operands: Array) -> Array:
        return _in_tiles(lambda *parts: (terms(*parts),), operands, axes[0], UNROLLED)[0]

    has_tiles = _has_tiles(operands[0].shape, axes) and _on_no_mesh(*operands)
    return platform_dependent(*operands, cpu=in_tiles if has_tiles else plain, default=plain)


def sum_and_rest(v: Array, left_out: Array, axes: Axes) -> Sums:
    """sum v over `axes`, which are kept, and the sum of those v that are not left out."""

    def terms(v: Array, left_out: Array) -> Pair:
        return v, jnp.where(left_out, 0, v)

    return _sums_of_terms(terms, (v, left_out), axes, None)


def mass_and_cost(q: Array, x: Array, m: Array, *left_out: Array) -> Sums:
    """sum q and sum q (m - x) over the last axis, which is kept, with 0 * inf = 0.

    For each mask `left_out` there is one more result: the sum of those q that are not left out.
    """

    def terms(q: Array, x: Array, *left_out: Array) -> Sums:
        cost = jnp.where(q == 0, 0, q * jnp.where(q == 0, 0, -shift(x, m)))
        return q, cost, *(jnp.where(out, 0, q) for out in left_out)

    return _sums_of_terms(terms, (q, x, *left_out), (x.ndim - 1,))


def _sums_of_terms(
    terms: Callable[..., Sums], operands: Sums, axes: Axes, highest: int | None = FEW
) -> Sums:
    """The sums over `axes`, which are kept, of all results of `terms`, computed entry by entry.

    On a CPU the sums over the last axis are trees, whose order of additions depends on the length
    of a row and not on the other rows. Terms of one operation need no limit `highest`.
    """

    def plain(*operands: Array) -> Sums:
        return tuple(jnp.sum(term, axes, keepdims=True) for term in terms(*operands))

    def in_tiles(*operands: Array) -> Sums:
        return _in_tiles(terms, operands, axes[0], highest)

    def by_blocks(*operands: Array) -> Sums:
        return sums_by_blocks(terms(*operands))

    on_cpu = in_tiles if _has_tiles(operands[0].shape, axes) and _on_no_mesh(*operands) else plain
    on_gpu = by_blocks if has_blocks(operands[0], axes) and _on_no_mesh(*operands) else plain
    return platform_dependent(*operands, cpu=on_cpu, cuda=on_gpu, rocm=on_gpu, default=plain)


def _in_tiles(
    terms: Callable[..., Sums], operands: Sums, axis: int, highest: int | None = FEW
) -> Sums:
    """The sums of all results of `terms` over an axis, which is kept, in the form for XLA:CPU."""

    def of_part(part: slice) -> Sums:
        return terms(*(lax.slice_in_dim(a, part.start, part.stop, axis=axis) for a in operands))

    last = axis == operands[0].ndim - 1
    sums = sums_of_tiles(of_part, operands[0].shape[axis], axis, last, highest=highest)
    return tuple(jnp.expand_dims(a, axis) for a in sums)


def _has_tiles(shape: tuple[int, ...], axes: Axes) -> bool:
    """Whether a sum over these axes has tiles that XLA:CPU vectorizes."""
    if len(axes) != 1 or not isinstance(shape[axes[0]], int):
        return False
    after = shape[axes[0] + 1 :]
    return not after or has_long_vectors(after)


def _on_no_mesh(*arrays: Array) -> bool:
    """Whether no array is typed with a mesh of devices."""
    return all(jax.typeof(a).sharding.mesh.empty for a in arrays)


def behind_barrier_on_cpu(x: Array) -> Array:
    """x behind a barrier on a CPU.

    As long as the barrier is there, XLA:CPU does not merge the operations that compute x with those
    that use it, such as a maximum of maxima. In jaxlib 0.10 this ends before elementwise operations
    are fused: such an x may be computed again by each operation that uses it.
    """
    return platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)


def index_of_maximum(x: Array, m: Array, axis: int) -> Array:
    """The index of a maximal entry along an axis, which is kept, as int32; with NaN, any index."""

    def by_place(x: Array, m: Array) -> Array:
        place = lax.broadcasted_iota(jnp.int32, x.shape, axis)
        is_top = shift_row(x, m, (axis,)) == 0
        return jnp.max(jnp.where(is_top, place, 0), axis, keepdims=True, initial=0)

    def on_gpu(x: Array, m: Array) -> Array:
        # XLA finds the index in the pass that finds the maximum of the same numbers.
        return jnp.expand_dims(lax.argmax(above_minus_infinity(x), axis, jnp.int32), axis)

    def on_cpu(x: Array, m: Array) -> Array:
        return place_in_tiles(x, lax.optimization_barrier(m), axis)

    # A TPU needs longer to compile `argmax` than for the rest of a program.
    on_gpu = by_place if rows_fit_a_kernel(x, (axis,)) else on_gpu
    return platform_dependent(x, m, cpu=on_cpu, cuda=on_gpu, rocm=on_gpu, default=by_place)


def taken(v: Array, index: Array, axis: int, exact: DTypeLike | None = None) -> Array:
    """v at `index` along an axis, which is kept; both arguments have the same rank.

    `exact` is the dtype of the array from which v was widened, if v is in memory as that array.
    """

    def gathered(v: Array, index: Array) -> Array:
        return taken_along(v, index, axis, "clip")

    def on_cpu(v: Array, index: Array) -> Array:
        return lax.optimization_barrier(gathered(v, index))  # computed once for the whole row

    def summed(v: Array, index: Array) -> Array:
        # XLA:GPU keeps short rows in one kernel only without a gather.
        return jnp.sum(jnp.where(is_place(index, v, axis), v, 0), axis, keepdims=True)

    def in_memory(v: Array, index: Array) -> Array:
        # A TPU writes an array that it computes, such as a wide copy, before it gathers from it.
        narrow = v.astype(exact)
        found = taken_along(narrow, index, axis, "promise_in_bounds")
        return found.astype(v.dtype)

    on_gpu = summed if rows_fit_a_kernel(v, (axis,)) else gathered
    on_tpu = summed if exact is None or is_split(v, (axis,)) else in_memory
    forms = {"cpu": on_cpu, "cuda": on_gpu, "rocm": on_gpu, "tpu": on_tpu}
    return platform_dependent(v, index, **forms, default=summed)


def is_place(index: Array, x: Array, axis: int) -> Array:
    """Whether each entry of x is the one at `index` along an axis."""
    return lax.broadcasted_iota(index.dtype, x.shape, axis) == index
