"""How large the pieces are: from the shapes, the dtype and a budget of bytes for temporaries.

N rows, D features, V classes; b bytes a number of the computation. What the pieces take at once:

    rows, n at a time       b n V       the losses;   b (2 n V + D v)           with gradients
    classes, v at a time    b N v       the losses;   b (2 N v + N D + D v)     with gradients

Without a budget, n is about D / 2: the logits of a piece then take as much as the gradient of the
kernel, and multiplying them costs much more than adding that gradient up.
"""

from typing import NamedTuple

# Smaller pieces cost more in steps of a loop than they save: in rows, and in logits.
FEWEST_ROWS = 8
FEWEST_LOGITS = 2**18
# Larger ones make no product faster.
MOST_ROWS = 1024


class Shapes(NamedTuple):
    """N, D and V, and b."""

    rows: int
    features: int
    classes: int
    bytes: int


def by_rows(shapes: Shapes, budget: int | None, *, half: bool, kernel: bool) -> bool:
    """Whether gradients are made row by row, in three products, or class by class, in four.

    In half precision the gradient of the kernel would have to add up in float32, another array
    larger than the kernel, which every piece reads and writes. Class by class nothing adds up.
    """
    if half and kernel:
        return False
    n, _, classes, size = shapes
    return budget is None or min(n, FEWEST_ROWS) * 2 * size * classes <= budget


def rows_of_values(shapes: Shapes, budget: int | None) -> int:
    """n where only the losses are wanted."""
    most = shapes.rows // 16
    fitting = None if budget is None else budget // _size(shapes.bytes, shapes.classes)
    return _rows(shapes, shapes.features // 8, most, fitting)


def rows_of_gradients(shapes: Shapes, budget: int | None) -> int:
    """n where gradients are wanted too."""
    most = shapes.rows // 4
    fitting = None if budget is None else budget // _size(2 * shapes.bytes, shapes.classes)
    return _rows(shapes, shapes.features // 2, most, fitting)


def rows_of_second(shapes: Shapes, budget: int | None) -> int:
    """n for the derivatives of gradients, which hold twice as many arrays of logits."""
    return _even(shapes.rows, max(rows_of_gradients(shapes, budget) // 2, 1))


def classes_of_gradients(shapes: Shapes, budget: int | None) -> int:
    """v: as many logits at once as the default of `rows_of_gradients` has in a quarter of n."""
    n, d, classes, size = shapes
    if budget is None:
        width = max(d * classes // (8 * max(n, 1)), FEWEST_LOGITS // max(n, 1))
    else:
        width = (budget - size * n * d) // _size(size, 2 * n + d)
    return _even(classes, min(max(width, 1), classes))


def _rows(shapes: Shapes, wanted: int, most: int, fitting: int | None) -> int:
    wanted = min(max(wanted, FEWEST_LOGITS // max(shapes.classes, 1)), MOST_ROWS, most)
    size = max(wanted, FEWEST_ROWS)
    size = size if fitting is None else max(min(size, fitting), 1)
    return _even(shapes.rows, min(size, max(shapes.rows, 1)))


def _even(length: int, size: int) -> int:
    """The size of the fewest pieces that are no larger, all but the last of the same size."""
    count = -(-length // size) if size else 1
    return max(-(-length // max(count, 1)), 1)


def _size(*factors: int) -> int:
    product = 1
    for factor in factors:
        product *= max(factor, 1)
    return product
