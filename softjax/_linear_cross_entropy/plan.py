"""How large the pieces are: from the shapes, the dtype and a budget of bytes for temporaries.

N rows, D features, V classes; b bytes a number of the computation. At once there are, for pieces
of n rows and v classes,

    the losses                            b n V
    their sum with its gradients          b (n V + n D + (2 n + 3 D) v)     logits kept
                                          b (n D + (3 n + 3 D) v)           multiplied again
"""

from typing import NamedTuple

# Fewer rows or logits at a time cost more in steps than they save.
FEWEST_ROWS = 8
FEWEST_LOGITS = 2**18
# More rows make no product faster.
MOST_ROWS = 1024
# The arrays of a piece of classes are of about this many numbers, so that caches hold them.
PIECE = 2**21


class Shapes(NamedTuple):
    """N, D and V, and b."""

    rows: int
    features: int
    classes: int
    bytes: int


class Plan(NamedTuple):
    """The pieces of a sum with its gradients.

    Attributes:
        rows: n.
        second: n for the derivative of the gradients, which holds four times as much.
        classes: v.
        keep: whether the logits of n rows and all classes are kept.
    """

    rows: int
    second: int
    classes: int
    keep: bool


def rows_of_values(shapes: Shapes, budget: int | None) -> int:
    """n for the losses alone."""
    return _rows(shapes, shapes.features // 8, 16, _fitting(budget, shapes.bytes * shapes.classes))


def rows_of_losses(shapes: Shapes, budget: int | None) -> int:
    """n for the losses with derivatives: logits and their gradient, and again for second ones."""
    row = 2 * shapes.bytes * shapes.classes
    return _rows(shapes, shapes.features // 2, 4, _fitting(budget, row))


def of_gradients(shapes: Shapes, budget: int | None, *, whole: bool) -> Plan:
    """The pieces of a sum with its gradients; of all rows where `whole` or the budget is small.

    A gradient of the kernel that adds up over pieces of rows is read and written once for each.
    In float32 few pieces cost less than a fourth product. In half precision (`whole`) it would
    be another array, in float32 and larger than the kernel.
    """
    n, d, classes, size = shapes
    if not whole:
        width = _even(classes, min(max(PIECE // max(n, d, 1), 1), classes))
        used = size * (2 * n + 3 * d) * width
        fitting = _fitting(None if budget is None else budget - used, size * (classes + d))
        rows = _rows(shapes, d, 2, fitting)
        if fitting is None or fitting >= min(n, FEWEST_ROWS):
            return Plan(rows, _even(n, max(rows // 4, 1)), width, keep=True)
    wanted = max(d * classes // 8, FEWEST_LOGITS) // max(n, 1)
    fitting = _fitting(None if budget is None else budget - size * n * d, size * 3 * (n + d))
    width = wanted if fitting is None else min(wanted, fitting)
    width = _even(classes, min(max(width, 1), classes))
    return Plan(max(n, 1), max(n, 1), width, keep=False)


def _rows(shapes: Shapes, wanted: int, pieces: int, fitting: int | None) -> int:
    """`wanted`, in the limits, for at least as many pieces."""
    n = shapes.rows
    wanted = min(max(wanted, FEWEST_LOGITS // max(shapes.classes, 1)), MOST_ROWS, -(-n // pieces))
    size = max(wanted, FEWEST_ROWS)
    size = size if fitting is None else max(min(size, fitting), 1)
    return _even(n, min(size, n))


def _fitting(budget: int | None, bytes_of_one: int) -> int | None:
    """How many fit into the budget."""
    return None if budget is None else max(budget, 0) // max(bytes_of_one, 1)


def _even(length: int, size: int) -> int:
    """A size, at most the given one: one that divides, or that of pieces that differ little.

    A last piece of its own size is compiled for itself.
    """
    size = min(max(size, 1), max(length, 1))
    for divisor in range(size, size // 2, -1):
        if length % divisor == 0:
            return divisor
    return -(-length // -(-length // size))
