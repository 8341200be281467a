"""The number of rows and classes that the losses of a large vocabulary process at a time.

There are N rows, D features and V classes, and b bytes per number in the computation. A plan
depends only on these, on the platform and on a budget of bytes for temporaries.

On a GPU or TPU, a sum with its gradients is computed in one of three ways. The first is the
fastest; the others need less memory.

- Three products, for n rows and all classes at a time. The logits and their gradient, both [n, V],
  take 2 b n V bytes. Each piece reads the kernel twice, and reads and writes the float32 sum of the
  kernel's gradients, so that the fewest pieces within the budget are the fastest.
- Four products, for all rows and v classes at a time. The statistics of the rows are merged over
  the pieces, and then the logits are computed again. The sum of the gradients of hidden takes b N D
  bytes.
- Four products, if this sum is too large. n rows by all classes give the statistics and the
  gradient of hidden; then all rows by v classes give the gradient of the kernel. No gradients are
  summed over pieces.

On a CPU the sizes of the pieces fit its caches. These are the bytes in use at once:

    the losses                            b n V
    their sum with its gradients          b (n V + n D + (2 n + 3 D) v)     logits kept
                                          b (n D + (3 n + 3 D) v)           multiplied again

If jax.export leaves N open, as a symbolic dimension, n is computed for many rows, and the number of
pieces and their size are symbolic too: see `pieces.sweep`.
"""

import math
from functools import cache
from typing import NamedTuple

import jax

from softjax._platforms import Choice

# On a CPU, smaller pieces take more time for their steps than they save.
FEWEST_ROWS = 8
FEWEST_LOGITS = 2**18
# On a CPU, products of more rows are not faster.
MOST_ROWS = 1024
# The number of rows that is assumed if N is symbolic.
MANY_ROWS = 16 * MOST_ROWS
# On a CPU, the arrays of a piece of classes have about this many numbers, so that they fit into the
# caches.
PIECE = 2**21

# The bytes of a piece without a budget, in half precision and in wider dtypes, whose kernel and
# gradient are twice as large. There are at least FEWEST_PIECES pieces if they have ENOUGH_ROWS
# rows. A GPU reads the logits more often, and gains most from few pieces. A TPU computes the
# gradient of the logits within the products if the pieces are small.
FASTEST, FASTEST_WIDE = 13 * 2**28, 2**32
FEWEST_PIECES, ENOUGH_ROWS = {"gpu": 1, "tpu": 8}, 1024
# A piece takes at most the memory of the device, if it is known, divided by SHARE.
SHARE = 16
# With fewer rows at a time, reading and writing the sum of the kernel's gradients takes an H100 or
# a TPU as long as a fourth product.
FEWEST_ROWS_OF_SUMS = 512
# Products are computed in tiles of TILE rows or classes; smaller ones are padded to SMALL_TILE.
TILE, SMALL_TILE = 128, 16


class Shapes(NamedTuple):
    """The sizes of a head; for a symbolic N, `rows` is the assumed number."""

    rows: int  # N
    features: int  # D
    classes: int  # V
    bytes: int  # b, the bytes of a number in the computation
    half: bool  # whether the operands of the products have half precision


class Plan(NamedTuple):
    """The pieces of a sum with its gradients."""

    rows: int  # n
    second: int  # n for the derivative of the gradients, which needs more memory
    classes: int  # v
    keep: bool  # whether the logits of n rows and all classes are kept for the gradients
    apart: bool = False  # whether the gradient of the kernel is computed in a separate pass


