"""The kinds of labels: class indices, distributions over the classes, and sparse distributions."""

import operator
from functools import cache, partial, reduce
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from softjax._checks import (
    array,
    checks_values,
    holds,
    is_concrete,
    message,
    native,
    not_negative,
    real_array,
    refuse_first,
    same_rank,
    same_shape,
    shape_of,
)
from softjax._foreign import filled, numbers_of, unwrapped
from softjax._sharding import brought_to


class TopKLabels(NamedTuple):
    """A sparse distribution over the classes, such as the top k of a teacher (distillation).

    Attributes:
        indices: integers [..., k], class indices; probabilities of a repeated index are added.
        probabilities: real [..., k], >= 0; if they sum to less than 1, the missing probability mass
            is not redistributed. To pad a list, name further classes with probability 0: an
            index of -1 is refused.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> labels = softjax.TopKLabels(jnp.array([[2, 0]]), jnp.array([[0.75, 0.25]]))
        >>> softjax.cross_entropy(jnp.zeros((1, 4)), labels)  # log 4
        Array([1.3862944], dtype=float32)
    """

    indices: ArrayLike
    probabilities: ArrayLike


Labels = ArrayLike | TopKLabels


class ClassIndices(NamedTuple):
    """Integer labels as indices that are safe to look up.

    Attributes:
        index: int32, every entry in [0, K); 0 where the label is bad or ignored.
        bad: True where the label is outside [0, K); None if all labels are known to be inside.
        ignored: True where the label is `ignore_index`; None without an `ignore_index`.
    """

    index: Array
    bad: Array | None
    ignored: Array | None


def class_indices(
    function: str,
    labels: ArrayLike,
    num_classes: int,
    ignore_index: int | None = None,
    argument: str = "labels",
) -> ClassIndices:
    """Integer `labels` as indices in [0, num_classes), with masks of bad and ignored labels.

    A label out of range raises ValueError if its value is known; under a trace it is marked as bad.
    Negative labels never count from the end.
    """
    expected, labels = f"in [0, {num_classes})", unwrapped(labels)
    if not is_concrete(labels):
        labels = jnp.asarray(labels)  # a list with a traced label
    if isinstance(labels, Array):
        good = checks_values(labels)
        if not holds(_is_class, labels, num_classes, ignore_index):
            y = np.asarray(labels)
            refuse_first(function, argument, expected, y, ~_is_class(y, num_classes, ignore_index))
        if good and ignore_index is None:
            index = labels if labels.dtype == jnp.int32 else labels.astype(jnp.int32)
            return ClassIndices(index, None, None)
        return _safe(labels, num_classes, ignore_index, good)
    # NumPy checks the labels, because a 32-bit JAX array would truncate 64-bit labels.
    y = np.asarray(native(function, argument, labels, "class indices (integer)"))
    is_class, ignored = _is_class(y, num_classes, ignore_index), None
    if checks_values(y):
        refuse_first(function, argument, expected, y, ~is_class)
    if ignore_index is not None:
        ignored = _equals(y, ignore_index)
    index = np.where(is_class if ignored is None else is_class & ~ignored, y, 0)
    ignored = None if ignored is None else jnp.asarray(ignored)
    bad = None if is_class.all() else jnp.asarray(~is_class)
    return ClassIndices(jnp.asarray(index.astype(np.int32)), bad, ignored)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _safe(y: Array, num_classes: int, ignore_index: int | None, good: bool) -> ClassIndices:
    if jnp.iinfo(y.dtype).bits < 32:
        y = y.astype(jnp.int32)
    ignored = None if ignore_index is None else _equals(y, ignore_index)
    bad = None if good else ~_is_class(y, num_classes, ignore_index)
    unusable = [where for where in (bad, ignored) if where is not None]
    index = jnp.where(reduce(operator.or_, unusable), 0, y) if unusable else y
    return ClassIndices(index.astype(jnp.int32), bad, ignored)


def _is_class(labels: Any, num_classes: int, ignore_index: int | None) -> Any:
    """Whether each label is in [0, num_classes) or is `ignore_index`."""
    # The number of classes of an exported program may be a symbol.
    exceeded = isinstance(num_classes, int) and num_classes > _range(labels.dtype)[1]
    is_class = labels >= 0 if exceeded else (labels >= 0) & (labels < num_classes)
    return is_class if ignore_index is None else is_class | _equals(labels, ignore_index)


