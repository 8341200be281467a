"""Normalizers, entropy and loss, with their derivatives, compared with exact arithmetic."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import softjax
from tests import oracles
from tests.campaign import Failure, Outcome

NAME = "functions"
FIGURE = "the error over what the dtype allows: 6 + gap ulp, and roundings of the sums"

DTYPES = (np.float32, np.float64, ml_dtypes.bfloat16, np.float16)
MODES = ("eager", "jit", "vmap", "map", "vjp", "jvp")
CLASSES = (1, 2, 3, 5, 8, 10, 24, 25, 33, 63, 64, 65, 100, 257, 1000)
ROWS = (1, 2, 3, 5, 8, 64, 65, 300, 4096)
MOST_LOGITS = 40_000
MOST_EXACT = 300  # logits in 200-bit arithmetic, which is for float64
MOST_DERIVATIVES = 300_000  # entries of a Jacobian


class Result(NamedTuple):
    """The expected result for logits [N, K].

    Attributes:
        value: [N, J].
        scale: the numbers whose unit in the last place is the unit of the error.
        jacobian: [N, J, K], the derivative of the J outputs of a row by its logits.
        terms: the size of the terms that the entries of the Jacobian sum up.
    """

    value: np.ndarray
    scale: np.ndarray
    jacobian: np.ndarray
    terms: np.ndarray


class Case(NamedTuple):
    """Logits [N, K] of a dtype, the mask of the entries that count, and the function's options."""

    x: np.ndarray
    where: np.ndarray | None
    labels: np.ndarray
    options: dict[str, Any]
    words: str


# The functions: expected values, from exact or float64 logits z in which what is masked is -inf


def distribution(logarithm: bool, sign: int = 1) -> Callable[..., Result]:
    def expected(z, temperature):
        z = np.where(z == -np.inf, -np.inf, sign * z / temperature)
        p = oracles.softmax(z)
        if logarithm:
            value = oracles.log_softmax(z)
            jacobian = (np.eye(z.shape[-1]) - p[:, None, :]) / temperature
        else:
            value, jacobian = p, sign * oracles.hessian(z) / temperature
        return Result(value, value, jacobian, jacobian)

    return expected


def log_sum(sign: int = 1, mean: bool = False) -> Callable[..., Result]:
    def expected(z, count, temperature=1.0):
        scaled = np.where(z == -np.inf, -np.inf, sign * z / temperature)
        y, p = oracles.logsumexp(scaled)[:, None], oracles.softmax(scaled)[:, None, :]
        top = np.where(y == -np.inf, 0, scaled.max(-1, keepdims=True))
        scale = np.abs(y) + np.where(y == -np.inf, 0, y) - top
        if mean:
            zeros = np.where(np.arange(z.shape[-1]) < count[:, None], 0 * top, -np.inf)
            log_count = np.where(count > 0, oracles.logsumexp(zeros), 0)[:, None]
            y, scale = y - log_count, scale + log_count
        return Result(sign * temperature * y, temperature * scale, p, p)

    return expected


def loss(z, labels, **options) -> Result:
    value = oracles.cross_entropy(z, labels, **options)[:, None]
    gradient = oracles.cross_entropy_gradient(z, labels, **options)[:, None, :]
    weights = options.get("class_weights", np.ones(z.shape[-1]))
    p, lse = oracles.softmax(z), oracles.logsumexp(z)[:, None]
    slope = np.abs(2 * options.get("z_loss", 0.0) * np.where(lse == -np.inf, 0, lse))
    is_label = labels[:, None] == np.arange(z.shape[-1])
    terms = p * (weights.max() + slope)
    if "label_smoothing" in options or "class_weights" in options or "z_loss" in options:
        terms = terms + np.where(is_label, weights.max(), options.get("label_smoothing", 0.0))
    else:
        terms = np.abs(gradient[:, 0])
    return Result(value, value, gradient, terms[:, None, :])


