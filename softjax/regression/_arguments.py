"""The arguments of a fit, checked and put on the device."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from softjax import _checks
from softjax._foreign import unwrapped
from softjax._labels import numbers_as_classes
from softjax._numerics import compute_dtype
from softjax._weights import in_unit
from softjax.regression._features import (
    Matrix,
    is_sparse,
    is_sparse_matrix,
    largest_entries,
    refuse_scales,
    same_order,
    sparse_array,
    without_duplicates,
)
from softjax.regression._host_arrays import is_at_hand, placed
from softjax.regression._model import SoftmaxRegression, refuse_other_params
from softjax.regression._model import init as zeros
from softjax.regression._problem import Data

FIT = "regression.fit"

_called: ContextVar[str] = ContextVar("called", default=FIT)


@contextmanager
def errors_name(function: str) -> Iterator[None]:
    """A context manager and decorator: errors about arguments name `function` in it."""
    token = _called.set(function)
    try:
        yield
    finally:
        _called.reset(token)


def called() -> str:
    """The name of the function in errors about arguments."""
    return _called.get()


def error(argument: str, expected: str, got: object) -> ValueError:
    return ValueError(_checks.message(called(), argument, expected, got))


def checked_features(features: Any) -> Matrix:
    """The checked features of a fit, whose columns have a scale that can be squared."""
    x = features_array("features", features)
    if is_sparse(x):
        if _checks.is_concrete(x.data):
            refuse_scales(called(), "features", largest_entries(x), x.dtype)
    elif _checks.is_concrete(x):
        host: Any = np.asarray(x) if is_at_hand(x) else x
        refuse_scales(called(), "features", np.maximum(host.max(0), -host.min(0)), x.dtype)
    return x


def checked_data(
    features: Any,
    labels: Any,
    num_classes: int | None,
    sample_weights: ArrayLike | None,
    class_weights: ArrayLike | None,
    fit_intercept: bool = True,
    offset: ArrayLike | None = None,
    penalty_factors: ArrayLike | None = None,
) -> Data:
    """The checked data of a fit, still without penalties."""
    same_order(called(), features, labels=labels, sample_weights=sample_weights, offset=offset)
    x = checked_features(features)
    num_examples = x.shape[0]
    y = labels_array("labels", labels, num_examples)
    named = "labels" if num_classes is None else "num_classes"
    num_classes = class_count("labels", y, num_classes)
    refuse_one_class(y, num_classes)
    refuse_sizes(named, x, num_classes)
    weights, count = mean_one_weights(sample_weights, num_examples, x.dtype)
    options = class_weights, fit_intercept, offset, penalty_factors
    return replace(data_of(x, y, num_classes, *options), weights=weights, count=count)


def data_of(
    x: Matrix,
    labels: Any,
    num_classes: int,
    class_weights: ArrayLike | None,
    fit_intercept: bool,
    offset: ArrayLike | None,
    penalty_factors: ArrayLike | None,
) -> Data:
    """The data of checked features and labels with all other checked arguments, unweighted."""
    return Data(
        num_classes=num_classes,
        features=x,
        labels=labels,
        class_weights=class_weights_array(class_weights, num_classes, x.dtype),
        l2=np.zeros((), x.dtype),
        l1=np.zeros((), x.dtype),
        factors=factors_array(penalty_factors, x.shape[1], x.dtype),
        count=np.asarray(x.shape[0], x.dtype),
        constant=constant(fit_intercept, x.dtype),
        offset=offset_array("offset", offset, x, num_classes),
    )


def constant(fit_intercept: bool, dtype: DTypeLike) -> Any:
    """The factor of the bias: 1, or 0 without an intercept; both use one compiled program."""
    return np.asarray(_checks.flag(called(), "fit_intercept", fit_intercept), dtype)


def offset_array(
    argument: str, offset: ArrayLike | None, x: Matrix, num_classes: int
) -> Array | None:
    """The checked offset [N, K] as an array [K, N], like the logits of a fit."""
    if offset is None:
        return None
    array = _checks.real_array(called(), argument, offset).astype(x.dtype)
    _checks.same_shape(called(), argument, array, (x.shape[0], num_classes))
    _refuse_not_finite(argument, array)
    return array.T


def features_array(argument: str, features: Any) -> Matrix:
    """The checked features [N, D], N >= 1, finite and at least float32, dense or BCOO."""
    if is_sparse_matrix(features):
        x = without_duplicates(sparse_array(called(), argument, features))
        if not x.shape[0]:
            raise error(argument, "of at least one example", f"shape {x.shape}")
        _refuse_not_finite(argument, x.data)
        return x
    features = _checks.native(called(), argument, features)
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused below
        if isinstance(features, np.ndarray) and np.issubdtype(features.dtype, np.floating):
            # `jnp.asarray` would hold two copies of an array of NumPy.
            on_device = jax.device_put(features)
            features = features if isinstance(on_device, Tracer) else on_device
        x = _checks.real_array(called(), argument, features)
    if x.ndim != 2 or not len(x):
        expected = "of shape (examples, features), with at least one example"
        raise error(argument, expected, f"shape {x.shape}")
    x = x.astype(compute_dtype(x.dtype))
    _refuse_not_finite(argument, x)
    return x


def labels_array(argument: str, labels: Any, num_examples: int) -> Array:
    """The checked labels: class indices [N], int32, or a distribution [N, K], finite and >= 0."""
    expected = "class indices (integer) or a distribution over the classes (floating)"
    # NumPy checks them: in JAX an int64 would wrap, and JAX does not know the dtypes of pandas.
    coded = f"{expected}; numpy.unique(..., return_inverse=True) gives the indices of texts"
    labels = _checks.native(called(), argument, labels, coded)
    y = numbers_as_classes(labels if isinstance(labels, Array) else np.asarray(labels))
    if jnp.issubdtype(y.dtype, jnp.integer):
        if y.ndim == 2 and len(y) == num_examples:
            got = f"integers or truth values of shape {y.shape}; counts of the classes and one-hot "
            got += "labels are a distribution as labels.astype(float)"
            raise TypeError(_checks.message(called(), argument, expected, got))
        _checks.same_shape(called(), argument, y, (num_examples,))
        _refuse(argument, "class indices >= 0 and < 2^31", y, _not_int32_index)
        if isinstance(y, Tracer):
            y = jnp.where(_not_int32_index(y), -1, y)
        y = y.astype(np.int32)
        return y if isinstance(y, Array) else jax.device_put(y)
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise TypeError(_checks.message(called(), argument, coded, f"dtype {y.dtype}"))
    if y.ndim == 1 and isinstance(y, np.ndarray):
        _checks.refuse_first(called(), argument, "without missing values", y, np.isnan(y))
    y = jnp.asarray(y)
    if y.ndim != 2 or len(y) != num_examples:
        expected = f"integer of shape ({num_examples},) or floating of shape ({num_examples}, K)"
        raise error(argument, expected, f"{y.dtype} of shape {y.shape}")
    _refuse(argument, "finite and >= 0", y, lambda y: _not_finite(y) | (y < 0))
    if _checks.is_concrete(y) and not y.any():
        raise error(argument, "> 0 somewhere", "zeros only")
    return y


def class_count(argument: str, labels: Array, num_classes: int | None) -> int:
    """The number of classes K, checked against `labels`, or shown by them if it is not given.

    A class without examples has no optimum: its bias decreases for ever. So without a given K class
    0 must occur, which detects labels that count from 1, and there must be no more classes than
    examples.
    """
    if num_classes is not None:
        num_classes = at_least("num_classes", num_classes, 2)
    if labels.ndim == 2:
        if num_classes is not None:
            _checks.same_shape(called(), argument, labels, (len(labels), num_classes))
        return labels.shape[1]
    if num_classes is not None:
        _refuse(argument, f"in [0, {num_classes})", labels, lambda y: y >= num_classes)
        return num_classes
    if isinstance(labels, Tracer):
        raise error("num_classes", "given where the labels are traced", None)
    known = np.asarray(labels)
    first, last = int(known.min()), int(known.max())
    if 0 < first < last:
        expected = f"0, ..., K - 1; pass num_classes={last + 1} if class 0 is only without examples"
        raise error(argument, expected, f"{first} to {last}")
    if first < last and last >= len(labels):
        expected = f"0, ..., K - 1, of no more classes than the {len(labels)} examples; "
        expected += f"pass num_classes={last + 1} if classes are only without examples"
        raise error(argument, expected, f"a label of {last}")
    return last + 1  # for a single class, which the caller refuses, too


def refuse_one_class(labels: Array, num_classes: int) -> None:
    expected = "of two classes or more"
    if num_classes < 2:
        raise error("labels", expected, "one class")
    if isinstance(labels, Tracer):
        return
    if labels.ndim == 1 and not np.ptp(np.asarray(labels)):
        raise error("labels", expected, f"class {int(labels[0])} only")


def refuse_sizes(argument: str, x: Matrix, num_classes: int) -> None:
    """Refuses numbers of classes whose logits and parameters the devices cannot hold.

    A fit holds the logits [K, N], the probabilities and the targets, and as many arrays of the size
    of the parameters [K, D + 1].
    """
    data: Any = x.data if is_sparse(x) else x
    if not _checks.is_concrete(data):
        return
    (examples, width), itemsize = x.shape, x.dtype.itemsize
    needed = 3 * itemsize * num_classes * (examples + width + 1)
    memory = 0.0
    for device in data.devices():
        limit = (device.memory_stats() or {}).get("bytes_limit")
        if limit is None and hasattr(os, "sysconf"):
            limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        memory += np.inf if limit is None else limit
    if needed > memory:
        expected = f"such that the logits and the parameters fit into {memory / 2**30:.0f} GiB"
        got = f"{num_classes} classes, {examples} examples and {width} features: "
        raise error(argument, expected, got + f"{needed / 2**30:.0f} GiB")


def mean_one_weights(
    sample_weights: ArrayLike | None, num_examples: int, dtype: DTypeLike
) -> tuple[Array | None, Any]:
    """The sample weights divided by their mean, and their sum; None, and N, for equal weights."""
    if sample_weights is None:
        return None, np.asarray(num_examples, dtype)
    weights: Any = _weights("sample_weights", sample_weights, num_examples, dtype)
    if is_at_hand(weights):  # NumPy needs no compilation
        weights = np.asarray(weights)
        with np.errstate(over="ignore"):  # the sum of huge weights is infinite, as with jnp.sum
            total = weights.sum()
        weights = np.ldexp(weights, -np.frexp(np.max(weights, initial=0))[1])
        mean = np.mean(weights)
    else:
        total, weights = jnp.sum(weights), in_unit(weights)
        mean = jnp.mean(weights)
    if _checks.is_concrete(mean) and mean == 0:
        raise error("sample_weights", "> 0 somewhere", "zeros only")
    return placed(weights / mean), total


def class_weights_array(
    class_weights: ArrayLike | None, num_classes: int, dtype: DTypeLike
) -> Array | None:
    if class_weights is None:
        return None
    if isinstance(class_weights, str):
        raise error("class_weights", "K numbers, such as N / (K N_k)", repr(class_weights))
    weights = _weights("class_weights", class_weights, num_classes, dtype)
    if _checks.is_concrete(weights) and not np.asarray(weights).any():
        raise error("class_weights", "> 0 somewhere", "zeros only")
    return weights


def factors_array(
    penalty_factors: ArrayLike | None, num_features: int, dtype: DTypeLike
) -> Array | None:
    """The penalty factors of the features, [D]; None if all of them are 1."""
    if penalty_factors is None:
        return None
    factors = _weights("penalty_factors", penalty_factors, num_features, dtype)
    known = _checks.known(factors)
    return None if known is not None and np.all(known == 1) else factors


def initial_params(
    init: SoftmaxRegression | None, features: Any, num_classes: int, constant: Any
) -> SoftmaxRegression:
    """`init` in the dtype of the features, or zeros; the bias must be 0 if `constant` is 0."""
    num_features, dtype = features.shape[1], features.dtype
    if init is None:
        return zeros(num_features, num_classes, dtype)
    refuse_other_params(called(), init, "init")
    parts = []
    for name, shape in (("kernel", (num_features, num_classes)), ("bias", (num_classes,))):
        part = _checks.real_array(called(), f"init.{name}", getattr(init, name))
        _checks.same_shape(called(), f"init.{name}", part, shape)
        parts.append(part.astype(dtype))
        _refuse_not_finite(f"init.{name}", parts[-1])
    kernel, bias = parts
    if constant is not None and constant == 0:
        _refuse("init.bias", "0 where `fit_intercept` is False", bias, lambda b: b != 0)
        bias = jnp.zeros_like(bias)
    return SoftmaxRegression(kernel, bias)


def not_negative(argument: str, value: Any) -> Any:
    """A finite number >= 0 as a float, or an unchanged traced scalar."""
    if isinstance(value := unwrapped(value), Tracer):
        _checks.same_shape(called(), argument, value, ())
        return value
    return _checks.not_negative_number(called(), argument, value)


def limits(tol: Any, max_steps: int | None) -> tuple[Any, int | None]:
    """The checked tolerance and limit of the steps of a fit."""
    most = None if max_steps is None else min(at_least("max_steps", max_steps, 0), 2**31 - 1)
    return not_negative("tol", tol), most


def penalty(argument: str, value: Any, dtype: DTypeLike) -> Any:
    """A finite number >= 0 as a scalar of `dtype`, without compilation if it is known."""
    value = not_negative(argument, value)
    if isinstance(value, Tracer):
        return jnp.asarray(value, dtype)
    if value > float(np.finfo(dtype).max):
        raise error(argument, f"finite in {np.dtype(dtype)}", value)
    return np.asarray(value, dtype)


def penalties(l2: ArrayLike, dtype, argument: str = "l2") -> Array:
    """Penalties, a scalar or [P], that are finite and >= 0."""
    array = _checks.real_array(called(), argument, _checks.not_bool(called(), argument, l2))
    if array.ndim > 1 or not array.size:
        raise error(argument, "a scalar or of shape (penalties,)", f"shape {array.shape}")
    values = _checks.known(l2)
    if values is not None:
        bad = ~((values >= 0) & (values < np.inf))
        _checks.refuse_first(called(), argument, "finite and >= 0", values, bad)
    return array.astype(dtype)


def at_least(argument: str, value: Any, bound: int) -> int:
    return _checks.at_least(called(), argument, value, bound)


def _weights(argument: str, weights: ArrayLike, length: int, dtype: DTypeLike) -> Array:
    w = _checks.real_array(called(), argument, weights).astype(dtype)
    _checks.same_shape(called(), argument, w, (length,))
    _refuse(argument, "finite and >= 0", w, lambda w: _not_finite(w) | (w < 0))
    return w


def _refuse_not_finite(argument: str, x: Array) -> None:
    if is_at_hand(x):
        # Finite extremes show that all numbers are finite, without an array as large as `x`.
        host = np.asarray(x)
        if np.isfinite([np.min(host, initial=0), np.max(host, initial=0)]).all():
            return
    _refuse(argument, f"finite in {x.dtype}", x, _not_finite)


def _not_finite(x):
    return ~(abs(x) < np.inf)


def _not_int32_index(y):
    return (y < 0) | (y >> 31 > 0)  # a shift, since JAX cannot compare an int8 with 2^31


def _refuse(argument: str, expected: str, x: Array | np.ndarray, bad: Callable) -> None:
    """Raises an error if an entry of `x` is bad, with the first such entry and its index."""
    if not _checks.is_concrete(x):
        return
    if is_at_hand(x):
        x = np.asarray(x)  # NumPy needs no compilation
    _checks.refuse_first(called(), argument, expected, x, bad(x))


def is_traced(tree: Any) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))