def numbers_as_classes(labels: Any) -> Any:
    """Truth values, and whole numbers [N] in floating point, as class indices; others unchanged.

    A fit and its statistics take both, since a table has one dtype for its features and labels. A
    loss takes neither: there truth values are masks, and numbers need an axis of classes.
    """
    labels = unwrapped(labels)
    is_list = isinstance(labels, list) and all(isinstance(y, (bool, float)) for y in labels)
    is_foreign = hasattr(labels, "__array__") and not isinstance(labels, Array)
    numbers: Any = numbers_of(np.asarray(filled(labels))) if is_list or is_foreign else None
    labels = labels if numbers is None else numbers
    dtype = getattr(labels, "dtype", None)
    if dtype == np.dtype(bool):
        return labels.astype(np.int32)
    is_floating = isinstance(dtype, np.dtype) and jnp.issubdtype(dtype, jnp.floating)
    if not is_floating or labels.ndim != 1 or not is_concrete(labels):
        return labels
    y = np.asarray(labels)
    return y.astype(np.int32) if are_indices(y).all() else labels


def are_indices(numbers: np.ndarray) -> np.ndarray:
    """Which numbers are whole, >= 0 and < 2^31, as the index of a class in int32."""
    y = numbers.astype(np.float64)  # half precision does not reach 2^31
    return (y >= 0) & (y < 2**31) & (y == np.floor(y))


def indices_of_shape(
    function: str, labels: ArrayLike, shape: tuple[int, ...], logits: tuple[int, ...] = ()
) -> None:
    """Refuses class indices of another shape, which may be a distribution in integers.

    `logits` is the shape of the logits if the function has an argument `axis`; other axes of them
    may hold the classes, as axis 1 does in the images of torch.
    """
    given = shape_of(labels)
    if given != shape:
        got = f"shape {given}"
        axes = [
            axis for axis in range(len(logits)) if given == (*logits[:axis], *logits[axis + 1 :])
        ]
        if axes:
            options = " or ".join(f"axis={axis}" for axis in axes)
            got += f"; if the classes of the logits {logits} are on another axis, pass {options}"
        elif given[:-1] == shape:
            got += ": class indices must be integers, and a distribution must be floating, such as "
            got += "labels.astype(float) for one-hot integers or truth values"
        raise ValueError(message(function, "labels", f"of shape {shape}", got))


def is_class_indices(labels: Labels, function: str) -> TypeGuard[ArrayLike]:
    """Whether `labels` are integers (True) or probabilities (False)."""
    if isinstance(labels, TopKLabels):
        return False
    expected = "class indices (integer), a distribution (floating) or TopKLabels"
    labels = native(function, "labels", labels, expected)
    try:
        dtype = labels.dtype if isinstance(labels, Array) else jnp.asarray(labels).dtype
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(message(function, "labels", expected, type(labels).__name__)) from error
    if jnp.issubdtype(dtype, jnp.integer):
        return True
    if jnp.issubdtype(dtype, jnp.floating):
        return False
    got = f"dtype {dtype}"
    if jnp.issubdtype(dtype, jnp.bool_):
        got += "; one-hot truth values are a distribution as labels.astype(float)"
    raise TypeError(message(function, "labels", expected, got))


def refuse_distributions(function: str, labels: Labels) -> None:
    """Refuses labels that are not class indices."""
    if not is_class_indices(labels, function):
        is_sparse = isinstance(labels, TopKLabels)
        got = "TopKLabels" if is_sparse else f"dtype {jnp.asarray(labels).dtype}"
        raise TypeError(message(function, "labels", "class indices (integer)", got))


def targets_of(
    function: str,
    labels: Labels,
    shape: tuple[int, ...],
    dtype,
    ignore_index: int | None = None,
    axis: int | None = None,
) -> ClassIndices | Array:
    """Class indices, or a distribution over the last axis of `shape` by `distribution`.

    `axis` >= 0 is where the classes of the logits were if the function has an argument `axis`.
    """
    if is_class_indices(labels, function):
        *lead, num_classes = shape
        logits = () if axis is None else (*lead[:axis], num_classes, *lead[axis:])
        indices_of_shape(function, labels, shape[:-1], logits)
        return class_indices(function, labels, num_classes, ignore_index)
    refuse_ignore_index(function, labels, ignore_index, len(shape))
    return distribution(function, labels, shape, dtype, -1 if axis is None else axis)