def entropy(z) -> Result:
    p, log_p = oracles.softmax(z), oracles.log_softmax(z)
    log_p = np.where(p > 0, log_p, 0)
    value = -(p * log_p).sum(-1)[:, None]
    jacobian = -p * (log_p + value)
    terms = p * (np.abs(log_p) + value)
    return Result(value, value, jacobian[:, None, :], terms[:, None, :])


FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Result]]] = {
    "logsumexp": (softjax.logsumexp, log_sum()),
    "logmeanexp": (softjax.logmeanexp, log_sum(mean=True)),
    "smooth_max": (softjax.smooth_max, log_sum()),
    "smooth_min": (softjax.smooth_min, log_sum(-1)),
    "softmax": (softjax.softmax, distribution(logarithm=False)),
    "log_softmax": (softjax.log_softmax, distribution(logarithm=True)),
    "softmin": (softjax.softmin, distribution(logarithm=False, sign=-1)),
    "entropy": (softjax.information.entropy, entropy),
    "cross_entropy": (softjax.cross_entropy, loss),
}
SUMS = ("logsumexp", "logmeanexp", "smooth_max", "smooth_min")
NEGATED = ("softmin", "smooth_min")  # of -inf they are as the others are of +inf


# The case


def run(rng: np.random.Generator) -> Outcome:
    name, mode = (str(rng.choice(names)) for names in (list(FUNCTIONS), MODES))
    case = draw(rng, name)
    numbers = case.x.astype(np.float64)
    if case.where is not None:
        numbers = np.where(case.where, numbers, -np.inf)
    not_a_number = np.isnan(numbers).any(-1)
    numbers = np.where(not_a_number[:, None], 0, numbers)
    is_empty = np.isneginf(numbers).all(-1, keepdims=True)
    gap = gaps(numbers, name, case.options.get("temperature", 1.0))
    if case.x.dtype == np.float64:
        numbers = oracles.exact(numbers)
    of_rows = {}
    if name == "cross_entropy":
        of_rows["labels"] = case.labels
    elif name in SUMS:
        counted = np.ones(case.x.shape, bool) if case.where is None else case.where
        of_rows["count"] = counted.sum(-1)
    expected = FUNCTIONS[name][1](numbers, **of_rows, **case.options)
    tangent = rng.standard_normal(case.x.shape).astype(case.x.dtype)
    cotangent = rng.standard_normal(expected.value.shape)
    computed, cotangent = compute(name, mode, case, tangent, cotangent)
    if mode == "vjp":
        if case.where is not None and cotangent.shape == case.where.shape:
            cotangent = np.where(case.where, cotangent, 0)  # a masked result is a constant
        ratio, exact = of_derivative(computed, expected, gap, case.x.dtype, cotangent, "njk,nj->nk")
    elif mode == "jvp":
        ratio, exact = of_derivative(computed, expected, gap, case.x.dtype, tangent, "njk,nk->nj")
    else:
        ratio, exact = of_value(computed, expected, gap)
    # A row with NaN is NaN, but where it is masked or ignored. What is masked has no tangent, and a
    # row of -inf no derivative.
    hidden = np.zeros((), bool)
    if case.where is not None and computed.shape == case.x.shape:
        hidden = ~case.where
    without = is_empty | hidden if mode == "jvp" else is_empty
    if mode in ("jvp", "vjp"):
        ratio = np.where(without & (computed == 0), 0, ratio)
    if case.options.get("ignore_index") is not None:
        not_a_number &= case.labels != case.options["ignore_index"]
    nan = np.isnan(computed) | hidden
    ratio = np.where(not_a_number[:, None], np.where(nan, 0, np.inf), ratio)
    worst = float(np.max(ratio))
    if not worst <= 1:
        row, column = np.unravel_index(np.argmax(ratio), ratio.shape)
        raise Failure(
            f"{name} {mode} {case.words}: {worst:.3g} times the error that is allowed at "
            f"[{row}, {column}]: got {computed[row, column]!s}, expected {exact[row, column]:.9g}"
        )
    return Outcome(worst, mode)


