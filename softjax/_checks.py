"""Argument checks. Every message has one form: the argument, what was expected, what was passed."""

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from softjax._foreign import filled, is_lazy, numbers_of, numbers_of_columns, unwrapped

Axis = int | Sequence[int] | None

# An array with more numbers than this is checked on its accelerator instead of being copied.
MOST_READ = 4096
_CHECKS_ON: ContextVar[bool] = ContextVar("softjax.checks", default=True)


@contextlib.contextmanager
def checks(enabled: bool) -> Iterator[None]:
    """Context manager that switches checks of argument values in losses and normalizers on or off.

    By default a call on arrays checks that each label is a class, each weight and probability is
    >= 0, and each temperature is > 0, and raises ValueError otherwise. To do so it waits until the
    device has computed these values, so that a loop of calls waits in every iteration. With
    `checks(False)` a call does not wait. A bad value then has the same effect as under `jax.jit`,
    where values are unknown: a label out of range gives NaN, and so does a temperature <= 0. Shapes
    and dtypes are always checked, and so are the arguments of fits.

    The setting applies to the thread (or asyncio task) that enters the context. `checks` can also
    decorate a function.

    Args:
        enabled: whether values are checked; they are checked by default.

    Returns:
        A context manager.

    Example:
        >>> import jax.numpy as jnp, softjax
        >>> with softjax.checks(False):
        ...     softjax.cross_entropy(jnp.zeros((2, 3)), jnp.array([0, 7]))
        Array([1.0986123,       nan], dtype=float32)

    Source: `jax.debug_nans` and similar settings, which are switched in the same way.
    """
    token = _CHECKS_ON.set(bool(enabled))
    try:
        yield
    finally:
        _CHECKS_ON.reset(token)


def message(function: str, argument: str, expected: str, got: object) -> str:
    return f"softjax.{function}: `{argument}` must be {expected}, got {got}."


def needs_extra(what: str, package: str, extra: str) -> str:
    return (
        f"{what} needs {package}: run pip install '.[{extra}]' in a checkout of softjax, or "
        f"pip install 'softjax-regression[{extra}]'"
    )


def is_number(option: Any, value: float) -> bool:
    """Whether an option is the Python number `value`; an array with this value is not."""
    return type(option) is not bool and isinstance(option, (int, float)) and option == value


def is_concrete(x: Any) -> bool:
    """Whether this process can read the values of `x` now, because `x` is not traced."""
    if isinstance(x, (list, tuple)):
        return all(map(is_concrete, x))
    return not isinstance(unwrapped(x), Tracer) and getattr(x, "is_fully_addressable", True)


def known(x: Any) -> np.ndarray | None:
    """`x` as a NumPy array, which no trace records; None if its values cannot be read."""
    return np.asarray(unwrapped(x)) if is_concrete(x) else None


def checks_values(x: Any) -> bool:
    """Whether the values of `x` are checked: they can be read, and `checks` is on."""
    return _CHECKS_ON.get() and is_concrete(x)


def holds(good: Callable[..., Any], x: Any, *bounds: Any) -> bool:
    """Whether `good(x, *bounds)` is true everywhere, or the values of `x` are not checked.

    `good` must be a function of the module: a lambda would be compiled in every call. A large array
    on an accelerator is checked there, and only one boolean is transferred.
    """
    if not checks_values(x):
        return True
    if _is_far(x):
        with jax.ensure_compile_time_eval():  # computes the value even within a trace
            return bool(_holds_everywhere(good, bounds, x))
    return bool(good(np.asarray(unwrapped(x)), *bounds).all())


def _is_far(x: Any) -> bool:
    """Whether reading `x` copies many numbers; NumPy reads arrays on a CPU in place."""
    is_large = isinstance(x, Array) and x.size > MOST_READ
    return is_large and any(device.platform != "cpu" for device in x.devices())


@partial(jax.jit, static_argnums=(0, 1))
def _holds_everywhere(good: Callable[..., Array], bounds: tuple[Any, ...], x: Array) -> Array:
    return jnp.all(good(x, *bounds))