def distribution(
    function: str, labels: Labels, shape: tuple[int, ...], dtype, axis: int = -1
) -> Array:
    """A dense distribution over the last axis of `shape`; NaN where a traced index is bad.

    If `labels` are dense already, `axis` is their class axis.
    """
    if isinstance(labels, TopKLabels):
        return _scattered(function, labels, shape, dtype)
    given = labels
    labels = real_array(function, "labels", labels)
    refuse_floating_indices(function, labels, len(shape))
    if labels.ndim > len(shape):
        got = f"shape {labels.shape}, which has more axes than the logits, the first argument"
        raise ValueError(message(function, "labels", f"of rank {len(shape)}", got))
    same_rank(function, "labels", labels, len(shape))
    not_negative(function, "labels", given)
    labels = last(labels, axis % labels.ndim)
    same_shape(function, "labels", labels, shape)
    return labels if labels.dtype == dtype else labels.astype(dtype)


def last(x: Array, axis: int) -> Array:
    """`x` with an axis >= 0 moved to the end; `x` itself if the axis is there already."""
    return x if axis == x.ndim - 1 else jnp.moveaxis(x, axis, -1)


def refuse_ignore_index(function: str, labels: Labels, ignore_index: int | None, rank: int) -> None:
    """Refuses `ignore_index` beside a distribution, and first labels that should be integers."""
    if ignore_index is not None:
        if not isinstance(labels, TopKLabels):
            refuse_floating_indices(function, jnp.asarray(labels), rank)
        expected = "None where labels are a distribution"
        raise TypeError(message(function, "ignore_index", expected, ignore_index))


def refuse_floating_indices(function: str, labels: Array, rank: int) -> None:
    """Refuses floating labels without a class axis; distributions have the `rank` of the logits."""
    if labels.ndim == rank - 1:
        expected = "of an integer dtype as class indices, or a distribution over the classes"
        got = f"{labels.dtype} of shape {labels.shape}"
        raise ValueError(message(function, "labels", expected, got))


def sparse_distribution(
    function: str, labels: TopKLabels, shape: tuple[int, ...], argument: str = "labels"
) -> tuple[Array, Array]:
    """Indices in [0, K) and probabilities of a distribution over the last axis of `shape`.

    Under a trace, the probability of a bad index is NaN.
    """
    expected = "an array of integers"
    indices = array(function, f"{argument}.indices", expected, labels.indices)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(
            message(function, f"{argument}.indices", expected, f"dtype {indices.dtype}")
        )
    probabilities = real_array(function, f"{argument}.probabilities", labels.probabilities)
    k = indices.shape[-1] if indices.ndim else 0
    same_shape(function, f"{argument}.indices", indices, (*shape[:-1], k))
    same_shape(function, f"{argument}.probabilities", probabilities, indices.shape)
    not_negative(function, f"{argument}.probabilities", labels.probabilities)
    index, bad, _ = class_indices(function, labels.indices, shape[-1], None, argument)
    probabilities = brought_to(probabilities, index)
    return index, probabilities if bad is None else jnp.where(bad, jnp.nan, probabilities)


def _scattered(function: str, labels: TopKLabels, shape: tuple[int, ...], dtype) -> Array:
    index, probabilities = sparse_distribution(function, labels, shape)
    if any(jax.typeof(index).sharding.spec):
        # JAX cannot scatter over rows on Explicit axes, so the classes are compared instead.
        is_class = index[..., None] == jnp.arange(shape[-1], dtype=index.dtype)
        return jnp.sum(jnp.where(is_class, probabilities.astype(dtype)[..., None], 0), -2)
    rows = (
        jnp.expand_dims(jnp.arange(size), [axis for axis in range(index.ndim) if axis != along])
        for along, size in enumerate(index.shape[:-1])
    )
    return jnp.zeros(shape, dtype).at[(*rows, index)].add(probabilities.astype(dtype))


def _equals(labels: Any, value: int) -> Any:
    low, high = _range(labels.dtype)
    return labels == value if low <= value <= high else labels != labels


@cache
def _range(dtype: np.dtype) -> tuple[int, int]:
    """The smallest and the largest integer of a dtype, cached because `jnp.iinfo` is slow."""
    info = jnp.iinfo(dtype)
    return int(info.min), int(info.max)