def draw(rng: np.random.Generator, name: str) -> Case:
    dtype = DTYPES[rng.integers(len(DTYPES))]
    most = MOST_EXACT if dtype == np.float64 else MOST_LOGITS
    classes = int(rng.choice([k for k in CLASSES if k <= most]))
    rows = int(
        rng.choice(
            [
                n
                for n in ROWS
                if n == 1 or (n * classes <= most and n * classes**2 <= MOST_DERIVATIVES)
            ]
        )
    )
    scale = float(rng.choice([0.01, 1.0, 3.0, 30.0]))
    offset = float(rng.choice([0.0, 0.0, 100.0, -3000.0]))
    x = offset + scale * rng.standard_normal((rows, classes))
    words = [f"[{rows}, {classes}] {np.dtype(dtype)} scale {scale} offset {offset}"]
    how = rng.random()
    if how < 0.15:
        x = offset + rng.integers(-2, 3, (rows, classes))
        words.append("ties")
    elif how < 0.4:
        gap = float(rng.choice([3.0, 12.0, 18.0, 40.0, 80.0]))
        x[:, rng.integers(classes)] = x.max(-1) + gap
        words.append(f"dominated by {gap}")
    if rng.random() < 0.25 and name not in NEGATED:
        x[rng.random((rows, classes)) < rng.choice([0.1, 0.9])] = -np.inf
        words.append("-inf")
    if rng.random() < 0.1:
        x[rng.integers(rows), rng.integers(classes)] = np.nan
        words.append("a NaN")
    where = None
    if rng.random() < 0.3:
        shape = (rows, classes) if rng.random() < 0.5 else (1, classes)
        where = np.broadcast_to(rng.random(shape) < rng.choice([0.2, 0.7]), x.shape)
        words.append(f"where {shape}")
    x = x.astype(dtype)
    labels, options = draw_options(rng, name, x.astype(np.float64), where)
    words.append(str({key: np.asarray(value).tolist() for key, value in options.items()})[:80])
    return Case(x, where, labels, options, ", ".join(words))


def draw_options(rng, name, x, where) -> tuple[np.ndarray, dict[str, Any]]:
    """Draws options and labels: in half of the rows the most probable class, never a masked one."""
    if name in ("softmax", "log_softmax", "softmin", "smooth_max", "smooth_min"):
        return np.zeros(len(x), int), {"temperature": float(rng.choice([1, 1, 0.5, 2, 0.25, 3]))}
    if name != "cross_entropy":
        return np.zeros(len(x), int), {}
    open_classes = np.isfinite(x) if where is None else np.isfinite(x) & where
    best = np.argmax(np.where(open_classes, x, -np.inf), -1)
    labels = rng.integers(x.shape[1], size=len(x))
    is_open = np.take_along_axis(open_classes, labels[:, None], -1)[:, 0]
    labels = np.where((rng.random(len(x)) < 0.5) | ~is_open, best, labels)
    options: dict[str, Any] = {}
    if rng.random() < 0.3:
        options["ignore_index"] = int(labels[0])
    if rng.random() < 0.3 and open_classes.all():
        options["label_smoothing"] = float(rng.choice([0.125, 0.5, 1.0]))
    if rng.random() < 0.3:
        options["z_loss"] = 0.25
    if rng.random() < 0.3:
        options["class_weights"] = rng.integers(0, 5, x.shape[1]) / 4
    return labels, options


def compute(name, mode, case, tangent, cotangent) -> tuple[np.ndarray, np.ndarray]:
    """The value [N, J] or its derivative, and the cotangent rounded to the dtype of the value."""
    function, shape = FUNCTIONS[name][0], cotangent.shape
    rows = {"x": jnp.asarray(case.x)}
    if case.where is not None:
        rows["where"] = jnp.asarray(case.where)
    if name == "cross_entropy":
        rows["labels"] = jnp.asarray(case.labels)

    def call(rows):
        rows = dict(rows)
        x = rows.pop("x")
        first = (x, rows.pop("labels")) if "labels" in rows else (x,)
        return function(*first, axis=-1, **rows, **case.options)

    def of_x(x):
        return call({**rows, "x": x})

    if mode == "eager":
        result = call(rows)
    elif mode == "jit":
        result = jax.jit(call)(rows)
    elif mode == "vmap":
        result = jax.vmap(call)(rows)
    elif mode == "map":
        result = jax.jit(lambda rows: jax.lax.map(call, rows))(rows)
    elif mode == "jvp":
        derivative = jax.jit(lambda x, t: jax.jvp(of_x, (x,), (t,))[1])
        result = derivative(rows["x"], jnp.asarray(tangent))
    else:
        y = jax.eval_shape(of_x, rows["x"])
        cotangent = jnp.asarray(cotangent.reshape(y.shape)).astype(y.dtype)
        result = jax.jit(lambda x, c: jax.vjp(of_x, x)[1](c)[0])(rows["x"], cotangent)
        return np.asarray(result), np.asarray(cotangent, np.float64).reshape(shape)
    return np.asarray(result).reshape(shape), cotangent