def rows_of_values(shapes: Shapes, budget: int | None) -> Choice:
    """n for the losses without derivatives."""
    fitting = None if budget is None else _fitting(budget, shapes.bytes * shapes.classes)
    return _choice_of_rows(shapes, budget, 2, _rows(shapes, shapes.features // 8, 16, fitting))


def rows_of_tangents(shapes: Shapes, budget: int | None, kernels: int) -> Choice:
    """n for the losses with derivatives: logits and their gradient, twice for second derivatives.

    `kernels` is the number of kernels that have a gradient.
    """
    budget = None if budget is None else _without(budget, _sums_of_kernels(shapes, kernels))
    fitting = None if budget is None else _fitting(budget, 2 * shapes.bytes * shapes.classes)
    return _choice_of_rows(shapes, budget, 2, _rows(shapes, shapes.features // 2, 4, fitting))


def rows_of_pairs(shapes: Shapes, budget: int | None, kernels: int = 0, arrays: int = 4) -> Choice:
    """n for twice as many logits: those of two heads, or with their tangents.

    A GPU or TPU stores so many arrays [n, V], the gradients of the logits among them.
    """
    on_cpu = -(-rows_of_tangents(shapes, budget, kernels).cpu // 2)
    budget = None if budget is None else _without(budget, _sums_of_kernels(shapes, kernels))
    return _choice_of_rows(shapes, budget, arrays, on_cpu)


def sizes_of_pairs(shapes: Shapes, budget: int | None, kernels: int, arrays: int) -> Choice:
    """n for a sum of losses of two heads with its gradients, and n for their derivative."""
    choice = rows_of_pairs(shapes, budget, kernels, arrays)
    return Choice(*((rows, _quarter(rows)) for rows in choice))


def plan_of_gradients(shapes: Shapes, budget: int | None, *, with_kernel: bool) -> Choice:
    """The pieces of a sum with its gradients, with or without the kernel's gradient."""
    gpu, tpu = (
        plan_of_accelerator(shapes, platform, budget, device_memory(), with_kernel=with_kernel)
        for platform in ("gpu", "tpu")
    )
    return Choice(_plan_of_cpu(shapes, budget, whole=shapes.half and with_kernel), gpu, tpu)


def plan_of_accelerator(
    shapes: Shapes, platform: str, budget: int | None, memory: int | None, *, with_kernel: bool
) -> Plan:
    """The pieces of a sum with its gradients on a "gpu" or "tpu" with `memory` bytes."""
    n, d, classes, size, half = shapes
    row = size * (2 * classes + d)
    sums = size * d * classes if half and with_kernel else 0
    if budget is None:
        rows = _fastest_rows(shapes, platform, memory, row)
        # With all rows in one piece there are no sums over pieces, and their memory is free.
        return _of_whole_rows(shapes, n if 0 < row * n <= row * rows + sums else rows)
    budget = _without(budget, _copy_of_kernel(shapes, platform))
    fitting = _fitting(budget, row)
    if not with_kernel or fitting >= n:
        return _of_whole_rows(shapes, _fewest(n, fitting))
    # In half precision the float32 sum of the kernel's gradients is an array beside the result.
    left = _fitting(budget - sums, row)
    if left >= min(n, FEWEST_ROWS_OF_SUMS):
        return _of_whole_rows(shapes, _fewest(n, left))
    arrays = 1.5 if half and platform == "gpu" else 2  # a TPU leaves gaps between arrays
    column = math.ceil(arrays * size * (n + d))
    beside_sums = budget - size * n * d
    # All rows by v classes read and write the sum of hidden's gradients V / v times, and read
    # hidden as often. n rows by all classes read the kernel twice for each of N / n pieces.
    if 3 * (n + d) * budget < classes * beside_sums:
        return Plan(n, n, _fewest(classes, _fitting(beside_sums, column), TILE), keep=False)
    rows, width = _fewest(n, fitting), _fewest(classes, _fitting(budget, column), TILE)
    return Plan(rows, _quarter(rows), width, keep=True, apart=True)


def _of_whole_rows(shapes: Shapes, rows: int) -> Plan:
    """The plan with three products; one piece of all rows stays one piece in the derivative."""
    second = rows if rows >= shapes.rows else _quarter(rows)
    return Plan(rows, second, shapes.classes, keep=True)


@cache
def device_memory() -> int | None:
    """The bytes that JAX may use on the default device; None for a CPU, or if they are unknown."""
    if jax.default_backend() == "cpu":
        return None
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def _plan_of_cpu(shapes: Shapes, budget: int | None, *, whole: bool) -> Plan:
    """The pieces of a sum with its gradients; all rows at once if `whole` or for a small budget.

    The sum of the kernel's gradients is read and written once for each piece of rows. In float32 a
    few pieces take less time than a fourth product. In half precision (`whole`) the sum would be
    another array, in float32 and larger than the kernel.
    """
    n, d, classes, size, _ = shapes
    if not whole:
        width = _even(classes, min(max(PIECE // max(n, d, 1), 1), classes))
        used = size * (2 * n + 3 * d) * width
        fitting = None if budget is None else _fitting(budget - used, size * (classes + d))
        rows = _rows(shapes, d, 2, fitting)
        if fitting is None or fitting >= min(n, FEWEST_ROWS):
            return Plan(rows, _even(n, max(rows // 4, 1)), width, keep=True)
    width = max(d * classes // 8, FEWEST_LOGITS) // max(n, 1)
    if budget is not None:
        width = min(width, _fitting(budget - size * n * d, size * 3 * (n + d)))
    width = _even(classes, min(max(width, 1), classes))
    return Plan(max(n, 1), max(n, 1), width, keep=False)


def _rows(shapes: Shapes, wanted: int, pieces: int, fitting: int | None) -> int:
    """The rows of a piece on a CPU: `wanted` within the limits, in at least `pieces` pieces."""
    n = shapes.rows
    wanted = min(max(wanted, FEWEST_LOGITS // max(shapes.classes, 1)), MOST_ROWS, -(-n // pieces))
    size = max(wanted, FEWEST_ROWS)
    size = size if fitting is None else max(min(size, fitting), 1)
    return _even(n, min(size, n))


def _choice_of_rows(shapes: Shapes, budget: int | None, arrays: int, on_cpu: int) -> Choice:
    """n for each platform; a GPU or TPU holds `arrays` arrays [n, V] at once."""
    row, memory = shapes.bytes * (arrays * shapes.classes + shapes.features), device_memory()
    if budget is not None:
        left = (_without(budget, _copy_of_kernel(shapes, of)) for of in ("gpu", "tpu"))
        gpu, tpu = (_fewest(shapes.rows, _fitting(budget, row)) for budget in left)
        return Choice(on_cpu, gpu, tpu)
    gpu, tpu = (_fastest_rows(shapes, platform, memory, row) for platform in ("gpu", "tpu"))
    return Choice(on_cpu, gpu, tpu)


def _without(budget: int, used: int) -> int:
    """The bytes of a budget without `used` bytes of other arrays; all if they exceed it."""
    return budget - used if used < budget else budget


def _sums_of_kernels(shapes: Shapes, kernels: int) -> int:
    """The bytes of the float32 sums of `kernels` gradients, beside results in half precision."""
    return shapes.bytes * shapes.features * shapes.classes * kernels if shapes.half else 0


def _copy_of_kernel(shapes: Shapes, platform: str) -> int:
    """The bytes of the bfloat16 copy of a float32 kernel that XLA makes on a TPU before a loop."""
    is_copied = platform == "tpu" and not shapes.half and shapes.bytes == 4
    return 2 * shapes.features * shapes.classes if is_copied else 0


def _fastest_rows(shapes: Shapes, platform: str, memory: int | None, row: int) -> int:
    """n without a budget, on a device with `memory` bytes, if a row takes `row` bytes."""
    n, budget = shapes.rows, FASTEST if shapes.half or platform == "tpu" else FASTEST_WIDE
    budget = budget if memory is None else min(budget, memory // SHARE)
    most = max(-(-n // FEWEST_PIECES[platform]), ENOUGH_ROWS)
    return _fewest(n, min(most, _fitting(budget, row)))


def _quarter(size: int) -> int:
    """The size for the derivative of the gradients, which needs four times the memory."""
    return max(-(-size // 4), 1)


def _fitting(budget: int, bytes_of_one: int) -> int:
    """The number of items that fit into the budget."""
    return max(budget, 0) // max(bytes_of_one, 1)


def _fewest(length: int, fitting: int, tile: int = SMALL_TILE) -> int:
    """The size of the fewest pieces, in whole tiles; equal pieces are preferred if they are few.

    A last piece of another size is compiled separately. A TPU would copy the whole kernel to take
    classes that are not whole tiles.
    """
    if fitting >= length:
        return max(length, 1)
    size = max(fitting // tile * tile, min(fitting, tile), 1)
    count = -(-length // size)
    equal = (length // more for more in range(count, count + count // 4 + 1) if length % more == 0)
    even = -(-length // count)
    wanted = (*equal, -(-even // TILE) * TILE, -(-even // tile) * tile)
    return next((n for n in wanted if n <= size and n % tile == 0), size)


def _even(length: int, size: int) -> int:
    """A size of at most `size`: a divisor of the length, or a size whose pieces differ little."""
    size = min(max(size, 1), max(length, 1))
    for divisor in range(size, size // 2, -1):
        if length % divisor == 0:
            return divisor
    return -(-length // -(-length // size))