REAL, BOOLEAN = "an array of real numbers", "an array of booleans"


def native(function: str, argument: str, x: Any, expected: str = REAL) -> Any:
    """`x` in a dtype of JAX if its values are numbers; otherwise a TypeError that names `x`.

    `x` may be an array of the other byte order, of long doubles or of Python numbers as objects. It
    may also be a table, such as a pandas DataFrame, whose columns have different dtypes. Missing
    entries become NaN, and so do masked ones.
    """
    if isinstance(x, (str, bytes, list, tuple)):  # JAX would take text as the name of a dtype
        if any(isinstance(leaf, (str, bytes)) for leaf in jax.tree.leaves(x)):
            raise TypeError(message(function, argument, expected, "text"))
        return x
    if is_lazy(x):
        got = f"{type(x).__name__}; its method collect() computes a table"
        raise TypeError(message(function, argument, expected, got))
    x = filled(unwrapped(x))
    if isinstance(x, Array) or not hasattr(x, "__array__"):
        return x
    is_table = hasattr(x, "columns")
    # Of numbers beside dates, pandas makes objects, Polars makes numbers, and Arrow an error.
    host = np.asarray(x) if hasattr(x, "iloc") or not is_table else None
    if host is None or (host.dtype.kind not in "biuf" and is_table):
        found = numbers_of_columns(x)
        if isinstance(found, str):
            raise TypeError(message(function, argument, expected, found))
        return found
    values = numbers_of(host)
    if values is None:
        raise TypeError(message(function, argument, expected, f"dtype {host.dtype}"))
    return x if isinstance(x, np.generic) and values is host else values


def array(function: str, argument: str, expected: str, x: Any) -> Array:
    """`x` as an array; if JAX cannot convert it, a TypeError that names its type."""
    if isinstance(x, Array):
        return x
    x = native(function, argument, x, expected)
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError, OverflowError) as error:
        got = type(x).__name__
        if type(x).__module__.startswith("scipy.sparse"):
            got += ": jax.experimental.sparse.BCSR.from_scipy_sparse converts it"
        raise TypeError(message(function, argument, expected, got)) from error


def real_array(function: str, argument: str, x: ArrayLike) -> Array:
    """`x` as an array of real numbers; integers and booleans become the default float."""
    default = jax.dtypes.canonicalize_dtype(float)
    if not isinstance(x, Array):
        x = native(function, argument, x)
        if isinstance(x, (int, np.ndarray, np.generic)) and np.asarray(x).dtype.kind in "iu":
            x = np.asarray(x).astype(default)  # in a JAX array, int64 could overflow to int32
        x = array(function, argument, REAL, x)
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x
    if x.dtype == jnp.bool_ or jnp.issubdtype(x.dtype, jnp.integer):
        return x.astype(default)
    raise TypeError(message(function, argument, REAL, f"dtype {x.dtype}"))


def axes(function: str, axis: Axis, ndim: int) -> tuple[int, ...]:
    """`axis` as a tuple of distinct non-negative integers; None means all of them."""
    if axis is None:
        return tuple(range(ndim))
    if type(axis) is int and -ndim <= axis < ndim:
        return (axis % ndim,)
    try:
        given = tuple(map(operator.index, axis if isinstance(axis, Sequence) else (axis,)))
    except TypeError as error:
        expected = "an integer, a tuple of integers or None"
        raise TypeError(message(function, "axis", expected, repr(axis))) from error
    if ndim == 0 and given:
        raise ValueError(message(function, "axis", "None or () for an array of rank 0", repr(axis)))
    if any(not -ndim <= a < ndim for a in given):
        raise ValueError(message(function, "axis", f"in [{-ndim}, {ndim})", repr(axis)))
    given = tuple(a % ndim for a in given)
    if len(set(given)) != len(given):
        raise ValueError(message(function, "axis", "without repetition", repr(axis)))
    return given


def one_axis(function: str, axis: int, ndim: int) -> int:
    """`axis` as one non-negative integer."""
    if ndim == 0:
        raise ValueError(message(function, "axis", "an axis of an array of rank >= 1", "rank 0"))
    return axes(function, integer(function, "axis", axis), ndim)[0]