# What is allowed


class Gaps(NamedTuple):
    """(max - x) / T of the logits [N, K], 0 for masked entries, and of the runner-up [N, 1].

    It is doubled if the division by T rounds as well.
    """

    each: np.ndarray
    runner_up: np.ndarray


def gaps(x: np.ndarray, name: str, temperature: float) -> Gaps:
    takes_part = np.isfinite(x)
    x = np.where(takes_part, -x if name in NEGATED else x, -np.inf)
    top = np.max(x, -1, keepdims=True)
    gap = np.where(takes_part, np.where(takes_part, top, 0) - np.where(takes_part, x, 0), np.inf)
    gap = gap if temperature == 1 else 2 * gap / temperature
    runner_up = np.sort(gap, -1)[:, min(1, gap.shape[1] - 1), None]
    return Gaps(*(np.where(np.isfinite(part), part, 0) for part in (gap, runner_up)))


def of_value(computed, expected: Result, gap) -> tuple[np.ndarray, np.ndarray]:
    """The errors divided by the allowed ones, and the exact results."""
    dtype = computed.dtype
    slack = gap.runner_up
    if expected.value.shape[1] == gap.each.shape[1]:
        slack = np.maximum(slack, gap.each)
    scale = np.abs(oracles.rounded(expected.scale))
    scale = np.where(np.isfinite(scale), scale, 0).astype(dtype)
    allowed = np.spacing(scale).astype(np.float64) * (6 + slack if dtype.itemsize > 2 else 0.52)
    return share(computed, expected.value, allowed + flushed(gap, dtype))


def of_derivative(computed, expected: Result, gap, dtype, direction, contraction):
    """The same for a product with the Jacobian, whose entries are as accurate as a softmax."""
    jacobian, terms = (oracles.rounded(part) for part in (expected.jacobian, expected.terms))
    direction = direction.astype(np.float64)
    value = np.einsum(contraction, jacobian, direction)
    each = gap.each
    roundings = 8 + 2 * each[:, None, :] + np.sqrt(each.shape[1])
    if terms.shape[1] == each.shape[1]:
        roundings = roundings + 2 * each[:, :, None]
    error = float(ml_dtypes.finfo(np.promote_types(dtype, np.float32)).eps) * roundings
    allowed = np.einsum(contraction, error * np.abs(terms), np.abs(direction))
    if computed.dtype.itemsize == 2:
        allowed = allowed + 0.52 * float(ml_dtypes.finfo(computed.dtype).eps) * np.abs(value)
    return share(computed, value, allowed + 8 * flushed(gap, computed.dtype))


def flushed(gap, dtype) -> float:
    """The error if XLA replaces subnormal numbers by 0, once for each class."""
    smallest = float(ml_dtypes.finfo(np.promote_types(dtype, np.float32)).tiny)
    rounding = float(ml_dtypes.finfo(dtype).smallest_subnormal) if dtype.itemsize == 2 else 0.0
    return gap.each.shape[1] * smallest + rounding


def share(computed, expected, allowed) -> tuple[np.ndarray, np.ndarray]:
    computed, expected = computed.astype(np.float64), oracles.rounded(expected)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(computed == expected, 0, np.abs(computed - expected) / allowed)
    return np.where(np.isnan(ratio), np.inf, ratio), expected
