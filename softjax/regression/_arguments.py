"""The arguments of a fit, checked and put on the device."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.typing import ArrayLike, DTypeLike

from softjax import _checks
from softjax._numerics import compute_dtype
from softjax.regression._model import SoftmaxRegression
from softjax.regression._model import init as zeros
from softjax.regression._problem import Data, is_sparse

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO

FIT = "regression.fit"

P = ParamSpec("P")
T = TypeVar("T")


def error(argument: str, expected: str, got: object) -> ValueError:
    return ValueError(_checks.message(FIT, argument, expected, got))


def checked_data(
    features: Any,
    labels: Any,
    num_classes: int | None,
    sample_weights: ArrayLike | None,
    class_weights: ArrayLike | None,
) -> tuple[Data, int]:
    """What is fitted to, as yet without penalties, and the number of classes."""
    x = features_array("features", features)
    _refuse_scales("features", x)
    num_examples = x.shape[0]
    y = labels_array("labels", labels, num_examples)
    num_classes = class_count("labels", y, num_classes)
    refuse_one_class(y, num_classes)
    weights = mean_one_weights(sample_weights, num_examples, x.dtype)
    class_weights = class_weights_array(class_weights, num_classes, x.dtype)
    none: Any = np.zeros((), x.dtype)
    return Data(x, y, weights, class_weights, none, none), num_classes


def features_array(argument: str, features: Any) -> "Array | BCOO":
    """Finite numbers [N, D], N >= 1, at least float32, dense or BCOO."""
    if is_sparse(features):
        return _sparse_features(argument, features)
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused below
        x = _checks.real_array(FIT, argument, _placed(_checks.native(FIT, argument, features)))
    if x.ndim != 2 or not len(x):
        raise error(argument, "of shape (examples, features)", f"shape {x.shape}")
    x = x.astype(compute_dtype(x.dtype))
    _refuse_not_finite(argument, x)
    return x


def labels_array(argument: str, labels: Any, num_examples: int) -> Array:
    """Class indices [N], int32, or a distribution [N, K], finite and >= 0."""
    expected = "class indices (integer) or a distribution over the classes (floating)"
    # In NumPy, since an int64 must not wrap, and since the dtypes of pandas are none of JAX's.
    labels = _checks.native(FIT, argument, labels, expected)
    y = labels if isinstance(labels, Array) else np.asarray(labels)
    if jnp.issubdtype(y.dtype, jnp.integer):
        _checks.same_shape(FIT, argument, y, (num_examples,))
        _refuse(argument, "in [0, 2^31)", y, _not_int32_index)
        if isinstance(y, Tracer):
            y = jnp.where(_not_int32_index(y), -1, y)
        y = y.astype(np.int32)
        return y if isinstance(y, Array) else jax.device_put(y)
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise TypeError(_checks.message(FIT, argument, expected, f"dtype {y.dtype}"))
    if y.ndim == 1 and isinstance(y, np.ndarray):
        _checks.refuse_first(FIT, argument, "without missing values", y, np.isnan(y))
    y = jnp.asarray(y)
    if y.ndim != 2 or len(y) != num_examples:
        expected = f"integer of shape ({num_examples},) or floating of shape ({num_examples}, K)"
        raise error(argument, expected, f"{y.dtype} of shape {y.shape}")
    _refuse(argument, "finite and >= 0", y, lambda y: _not_finite(y) | (y < 0))
    if _checks.is_concrete(y) and not y.any():
        raise error(argument, "> 0 somewhere", "zeros only")
    return y


def class_count(argument: str, labels: Array, num_classes: int | None) -> int:
    """The number of classes, which `labels` must agree with."""
    if num_classes is not None:
        num_classes = at_least("num_classes", num_classes, 2)
    if labels.ndim == 2:
        if num_classes is not None:
            _checks.same_shape(FIT, argument, labels, (len(labels), num_classes))
        return labels.shape[1]
    if num_classes is None:
        if isinstance(labels, Tracer):
            raise error("num_classes", "given where the labels are traced", None)
        return int(np.asarray(labels).max()) + 1
    _refuse(argument, f"in [0, {num_classes})", labels, lambda y: y >= num_classes)
    return num_classes


def refuse_one_class(labels: Array, num_classes: int) -> None:
    expected = "of two classes or more"
    if num_classes < 2:
        raise error("labels", expected, "one class")
    if isinstance(labels, Tracer):
        return
    if labels.ndim == 1 and not np.ptp(np.asarray(labels)):
        raise error("labels", expected, f"class {int(labels[0])} only")


def mean_one_weights(
    sample_weights: ArrayLike | None, num_examples: int, dtype: DTypeLike
) -> Array | None:
    """The sample weights over their mean."""
    if sample_weights is None:
        return None
    weights = _weights("sample_weights", sample_weights, num_examples).astype(dtype)
    mean = jnp.mean(weights)
    if _checks.is_concrete(mean) and not 0 < mean < np.inf:
        got = "zeros only" if mean == 0 else f"a sum that {mean.dtype} does not hold"
        raise error("sample_weights", "> 0 somewhere, of a finite sum", got)
    return weights / mean


def class_weights_array(
    class_weights: ArrayLike | None, num_classes: int, dtype: DTypeLike
) -> Array | None:
    if class_weights is None:
        return None
    weights = _weights("class_weights", class_weights, num_classes).astype(dtype)
    if _checks.is_concrete(weights) and not np.asarray(weights).any():
        raise error("class_weights", "> 0 somewhere", "zeros only")
    return weights


def initial_params(
    init: SoftmaxRegression | None, num_features: int, num_classes: int, dtype: DTypeLike
) -> SoftmaxRegression:
    """`init` in `dtype`, or zeros."""
    if init is None:
        return zeros(num_features, num_classes, dtype)
    kernel = _checks.real_array(FIT, "init.kernel", init.kernel)
    bias = _checks.real_array(FIT, "init.bias", init.bias)
    _checks.same_shape(FIT, "init.kernel", kernel, (num_features, num_classes))
    _checks.same_shape(FIT, "init.bias", bias, (num_classes,))
    params = SoftmaxRegression(kernel.astype(dtype), bias.astype(dtype))
    _refuse_not_finite("init.kernel", params.kernel)
    _refuse_not_finite("init.bias", params.bias)
    return params


def not_negative(argument: str, value: Any) -> Any:
    """A finite number >= 0 as a float; a traced scalar as it is."""
    if isinstance(value, Tracer):
        _checks.same_shape(FIT, argument, value, ())
        return value
    return _checks.not_negative_number(FIT, argument, value)


def penalty(argument: str, value: Any, dtype: DTypeLike) -> Any:
    """A finite number >= 0 as a scalar of `dtype`; placed, not computed, where it is known."""
    value = not_negative(argument, value)
    if isinstance(value, Tracer):
        return jnp.asarray(value, dtype)
    if value > float(np.finfo(dtype).max):
        raise error(argument, f"finite in {np.dtype(dtype)}", value)
    return np.asarray(value, dtype)


def at_least(argument: str, value: int, bound: int) -> int:
    return _checks.at_least(FIT, argument, value, bound)


def on_auto_axes(function: Callable[P, T]) -> Callable[P, T]:
    """`function` of the arrays among its arguments with Auto axes; its result has the given ones.

    The products of a fit sum over the examples, and on Explicit axes the sharding of every such sum
    would have to be said where it stands. Nothing is copied: only the names of the axes are of
    another kind.
    """

    @wraps(function)
    def of_auto(*args: P.args, **kwargs: P.kwargs) -> T:
        explicit = next(filter(None, map(_explicit_mesh, jax.tree.leaves((args, kwargs)))), None)
        if explicit is None:
            return function(*args, **kwargs)
        auto = _with_axes(explicit, AxisType.Auto)

        def moved(leaf: Any, mesh: Mesh) -> Any:
            if _mesh_of(leaf) is None:
                return leaf
            return jax.device_put(leaf, NamedSharding(mesh, leaf.sharding.spec))

        args, kwargs = jax.tree.map(lambda leaf: moved(leaf, auto), (args, kwargs))
        with nullcontext() if jax.sharding.get_abstract_mesh().empty else jax.set_mesh(auto):
            result = function(*args, **kwargs)
        return jax.tree.map(lambda leaf: moved(leaf, explicit), result)

    return of_auto


def _sparse_features(argument: str, features: "BCOO") -> "BCOO":
    if features.ndim != 2 or features.n_batch or features.n_dense or not features.shape[0]:
        expected = "BCOO of shape (examples, features), without batch or dense dimensions"
        raise error(argument, expected, f"shape {features.shape}")
    data = _checks.real_array(FIT, argument, features.data)
    data = data.astype(compute_dtype(data.dtype))
    _refuse_not_finite(argument, data)
    return type(features)((data, features.indices), shape=features.shape)


def _weights(argument: str, weights: ArrayLike, length: int) -> Array:
    w = _checks.real_array(FIT, argument, weights)
    _checks.same_shape(FIT, argument, w, (length,))
    _refuse(argument, "finite and >= 0", w, lambda w: _not_finite(w) | (w < 0))
    return w


def _placed(features: Any) -> Any:
    """NumPy's numbers on the device, of which `jnp.asarray` holds two copies."""
    if not isinstance(features, np.ndarray) or not np.issubdtype(features.dtype, np.floating):
        return features
    placed = jax.device_put(features)
    return features if isinstance(placed, Tracer) else placed


