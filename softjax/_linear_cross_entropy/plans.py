"""How many rows and classes the losses of a large vocabulary take at a time.

N rows, D features, V classes; b bytes a number of the computation. A plan is a function of these,
of the platform and of a budget of bytes for temporaries, and of nothing else.

On a GPU or TPU a sum with its gradients is computed in one of three ways. The first is the fastest,
the others are for a budget that it does not fit in.

- Three products, of n rows by all classes at a time. The logits and their gradient, both [n, V],
  take 2 b n V bytes. Each piece reads the kernel twice, and reads and writes the gradient of the
  kernel, which adds up in float32: the fewest pieces that the budget allows are the fastest.
- Four products, of all rows by v classes at a time: the statistics of the rows are merged over the
  pieces, then the logits are multiplied again. The gradient of hidden adds up in b N D bytes.
- Four products, where that sum is too large: n rows by all classes give the statistics and the
  gradient of hidden, then all rows by v classes that of the kernel. Nothing adds up over pieces.

On a CPU the pieces are cut for its caches. At once there are

    the losses                            b n V
    their sum with its gradients          b (n V + n D + (2 n + 3 D) v)     logits kept
                                          b (n D + (3 n + 3 D) v)           multiplied again

Where jax.export leaves N open, as a symbolic dimension, n is that of many rows, and the number of
pieces and their size are symbolic in turn: see `pieces.sweep`.
"""

import math
from functools import cache
from typing import NamedTuple

import jax

from softjax._platforms import Choice

# On a CPU, fewer rows or logits at a time cost more in steps than they save.
FEWEST_ROWS = 8
FEWEST_LOGITS = 2**18
# On a CPU, more rows make no product faster.
MOST_ROWS = 1024
# So many rows are expected where N is symbolic.
MANY_ROWS = 16 * MOST_ROWS
# On a CPU, the arrays of a piece of classes are of about this many numbers, so that caches hold
# them.
PIECE = 2**21

# The budgets for pieces of what is fastest, of half precision and of others, for which the kernel
# and its gradient are twice as large; and the fewest pieces, if they have so many rows. A GPU reads
# the logits more often, and gains most by few pieces. A TPU computes the gradient of the logits
# within the products, as long as the pieces are small.
FASTEST, FASTEST_WIDE = 13 * 2**28, 2**32
FEWEST_PIECES, ENOUGH_ROWS = {"gpu": 1, "tpu": 8}, 1024
# No more than this share of the memory of the device, where that is known.
SHARE = 16
# With fewer rows at a time, to read and write the sum of the gradients of the kernel takes an H100
# or a TPU as long as the product that multiplying again would add.
FEWEST_ROWS_OF_SUMS = 512
# Products have tiles of so many rows or classes, and are padded to smaller ones.
TILE, SMALL_TILE = 128, 16


class Shapes(NamedTuple):
    """N, D and V; for a symbolic N the number of rows that is expected.

    Attributes:
        rows: N.
        features: D.
        classes: V.
        bytes: b, of a number of the computation.
        half: whether the operands of the products are of half precision.
    """

    rows: int
    features: int
    classes: int
    bytes: int
    half: bool


class Plan(NamedTuple):
    """The pieces of a sum with its gradients.

    Attributes:
        rows: n.
        second: n for the derivative of the gradients, which holds more.
        classes: v.
        keep: whether the logits of n rows and all classes are kept for the gradients.
        apart: whether the gradient of the kernel has a pass of its own.
    """

    rows: int
    second: int
    classes: int
    keep: bool
    apart: bool = False