def flag(function: str, argument: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(message(function, argument, "True or False", repr(value)))
    return bool(value)


def refuse_uncallable(function: str, argument: str, value: Any) -> None:
    if value is not None and not callable(value):
        raise TypeError(message(function, argument, "a function or None", repr(value)))


def integer(function: str, argument: str, value: Any) -> int:
    """`value` as a known integer; floats, booleans and traced values raise a TypeError."""
    try:
        return operator.index(not_bool(function, argument, value))
    except TypeError as error:
        got = "a traced value" if isinstance(value, Tracer) else repr(value)
        raise TypeError(message(function, argument, "an integer", got)) from error


def at_least(function: str, argument: str, value: Any, bound: int) -> int:
    number = integer(function, argument, value)
    if number < bound:
        raise ValueError(message(function, argument, f">= {bound}", number))
    return number


def mask(function: str, where: ArrayLike | None, shape: tuple[int, ...]) -> Array | None:
    """`where` as a boolean array of `shape`."""
    if where is None:
        return None
    where = array(function, "where", BOOLEAN, where)
    if where.dtype != jnp.bool_:
        raise TypeError(message(function, "where", BOOLEAN, f"dtype {where.dtype}"))
    return broadcast(function, "where", where, shape)


def mask_of_classes(function: str, where: ArrayLike | None, shape: tuple[int, ...]) -> Array | None:
    """`where` as a boolean array of `shape`: a scalar, or an array with every axis of `shape`.

    An array with fewer axes would broadcast as a mask of classes, but users often mean a mask of
    examples, as in optax. With as many examples as classes the mistake would not be noticed, so
    such arrays are refused.
    """
    if where is not None:
        where = array(function, "where", BOOLEAN, where)
        if 0 < where.ndim < len(shape):
            expected = f"of rank {len(shape)}, to broadcast to {shape}"
            text = message(function, "where", expected, f"shape {where.shape}")
            raise ValueError(
                f"{text} A mask of classes is where[..., None, :]. To leave examples out, weight "
                "their losses: softjax.weighted_mean(losses, where)."
            )
    return mask(function, where, shape)


def broadcast(function: str, argument: str, x: Array, shape: tuple[int, ...]) -> Array:
    """`x` broadcast to `shape`; an error if the result would have a larger shape."""
    try:
        return jnp.broadcast_to(x, shape)
    except ValueError as error:
        expected = f"of a shape that broadcasts to {shape}"
        raise ValueError(message(function, argument, expected, f"shape {x.shape}")) from error


def same_shape(function: str, argument: str, x: ArrayLike, shape: tuple[int, ...]) -> None:
    if (given := shape_of(x)) != shape:
        raise ValueError(message(function, argument, f"of shape {shape}", f"shape {given}"))


def shape_of(x: ArrayLike) -> tuple[int, ...]:
    """The shape of an array, also of sparse features, which `jnp.shape` refuses."""
    known = getattr(x, "shape", None)
    return jnp.asarray(x).shape if known is None else known


def not_bool(function: str, argument: str, x: Any) -> Any:
    """`x`, one or more numbers: True and False are refused, since they would count as 1 and 0."""
    dtypes = (getattr(leaf, "dtype", type(leaf)) for leaf in jax.tree.leaves(x))
    if any(getattr(dtype, "kind", dtype) in ("b", bool) for dtype in dtypes):
        raise TypeError(message(function, argument, "a number", repr(x)))
    return x


def scalar(function: str, argument: str, x: ArrayLike, dtype: DTypeLike, remedy: str = "") -> Any:
    """`x` as a real scalar of `dtype`, traced or not; infinite if it overflows `dtype`."""
    with np.errstate(over="ignore"):
        if type(x) in (int, float):  # making a JAX array would take as long as many calls
            return np.asarray(x, dtype)
        number = real_array(function, argument, not_bool(function, argument, x))
    if number.ndim:
        raise ValueError(message(function, argument, "a scalar", f"shape {number.shape}{remedy}"))
    return number.astype(dtype)


def positive_scalar(
    function: str, argument: str, x: ArrayLike, dtype: DTypeLike, remedy: str = ""
) -> Any:
    """`x` as a scalar > 0 of `dtype`; under a trace a value <= 0 becomes NaN.

    A subnormal number is refused too: XLA:CPU reads it as 0, and quotients by it are infinite.
    """
    number = scalar(function, argument, x, dtype, remedy)
    least = float(jnp.finfo(dtype).tiny)
    if not checks_values(x):
        return jnp.where(number >= least, number, jnp.nan)
    value = np.asarray(unwrapped(x))
    if not value > 0:
        raise ValueError(message(function, argument, "> 0", value))
    if value < least:
        expected = f">= {least:.3g}, the smallest positive normal number of {jnp.dtype(dtype)}"
        raise ValueError(message(function, argument, expected, value))
    return number


def nan_where(bad: Array | None, x: Array) -> Array:
    """`x`, with NaN where it is `bad`.

    If no entry can be bad, no NaN constant is made: `jax_debug_nans` would stop at it.
    """
    if bad is None or (is_concrete(bad) and not np.any(bad)):
        return x
    return jnp.where(bad, jnp.nan, x)


def unit_interval(function: str, argument: str, x: ArrayLike, dtype: DTypeLike) -> Any:
    """`x` as a scalar in [0, 1] of `dtype`; under a trace a value outside becomes NaN."""
    return _between(function, argument, x, dtype, 1, "a number in [0, 1]")


def not_negative_scalar(function: str, argument: str, x: ArrayLike, dtype: DTypeLike) -> Any:
    """`x` as a finite scalar >= 0 of `dtype`; under a trace any other value becomes NaN."""
    largest = float(jnp.finfo(dtype).max)
    return _between(function, argument, x, dtype, largest, "a finite number >= 0")


def _between(
    function: str, argument: str, x: ArrayLike, dtype: DTypeLike, largest: float, expected: str
) -> Any:
    number = scalar(function, argument, x, dtype)
    if not checks_values(x):
        return jnp.where((number >= 0) & (number <= largest), number, jnp.nan)
    value = np.asarray(unwrapped(x))
    if not 0 <= value <= largest:
        raise ValueError(message(function, argument, expected, value))
    return number


def not_negative_number(function: str, argument: str, value: Any) -> float:
    """`value` as a finite float >= 0."""
    expected = "a finite number >= 0"
    try:
        if isinstance(value, str | bytes | bool | np.bool_):  # float would read them
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        got = "a traced value" if isinstance(value, Tracer) else repr(value)
        raise TypeError(message(function, argument, expected, got)) from error
    if not 0 <= number < np.inf:
        raise ValueError(message(function, argument, expected, number))
    return number


def weights(
    function: str, argument: str, x: ArrayLike | None, shape: tuple[int, ...], dtype: DTypeLike
) -> Array | None:
    """Optional weights >= 0 as an array of `shape` and `dtype`."""
    if x is None:
        return None
    array = real_array(function, argument, x)
    same_shape(function, argument, array, shape)
    not_negative(function, argument, x)
    return array.astype(dtype)


def not_negative(function: str, argument: str, x: ArrayLike) -> None:
    """Raises ValueError if a known value is negative or NaN."""
    if not holds(operator.ge, x, 0):
        raise ValueError(message(function, argument, ">= 0", np.asarray(unwrapped(x)).min()))


def refuse_first(function: str, argument: str, expected: str, values, bad) -> None:
    """Raises ValueError if any known value is bad, and names the first one with its index."""
    if bad.any():
        place = tuple(np.argwhere(np.asarray(bad))[0].tolist())
        raise ValueError(message(function, argument, expected, f"{values[place]} at {place}"))


def same_rank(function: str, argument: str, x: Array, ndim: int) -> None:
    if x.ndim != ndim:
        raise ValueError(message(function, argument, f"of rank {ndim}", f"shape {x.shape}"))
