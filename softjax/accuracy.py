"""The accuracy of softjax, jax.nn and optax on the current device, against exact references.

Errors are measured in units in the last place (ulp) of the exact result. The condition number of
exp(x - max) is |x - max|. An implementation that does not compensate the rounding of x - max can
therefore have an error, in ulp, of a constant plus the gap between the two largest logits. This is
the bound in the rows below.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from jax import Array

from softjax import _checks
from softjax._cross_entropy import cross_entropy
from softjax._logsumexp import logsumexp
from softjax._softmax import log_softmax, softmax

__all__ = ["Row", "measure"]

SIZES = (2, 3, 10, 32, 128, 1000, 4096, 32000)
QUICK_SIZES = (2, 10, 1000)
SCALES = (0.1, 1.0, 8.0, 40.0)
OFFSETS = (0.0, -30.0, 1e3, 1e5)
GAPS = (5.0, 10.0, 20.0, 40.0, 60.0)
EXACT_ENTRIES = 15_000  # the number of 200-bit entries in one sweep, about 40 us each


class Row(NamedTuple):
    """The accuracy of one function in one dtype.

    Attributes:
        function: the name of the function.
        dtype: the dtype of the logits.
        unit: the unit of the errors: "ulp", "float32 ulp", "relative" or "of the largest"
            (eigenvalue).
        softjax: the largest error of softjax.
        peer: the largest error of the peer.
        peer_name: "jax.nn" or "optax".
        goal: the bound, in words.
        ratio: the largest ratio of an error of softjax to its bound.
        ok: whether every error of softjax is within its bound.
    """

    function: str
    dtype: str
    unit: str
    softjax: float
    peer: float
    peer_name: str
    goal: str
    ratio: float
    ok: bool


_Function = Callable[[Array, Array], Array]  # a function of logits and labels


class _Sweep(NamedTuple):
    """Logits [N, K], labels [N], and parts of the exact results, which have rank 2 like x."""

    x: np.ndarray
    labels: np.ndarray
    top: np.ndarray  # the first maximal entry
    m: np.ndarray
    d: np.ndarray  # x - m
    e: np.ndarray  # exp(d)
    r: np.ndarray  # sum of e over all entries but the top
    gap: np.ndarray  # the top minus the second largest entry; 0 if that is -inf


class _Exact(NamedTuple):
    value: np.ndarray
    scale: np.ndarray  # the number whose last place is the unit of the error
    slack: np.ndarray  # the part of the bound beyond 5 ulp


class _Quantity(NamedTuple):
    name: str
    goal: str
    peer_name: str
    exact: Callable[[_Sweep], _Exact]
    functions: tuple[_Function, ...]  # the functions of softjax and of the peer
    at_least_float32: bool = False


def measure(quick: bool = False, progress: Callable[[int, int], None] | None = None) -> list[Row]:
    """Measures the accuracy of the normalizers, the loss and their derivatives.

        error = max |computed - exact|,   over logits of many lengths, scales and offsets,
                                          with dominated rows, ties, near ties and -inf

    The reference is NumPy float64 for float32 and half precision, and 200-bit arithmetic for
    float64. float64 is measured only if 64-bit types are on.

    Args:
        quick: use three lengths instead of eight, which takes seconds instead of a minute.
        progress: a function that is called with the number of finished steps and of all steps.

    Returns:
        One row for each function and dtype.

    Raises:
        ModuleNotFoundError: mpmath is not installed; the extra `cli` installs it.

    Example:
        >>> from softjax.accuracy import measure
        >>> all(row.ok for row in measure(quick=True))
        True

    Source:
        P. Blanchard, D. J. Higham and N. J. Higham, "Accurately computing the log-sum-exp and
        softmax functions", IMA J. Numer. Anal. 41 (2021), doi 10.1093/imanum/draa038.
    """
    kinds = [jnp.float32, jnp.bfloat16, jnp.float16]
    if jnp.asarray(0.0).dtype == np.float64:
        kinds.append(jnp.float64)
    sizes = QUICK_SIZES if quick else SIZES
    total, done = len(kinds) * len(sizes), 0
    rows: list[Row] = []
    for dtype in map(np.dtype, kinds):
        worst = np.zeros((len(_QUANTITIES), 3))
        for size in sizes:
            sweep = _sweep(size, dtype)
            results = _results(sweep)
            errors = [_errors(quantity, sweep, dtype, results) for quantity in _QUANTITIES]
            worst = np.maximum(worst, errors)
            done += 1
            if progress is not None:
                progress(done, total)
        rows += [_row(quantity, dtype, *w) for quantity, w in zip(_QUANTITIES, worst, strict=True)]
        if dtype.itemsize >= 4:
            rows += _hessian_rows(dtype)
    return rows


# The quantities


def _exact_logsumexp(s: _Sweep) -> _Exact:
    value = s.m + _log1p(s.r)
    return _Exact(value, abs(value) + _log1p(s.r), s.gap)


def _exact_log_softmax(s: _Sweep) -> _Exact:
    value = s.d - _log1p(s.r)
    return _Exact(value, value, s.gap)


def _exact_softmax(s: _Sweep) -> _Exact:
    value = s.e / (1 + s.r)
    return _Exact(value, value, np.maximum(-_finite(s.d), s.gap))


def _exact_cross_entropy(s: _Sweep) -> _Exact:
    label = s.labels[:, None]
    value = _log1p(s.r) - np.take_along_axis(s.d, label, -1)
    return _Exact(value, value, s.gap)


def _exact_gradient(s: _Sweep) -> _Exact:
    softmax = _exact_softmax(s)
    index = np.arange(s.x.shape[-1])
    complement = np.where(index == s.top, s.r / (1 + s.r), 1 - softmax.value)
    value = np.where(index == s.labels[:, None], -complement, softmax.value)
    return _Exact(value, value, softmax.slack)


def _of_logits(*functions: Callable[..., Array], **options) -> Any:
    return tuple(lambda x, _, f=f: f(x, **options) for f in functions)


def _gradient(loss: _Function) -> _Function:
    return jax.grad(lambda x, labels: jnp.sum(loss(x, labels).astype(jnp.float32)))


_each_row = {"axis": -1, "keepdims": True}
_optax_loss = optax.losses.softmax_cross_entropy_with_integer_labels
_losses = (
    lambda x, labels: cross_entropy(x, labels)[:, None],
    lambda x, labels: _optax_loss(x, labels)[:, None],
)
_QUANTITIES = (
    _Quantity(
        "logsumexp",
        "5 + gap",
        "jax.nn",
        _exact_logsumexp,
        _of_logits(logsumexp, jax.nn.logsumexp, **_each_row),
    ),
    _Quantity(
        "log_softmax",
        "5 + gap",
        "jax.nn",
        _exact_log_softmax,
        _of_logits(log_softmax, jax.nn.log_softmax),
    ),
    _Quantity(
        "softmax", "5 + (max - x)", "jax.nn", _exact_softmax, _of_logits(softmax, jax.nn.softmax)
    ),
    _Quantity(
        "cross_entropy", "5 + gap", "optax", _exact_cross_entropy, _losses, at_least_float32=True
    ),
    _Quantity(
        "its gradient", "5 + (max - x)", "optax", _exact_gradient, tuple(map(_gradient, _losses))
    ),
)


def _results(sweep: _Sweep) -> dict[_Function, Array]:
    """The results of all functions by one program, which shares nothing between them."""
    functions = list(dict.fromkeys(f for quantity in _QUANTITIES for f in quantity.functions))

    @jax.jit
    def every(arguments: list[tuple[Array, Array]]) -> list[Array]:
        return [f(*own) for f, own in zip(functions, arguments, strict=True)]

    own = jnp.asarray(sweep.x), jnp.asarray(sweep.labels)
    return dict(zip(functions, every([own] * len(functions)), strict=True))


def _errors(
    quantity: _Quantity, sweep: _Sweep, dtype: np.dtype, results: dict[_Function, Array]
) -> np.ndarray:
    """The largest errors of softjax and of the peer in ulp, and of softjax over its bound."""
    exact = quantity.exact(sweep)
    result = np.promote_types(dtype, np.float32) if quantity.at_least_float32 else dtype
    unit = np.spacing(np.abs(_finite(exact.scale)).astype(result)).astype(np.float64)
    # XLA flushes results below the smallest normal number to zero, in at most K terms of a sum.
    floor = sweep.x.shape[-1] * float(_info(np.promote_types(dtype, np.float32)).tiny)
    allowed = 5 + exact.slack if result.itemsize >= 4 else 0.51

    def ulps(function: _Function) -> np.ndarray:
        computed = np.asarray(results[function])
        with np.errstate(invalid="ignore"):  # -inf - -inf
            error = np.abs(computed.astype(np.float64) - exact.value).astype(np.float64)
        same = computed.astype(np.float64) == exact.value
        error = np.where(same, 0, np.where(np.isnan(error), np.inf, error))
        return np.maximum(error - floor, 0) / unit

    ours, theirs = map(ulps, quantity.functions)
    return np.array([np.max(ours), np.max(theirs), np.max(ours / allowed)])


def _row(quantity: _Quantity, dtype: np.dtype, ours: float, theirs: float, ratio: float) -> Row:
    unit, goal = "ulp", quantity.goal
    if dtype.itemsize < 4:
        unit, goal = ("float32 ulp", goal) if quantity.at_least_float32 else (unit, "0.51")
    errors = float(ours), float(theirs)
    return Row(
        quantity.name, dtype.name, unit, *errors, quantity.peer_name, goal, float(ratio), ratio <= 1
    )


# The logits


def _sweep(size: int, dtype: np.dtype) -> _Sweep:
    rng = np.random.default_rng(size)
    x = np.concatenate([block.astype(dtype) for block in _logits(rng, size, dtype)])
    # For a near tie, the second largest entry is set to the number just below the largest.
    near = np.sort(x[:4], -1)
    near[:, -2] = np.nextafter(near[:, -1], dtype.type(-np.inf))
    x = np.concatenate([x, rng.permuted(near, axis=-1)])
    if dtype == np.float64:
        x = x[:: -(-x.size // EXACT_ENTRIES)]
    return _reference(x, _labels(rng, x))


def _logits(rng: np.random.Generator, size: int, dtype: np.dtype) -> Iterator[np.ndarray]:
    repeats = 8 if size <= 32 else 1
    largest = float(_info(dtype).max)
    for scale in SCALES:
        for offset in OFFSETS:
            if abs(offset) < largest:
                yield offset + scale * rng.standard_normal((repeats, size))
    for gap in GAPS:
        dominated = rng.standard_normal((4, size))
        dominated[:, rng.integers(size)] = dominated.max(-1) + gap
        dominated[::2] -= dominated[::2].max(-1, keepdims=True)  # the top at 0
        yield dominated
    yield rng.integers(-2, 2, (4, size)).astype(np.float64)  # ties
    masked = rng.standard_normal((4, size))
    masked[:, rng.permutation(size)[: size // 2]] = -np.inf
    yield masked


def _labels(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """The top of a row, or any of its finite entries, with equal chances."""
    x = x.astype(np.float64)
    drawn = np.argmax(np.where(np.isfinite(x), rng.random(x.shape), -1), -1)
    return np.where(rng.random(len(x)) < 0.5, np.argmax(x, -1), drawn).astype(np.int32)


def _reference(x: np.ndarray, labels: np.ndarray) -> _Sweep:
    values = _in_200_bits(x) if x.dtype == np.float64 else x.astype(np.float64)
    top = np.argmax(values, -1)[:, None]
    m = np.take_along_axis(values, top, -1)
    d = values - m
    e = _exp(d)
    rest = e.copy()
    np.put_along_axis(rest, top, 0, -1)
    runner_up = np.sort(x.astype(np.float64), -1)[:, -2:-1]
    gap = np.where(np.isfinite(runner_up), m.astype(np.float64) - _finite(runner_up), 0)
    return _Sweep(x, labels, top, m, d, e, rest.sum(-1, keepdims=True), gap)


# The Hessian of logsumexp


def _hessian_rows(dtype: np.dtype) -> list[Row]:
    rng = np.random.default_rng(0)
    x = 20 * rng.standard_normal((60, 6))
    x[:5] = rng.standard_normal((5, 6))
    x[:5, 0] += GAPS
    x[5] = [0, -20, -20, -20, -20, -20]
    x = x.astype(dtype)
    s = _reference(_in_200_bits(x), np.zeros(len(x), np.int32))
    p = s.e / (1 + s.r)
    exact = -p[:, :, None] * p[:, None, :]
    diagonal = np.arange(x.shape[-1])
    complement = np.where(diagonal == s.top, s.r / (1 + s.r), 1 - p)
    exact[:, diagonal, diagonal] = p * complement
    exact = exact.astype(np.float64)

    tiny = float(_info(dtype).tiny)
    normal = np.abs(exact) >= tiny

    def errors(function: Callable[[Array], Array]) -> tuple[float, float]:
        computed = np.asarray(jax.jit(jax.vmap(jax.hessian(function)))(jnp.asarray(x)), np.float64)
        relative = np.abs(computed - exact) / np.where(normal, np.abs(exact), 1)
        eigenvalues = np.linalg.eigvalsh((computed + computed.swapaxes(-1, -2)) / 2)
        negative = np.maximum(-eigenvalues[:, 0], 0) / np.maximum(eigenvalues[:, -1], tiny)
        return float(np.max(relative[normal])), float(np.max(negative))

    entries, eigenvalues = zip(errors(logsumexp), errors(jax.nn.logsumexp), strict=True)
    return [
        Row(
            name,
            dtype.name,
            unit,
            *worst,
            "jax.nn",
            goal,
            ratio := worst[0] / float(goal),
            ratio <= 1,
        )
        for name, unit, worst, goal in (
            ("Hessian of logsumexp", "relative", entries, "1e-5"),
            ("its negative eigenvalues", "of the largest", eigenvalues, "1e-6"),
        )
    ]


# Arithmetic: float64, or arrays of 200-bit numbers


def _context() -> Any:
    try:
        import mpmath  # imported here because only the exact references need it
    except ModuleNotFoundError as error:
        needs = _checks.needs_extra("softjax.accuracy", "mpmath", "cli")
        raise ModuleNotFoundError(f"{needs}.", name="mpmath") from error
    context: Any = mpmath.mp.clone()
    context.prec = 200
    return context


def _in_200_bits(x: np.ndarray) -> np.ndarray:
    convert = _context().mpf
    return np.frompyfunc(lambda v: convert(float(v)), 1, 1)(x)


def _exp(x: np.ndarray) -> np.ndarray:
    return np.frompyfunc(_context().exp, 1, 1)(x) if x.dtype == object else np.exp(x)


def _log1p(x: np.ndarray) -> np.ndarray:
    return np.frompyfunc(_context().log1p, 1, 1)(x) if x.dtype == object else np.log1p(x)


def _finite(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return np.where(np.isfinite(x), x, 0)


def _info(dtype: np.dtype) -> Any:
    return ml_dtypes.finfo(dtype)
