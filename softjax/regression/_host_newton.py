"""Newton's method in NumPy, for small tables and for sparse features in the memory of the host.

For a small table, the program of a fit takes seconds to compile and milliseconds to run, and on a
CPU its products with a sparse matrix are slower than SciPy's. So such data are fitted here by the
steps of "newton-cg", without compilation, in float64 whatever their dtype.

    d = -H^-1 g,    theta <- theta + t d

Only a clear end is accepted: the parameters, rounded to the dtype of the features, satisfy the rule
of all solvers (`_loop`), the curvature is known in every direction, and no step near the end
moved an example far. All other fits, such as those of separated classes or collinear features, are
left to the compiled solvers, which distinguish these cases.

As in `_objective` parameters are [K, D + 1] and logits [K, N]; without an intercept parameters are
[K, D]. Directions are computed for features with mean 0 and standard deviation 1.

Source: J. Nocedal and S. J. Wright, "Numerical Optimization" (2006), algorithms 5.3 and 7.1.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from softjax.regression._descent import MIN_FRACTION, OVERSHOOT, SLOPE_LEFT, TRIALS
from softjax.regression._features import is_sparse
from softjax.regression._host_arrays import is_on_host, placed
from softjax.regression._host_preconditioner import CLEAR, MOST_COLUMNS, diagonal, kronecker
from softjax.regression._linear_solves import CG_STEPS, FINE, ROUGH, conjugate_gradients_in_numpy
from softjax.regression._loop import NEAR, NEWTONIAN, OUTLYING, STILL, converged, is_separated
from softjax.regression._model import SoftmaxRegression
from softjax.regression._objective import centred
from softjax.regression._problem import Data
from softjax.regression._result import FitResult, Status
from softjax.regression._table import (
    End,
    Table,
    curved,
    from_standard,
    probabilities,
    table_of,
    targets_of,
    to_standard,
)

# A table is not small if its features and logits have more numbers than this, or if it has
# MOST_COLUMNS columns or more: the compiled program is then faster.
MOST_NUMBERS = 2**18
# A fit with a clear end takes fewer steps.
MOST_STEPS = 40
# After this much work, N K (D + 16) per product with the features, about a second has passed, and
# the compiled program would have been faster. The 16 stands for operations other than products.
MOST_WORK = 5e9
# A relative curvature above this is not rounding in float32, which then suffices for directions.
COARSE = 1e-3
# If the mean of a feature, under the weights of the examples, is more than this many standard
# deviations, products in float32 (FAR) and in float64 (FARTHEST) lose the differences.
FAR, FARTHEST = 1e2, 1e8
# With sparse features a trial of the line search takes far less time than a step, and is worth it
# until only this share of the slope is left.
LITTLE_LEFT = 0.1
# The preconditioner is built again after steps that moved an example by this many nats in all.
STALE = 4.0


def takes(name: str, data: Data) -> bool:
    """Whether NumPy makes the fit of a solver, given its data.

    The data must be in the memory of the host, and be a small table or sparse features of which
    only a few are not penalised.
    """
    x = data.features
    if name != "newton-cg" or not x.shape[1] or not is_on_host(data):
        return False
    if is_small(data) or not is_sparse(x):
        return is_small(data)
    factors = np.ones(x.shape[1]) if data.factors is None else np.asarray(data.factors)
    return int(np.count_nonzero(np.min(np.asarray(data.l2)) * factors == 0)) < MOST_COLUMNS


def is_small(data: Data) -> bool:
    """Whether the features have few columns, and few numbers together with the logits."""
    examples, width = data.features.shape
    return width < MOST_COLUMNS and examples * (width + data.num_classes) <= MOST_NUMBERS


def optimum(data: Data, tol: float, init: SoftmaxRegression | None = None) -> FitResult | None:
    """The optimum without l1, with steps from `init` or 0; None if its end is not clear."""
    targets = targets_of(data)
    found = solved(prepared(data, targets[0]), targets, float(data.l2), tol, init)
    return None if found is None else found[0]._replace(params=placed(found[0].params))


class Prepared(NamedTuple):
    """The features, prepared for several problems that share them."""

    given: Table  # a problem with the original features; its ridge is the penalty factors
    table: Table  # a problem with the features minus `mean`, divided by `scale`
    single: Table  # the same problem in float32
    squares: np.ndarray  # the mean squares of the features, [D + 1], by which gradients are judged
    mean: np.ndarray  # [D + 1]
    scale: np.ndarray  # [D + 1]
    dtype: Any  # the dtype of the original features, and of the parameters


def prepared(data: Data, targets: np.ndarray) -> Prepared:
    """The prepared features of `data`, whose targets are [K, N]."""
    given = table_of(data, targets, is_small(data))
    with np.errstate(all="ignore"):
        squares = given.mean_squares()
        mean, scale = given.moments(squares)
        table = given.standardised(mean, scale)
        parts = given, table, table.in_float32(), squares, mean, scale
    return Prepared(*parts, data.features.dtype)


def solved(
    known: Prepared,
    targets: tuple[np.ndarray, float],
    l2: float,
    tol: float,
    init: SoftmaxRegression | None,
) -> tuple[FitResult, np.ndarray] | None:
    """The optimum for targets of `targets_of`, and its logits; None if its end is not clear.

    The parameters are NumPy arrays.
    """
    (q, mass), (given, table, single, squares, mean, scale, dtype) = targets, known
    if not np.all(q.sum(1) > 0):  # a class without examples has no optimum
        return None
    # An end with numbers that are not finite, or a matrix that has no factor, is not clear.
    with contextlib.suppress(np.linalg.LinAlgError), np.errstate(all="ignore"):
        ridge = l2 / mass * given.ridge
        given = given._replace(targets=q, ridge=ridge)
        table = table._replace(targets=q, ridge=ridge / scale / scale)
        single = single._replace(targets=single.rounded(q), ridge=single.rounded(table.ridge))
        start = np.zeros((len(q), len(scale)))
        if init is not None:
            theta = centred(to_standard(table.theta_of(init), mean, scale))
            value, at_zero = (table.value(t, table.logits(t)) for t in (theta, start))
            start = theta if value <= at_zero else start
        end = _newton(table, single, start, tol)
        if end is None:
            return None
        theta = from_standard(end.theta, mean, scale, dtype)
        return _judged(given, squares, mass, end._replace(theta=theta), tol)
    return None


def _newton(table: Table, single: Table, theta: np.ndarray, tol: float) -> End | None:
    """The end of Newton's steps from `theta`, None if it is not clear; `single` is in float32."""
    z = table.logits(theta)
    is_dense = isinstance(table.features, np.ndarray)
    first = table.value(theta, z)
    decrement, move, farthest, passes, near, stale = np.inf, 0.0, 0.0, 2, False, np.inf
    among, precondition = single, centred
    build, left = (kronecker, SLOPE_LEFT) if is_dense else (partial(diagonal, table), LITTLE_LEFT)
    most_passes = MOST_WORK / (table.targets.size * (table.width + 16)) if is_dense else np.inf
    for step in range(MOST_STEPS):
        p = probabilities(z)
        gradient = table.gradient(theta, p)
        norm = np.max(np.abs(gradient))
        if not np.isfinite(norm) or (near and table.is_loose and move >= STILL):
            return None
        if passes > most_passes:
            return None
        # The norm in the units of the features is at most 2^(1/2) times as large.
        at_end = 2 * norm <= tol and converged(
            table.value(theta, z), first, 2 * norm, decrement, tol
        )
        still = STILL if table.is_loose or farthest > OUTLYING else NEWTONIAN
        if at_end and (move < still or norm == 0) and stale < STALE:
            return End(theta, first, decrement, step, passes)
        near = near or norm < NEAR
        if stale >= STALE:
            among, stale = among if is_dense else single, 0.0
            found = build(among, p)
            if among is single and not (found.least > COARSE and found.distance <= FAR):
                among = table
                found = build(table, p) if is_dense or found.distance > FAR else found
            if not (found.least > CLEAR and found.distance <= FARTHEST):
                return None
            precondition = found.rounded(among).apply
        tolerance = np.clip(3 * np.sqrt(norm), FINE, ROUGH)
        times, b = partial(among.hessian_times, among.rounded(p)), among.rounded(-gradient / norm)
        d, cg_steps = conjugate_gradients_in_numpy(
            times, precondition, np.zeros_like(b), b, tolerance, CG_STEPS
        )
        if not cg_steps:  # the curvature is not that of the preconditioner
            if stale == 0:
                return None
            stale = np.inf
            continue
        d = centred(d.astype(np.float64) * norm)
        dz = table.scores(d)
        slope = float(np.vdot(gradient, d))
        t = step_length(partial(_along, table, theta, z, d, dz), slope, left)
        if not t > 0:
            return None
        theta, z = theta + t * d, z + t * dz
        last = farthest if near else move * (move > OUTLYING)
        decrement, move = -slope / 2, max(t, 1) * np.max(np.ptp(dz, axis=0))
        farthest = max(last, move)
        stale += move
        passes += 2 * cg_steps + 2
    return None