def rows_of_values(shapes: Shapes, budget: int | None) -> Choice:
    """n for the losses alone."""
    fitting = None if budget is None else _fitting(budget, shapes.bytes * shapes.classes)
    return _choice_of_rows(shapes, budget, 2, _rows(shapes, shapes.features // 8, 16, fitting))


def rows_of_tangents(shapes: Shapes, budget: int | None, kernels: int) -> Choice:
    """n for the losses with derivatives: logits and their gradient, and again for second ones.

    So many kernels have a gradient.
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
    """n for a sum of losses of two heads with its gradients, and n for the derivative of these."""
    choice = rows_of_pairs(shapes, budget, kernels, arrays)
    return Choice(*((rows, _quarter(rows)) for rows in choice))


def plan_of_gradients(shapes: Shapes, budget: int | None, *, with_kernel: bool) -> Choice:
    """The pieces of a sum with its gradients, of the kernel among them or not."""
    gpu, tpu = (
        plan_of_accelerator(shapes, platform, budget, device_memory(), with_kernel=with_kernel)
        for platform in ("gpu", "tpu")
    )
    return Choice(_plan_of_cpu(shapes, budget, whole=shapes.half and with_kernel), gpu, tpu)


def plan_of_accelerator(
    shapes: Shapes, platform: str, budget: int | None, memory: int | None, *, with_kernel: bool
) -> Plan:
    """The pieces of a sum with its gradients on a "gpu" or "tpu" with so many bytes of memory."""
    n, d, classes, size, half = shapes
    row = size * (2 * classes + d)
    sums = size * d * classes if half and with_kernel else 0
    if budget is None:
        rows = _fastest_rows(shapes, platform, memory, row)
        # With all rows in one piece nothing adds up, and the memory of the sums is free.
        return _of_whole_rows(shapes, n if 0 < row * n <= row * rows + sums else rows)
    budget = _without(budget, _copy_of_kernel(shapes, platform))
    fitting = _fitting(budget, row)
    if not with_kernel or fitting >= n:
        return _of_whole_rows(shapes, _fewest(n, fitting))
    # In half precision the sum of the gradients of the kernel is not what is returned, but beside.
    left = _fitting(budget - sums, row)
    if left >= min(n, FEWEST_ROWS_OF_SUMS):
        return _of_whole_rows(shapes, _fewest(n, left))
    arrays = 1.5 if half and platform == "gpu" else 2  # a TPU leaves gaps between arrays
    column = math.ceil(arrays * size * (n + d))
    beside_sums = budget - size * n * d
    # All rows by v classes read and write the sum of the gradients of hidden V / v times, and read
    # hidden; n rows by all classes read the kernel N / n times, and twice.
    if 3 * (n + d) * budget < classes * beside_sums:
        return Plan(n, n, _fewest(classes, _fitting(beside_sums, column), TILE), keep=False)
    rows, width = _fewest(n, fitting), _fewest(classes, _fitting(budget, column), TILE)
    return Plan(rows, _quarter(rows), width, keep=True, apart=True)


def _of_whole_rows(shapes: Shapes, rows: int) -> Plan:
    """Three products. If all rows are one piece, they are one in the derivative too."""
    second = rows if rows >= shapes.rows else _quarter(rows)
    return Plan(rows, second, shapes.classes, keep=True)


@cache
def device_memory() -> int | None:
    """The bytes that JAX may use on the default device; None for a CPU, or if it is not known."""
    if jax.default_backend() == "cpu":
        return None
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def _plan_of_cpu(shapes: Shapes, budget: int | None, *, whole: bool) -> Plan:
    """The pieces of a sum with its gradients; of all rows where `whole` or the budget is small.

    A gradient of the kernel that adds up over pieces of rows is read and written once for each.
    In float32 few pieces cost less than a fourth product. In half precision (`whole`) it would
    be another array, in float32 and larger than the kernel.
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
    """n of each platform, where there are so many arrays [n, V] at once on a GPU or TPU."""
    row, memory = shapes.bytes * (arrays * shapes.classes + shapes.features), device_memory()
    if budget is not None:
        left = (_without(budget, _copy_of_kernel(shapes, of)) for of in ("gpu", "tpu"))
        gpu, tpu = (_fewest(shapes.rows, _fitting(budget, row)) for budget in left)
        return Choice(on_cpu, gpu, tpu)
    gpu, tpu = (_fastest_rows(shapes, platform, memory, row) for platform in ("gpu", "tpu"))
    return Choice(on_cpu, gpu, tpu)


def _without(budget: int, used: int) -> int:
    """The bytes of a budget that are left for pieces, or all of them if other arrays exceed it.

    No plan can then keep to it.
    """
    return budget - used if used < budget else budget


def _sums_of_kernels(shapes: Shapes, kernels: int) -> int:
    """The bytes of the sums of so many gradients of a kernel, where these are not what is returned.

    Those of losses that are not reduced, and of two heads, add up over pieces of rows.
    """
    return shapes.bytes * shapes.features * shapes.classes * kernels if shapes.half else 0


def _copy_of_kernel(shapes: Shapes, platform: str) -> int:
    """The bytes of a copy of the kernel that XLA makes on a TPU, which multiplies in bfloat16.

    It converts all of a float32 kernel before a loop, even if each step takes some classes only.
    """
    is_copied = platform == "tpu" and not shapes.half and shapes.bytes == 4
    return 2 * shapes.features * shapes.classes if is_copied else 0


def _fastest_rows(shapes: Shapes, platform: str, memory: int | None, row: int) -> int:
    """n without a budget, on a device with so many bytes of memory, for `row` bytes of each."""
    n, budget = shapes.rows, FASTEST if shapes.half or platform == "tpu" else FASTEST_WIDE
    budget = budget if memory is None else min(budget, memory // SHARE)
    most = max(-(-n // FEWEST_PIECES[platform]), ENOUGH_ROWS)
    return _fewest(n, min(most, _fitting(budget, row)))


def _quarter(size: int) -> int:
    """The size for the derivative of gradients, which holds four times as much."""
    return max(-(-size // 4), 1)


def _fitting(budget: int, bytes_of_one: int) -> int:
    """How many items fit into the budget."""
    return max(budget, 0) // max(bytes_of_one, 1)


def _fewest(length: int, fitting: int, tile: int = SMALL_TILE) -> int:
    """The size of the fewest pieces, of whole tiles; of equal pieces where a few more are equal.

    A last piece of its own size is compiled for itself. A TPU copies all of the kernel to take
    other classes of it than whole tiles.
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
    """A size, at most the given one: one that divides, or that of pieces that differ little.

    A last piece of its own size is compiled for itself.
    """
    size = min(max(size, 1), max(length, 1))
    for divisor in range(size, size // 2, -1):
        if length % divisor == 0:
            return divisor
    return -(-length // -(-length // size))