def _refuse_not_finite(argument: str, x: Array) -> None:
    if _is_at_hand(x):
        # The extremes of finite numbers are finite, and take no array as large as the features.
        host = np.asarray(x)
        if np.isfinite([np.min(host, initial=0), np.max(host, initial=0)]).all():
            return
    _refuse(argument, f"finite in {x.dtype}", x, _not_finite)


def _refuse_scales(argument: str, x: Any) -> None:
    """Refuses columns whose squares overflow or vanish: they would count as infinite, or as 0."""
    if is_sparse(x) or not _checks.is_concrete(x):
        return
    host = np.asarray(x) if _is_at_hand(x) else x
    refuse_scales(FIT, argument, np.maximum(host.max(0), -host.min(0)), x.dtype)


def refuse_scales(function: str, argument: str, size: np.ndarray, dtype: DTypeLike) -> None:
    """Refuses columns by the size of their largest entry, [D]."""
    limits = np.finfo(dtype)
    least, most = 10 * np.sqrt(limits.tiny), np.sqrt(limits.max) / 10
    bad = np.flatnonzero((size > most) | (size > 0) & (size < least))
    if len(bad):
        expected = f"of columns whose largest entry is 0 or in [{least:.0e}, {most:.0e}]"
        got = f"{size[bad[0]]:.0e} in column {bad[0]}"
        raise ValueError(_checks.message(function, argument, expected, got))