def _judged(
    given: Table, squares: np.ndarray, mass: float, end: End, tol: float
) -> tuple[FitResult, np.ndarray] | None:
    """The result and its logits if the rounded parameters are the optimum, else None."""
    theta = end.theta.astype(np.float64)
    z = given.logits(theta)
    gradient, value = given.gradient(theta, probabilities(z)), given.value(theta, z)
    norm = np.max(np.abs(gradient) / np.sqrt(np.where(squares > 0, squares, 1)))
    separated = is_separated(given.targets, z - given.offset)
    if not converged(value, end.first, norm, end.decrement, tol):
        return None
    if separated and given.is_loose:
        return None
    params = given.params_of(end.theta)
    numbers = (end.steps, end.passes, float(norm), bool(separated))
    return FitResult(params, float(value * mass), int(Status.CONVERGED), *numbers, []), z


def step_length(
    along: Callable[[float], tuple[Any, Any]], first: float, left: float = SLOPE_LEFT
) -> float:
    """t near the minimum of phi(t) = f(theta + t d), by Newton's method on its slope from t = 1.

    The search is that of `_descent.step_length`. `along` gives the slope and the curvature of phi;
    `first` is the slope at 0, of which at most the share `left` may be left.
    """
    t, low, high = 1.0, 0.0, np.inf
    for _ in range(TRIALS):
        slope, curvature = along(t)
        near = slope <= -OVERSHOOT * first and slope <= MIN_FRACTION * curvature * t
        if near and slope >= left * first:
            return t
        low, high = (t, high) if slope < 0 else (low, t)
        newton = t - slope / curvature
        middle = 4 * t if np.isinf(high) else (low + high) / 2
        t = newton if low < newton < high and newton <= 10 * t else middle
    return low


def _along(
    table: Table, theta: np.ndarray, z: np.ndarray, d: np.ndarray, dz: np.ndarray, t: float
) -> tuple[Any, Any]:
    """The slope and the curvature of f(theta + t d) by t."""
    p, shift = probabilities(z + t * dz), table.ridge * d
    slope = np.vdot(table.residual(p), dz) + np.vdot(theta + t * d, shift)
    return slope, np.vdot(curved(table.weights, p, dz), dz) + np.vdot(d, shift)