def _not_finite(x):
    return ~(abs(x) < np.inf)


def _not_int32_index(y):
    return (y < 0) | (y >> 31 > 0)  # a shift, since JAX compares no int8 with 2^31


def _refuse(argument: str, expected: str, x: Array | np.ndarray, bad: Callable) -> None:
    """Raises where an entry of `x` is bad, with the first such entry and its place."""
    if not _checks.is_concrete(x):
        return
    if _is_at_hand(x):
        x = np.asarray(x)  # NumPy has nothing to compile
    _checks.refuse_first(FIT, argument, expected, x, bad(x))


def _is_at_hand(x: Array | np.ndarray) -> bool:
    """Whether `x` is known, and where NumPy reads it without moving it."""
    if not _checks.is_concrete(x):
        return False
    return isinstance(x, Array) and all(device.platform == "cpu" for device in x.devices())


def _mesh_of(leaf: Any) -> Mesh | None:
    """The mesh of an array, outside of a trace."""
    known = isinstance(leaf, Array) and not isinstance(leaf, Tracer)
    return getattr(leaf.sharding, "mesh", None) if known else None


def _explicit_mesh(leaf: Any) -> Mesh | None:
    mesh = _mesh_of(leaf)
    return mesh if mesh is not None and AxisType.Explicit in mesh.axis_types else None


def _with_axes(mesh: Mesh, kind: AxisType) -> Mesh:
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(kind,) * len(mesh.axis_names))
