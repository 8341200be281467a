"""Newton's method in NumPy, for a table whose fit takes less time than the compilation of one.

The program of a fit takes seconds to compile and some milliseconds to run. So a small table is
fitted here, by the steps of "newton-cg" and with nothing to compile, in float64 whatever its dtype.

    d = -H^-1 g,    theta <- theta + t d

Only a clear end is one: the parameters, rounded to the dtype of the features, fulfil the rule of
every solver (`_convergence`), the curvature is known in every direction, and no step near the end
moved an example far. Anything else, as classes that the features separate or features that are
collinear, is left to the compiled solvers, which tell one such case from another.

As in `_objective` parameters are [K, D + 1] and logits [K, N]; without an intercept parameters are
[K, D]. Directions are those of features with mean 0 and standard deviation 1.

Source: J. Nocedal and S. J. Wright, "Numerical Optimization" (2006), algorithms 5.3 and 7.1.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softjax import _checks
from softjax.regression._arguments import is_at_hand
from softjax.regression._convergence import NEAR, STILL, converged
from softjax.regression._descent import MIN_FRACTION, OVERSHOOT, SLOPE_LEFT, TRIALS
from softjax.regression._features import in_numpy
from softjax.regression._linear_solves import CG_STEPS, FINE, ROUGH
from softjax.regression._model import SoftmaxRegression
from softjax.regression._objective import Data
from softjax.regression._preconditioner import BETWEEN
from softjax.regression._result import FitResult, Status

# A table of more numbers, of the features and the logits, or of more columns, is not small: the
# compiled program runs in less time.
MOST_NUMBERS, MOST_COLUMNS = 2**18, 128
# A fit with an end that is clear takes fewer steps.
MOST_STEPS = 40
# After this much work, N K (D + 16) for each product with the features, about a second has passed,
# and the compiled program would have been the faster one. The 16 are for what is no product.
MOST_WORK = 1e9
# A relative curvature above the first is no rounding of float64, and above the second none of
# float32, in which a direction then has all the digits that it needs.
CLEAR, COARSE = 1e-8, 1e-3


class End(NamedTuple):
    """The end of Newton's steps.

    Attributes:
        theta: the parameters.
        first: the objective at the start.
        decrement: half of what the last step promised, nats.
        steps: the number of steps.
        passes: products with the features.
    """

    theta: np.ndarray
    first: Any
    decrement: Any
    steps: int
    passes: int


class Table(NamedTuple):
    """A problem in NumPy and float64.

    Attributes:
        features: [N, D], with an intercept [N, D + 1] and ones in the last column.
        targets: q [K, N], which sum to 1.
        ridge: of each column of the features.
        offset: [K, N], or 0.
        biases: the number of columns of ones, 1 or 0.
    """

    features: np.ndarray
    targets: np.ndarray
    ridge: np.ndarray
    offset: Any
    biases: int

    @property
    def width(self) -> int:
        """The number of features, D."""
        return self.features.shape[1] - self.biases

    @property
    def is_loose(self) -> bool:
        """Whether no penalty holds the parameters of some feature."""
        return not np.all(self.ridge[: self.width] > 0)

    @property
    def weights(self) -> np.ndarray:
        """The weight of each example in the loss, [N]."""
        return self.targets.sum(0)

    def rounded(self, array: np.ndarray) -> np.ndarray:
        """An array in the dtype of the features."""
        return array.astype(self.features.dtype)

    def logits(self, theta: np.ndarray) -> np.ndarray:
        """The logits of parameters [K, D + 1]."""
        return theta @ self.features.T + self.offset

    def gradient(self, theta: np.ndarray, p: np.ndarray) -> np.ndarray:
        """The slope, whose mean over the classes is 0 where that of `theta` is."""
        return _centred(self.slope(theta, p))

    def slope(self, theta: np.ndarray, p: np.ndarray) -> np.ndarray:
        """X^T (w p - q) + ridge theta."""
        return self.residual(p) @ self.features + self.ridge * theta

    def residual(self, p: np.ndarray) -> np.ndarray:
        """w p - q, [K, N]."""
        return _balanced(p, self.weights * p - self.targets)

    def value(self, theta: np.ndarray, logits: np.ndarray) -> float:
        """The objective."""
        return self.loss(logits) + np.vdot(theta, self.ridge * theta) / 2

    def loss(self, logits: np.ndarray) -> float:
        """The loss, with the log of 1 + the sum over all classes but the largest."""
        top = logits.argmax(0)[None]
        below = logits - np.take_along_axis(logits, top, 0)
        others = np.exp(below)
        np.put_along_axis(others, top, 0, 0)
        loss = np.log1p(others.sum(0)) - below
        return np.vdot(self.targets, loss)

    def hessian_times(self, p: np.ndarray, v: np.ndarray) -> np.ndarray:
        """H v at the probabilities p."""
        return curved(self.weights, p, v @ self.features.T) @ self.features + self.ridge * v


def takes(name: str, data: Data) -> bool:
    """Whether a solver's fit is one of a small table in the memory of the host."""
    x = data.features
    if name != "newton-cg" or not 0 < x.shape[1] < MOST_COLUMNS:
        return False
    return x.shape[0] * (x.shape[1] + data.num_classes) <= MOST_NUMBERS and is_on_host(data)


def is_on_host(data: Any) -> bool:
    """Whether all arrays are known, in the memory of the host, where JAX places arrays."""
    leaves = [leaf for leaf in jax.tree.leaves(data) if isinstance(leaf, jax.Array)]
    if not all(is_at_hand(leaf) for leaf in leaves):
        return False
    here = jax.device_put(np.zeros(())).devices()
    return all(leaf.devices() == here for leaf in leaves)


def optimum(data: Data, tol: float) -> FitResult | None:
    """The optimum of a small table without l1; None where its end is not clear."""
    # Numbers that are not finite, and a matrix without a factor, are no clear end.
    with contextlib.suppress(np.linalg.LinAlgError), np.errstate(all="ignore"):
        given, mass = _as_given(jax.tree.map(_checks.known, data))
        if not np.all(given.targets.sum(1) > 0):  # a class without examples has no optimum
            return None
        mean, scale = _moments(given)
        features, ridge = (given.features - mean) / scale, given.ridge / scale / scale
        end = _newton(given._replace(features=features, ridge=ridge), tol)
        if end is None:
            return None
        theta = end.theta / scale
        theta[:, -1] -= theta @ mean  # 0 without an intercept
        rounded = theta.astype(data.features.dtype)
        return _judged(given, mass, end._replace(theta=rounded), tol)
    return None


def _as_given(data: Data) -> tuple[Table, float]:
    """The features as they are with targets that sum to 1, and what they summed to."""
    x, (targets, mass) = in_numpy(data.features), targets_of(data)
    ridge = np.full(x.shape[1], float(data.l2)) / mass
    ridge = ridge if data.factors is None else ridge * data.factors
    biases = int(data.constant is None or data.constant > 0)
    x, ridge = np.column_stack([x, *[np.ones(len(x))] * biases]), np.append(ridge, [0] * biases)
    return Table(x, targets, ridge, 0 if data.offset is None else data.offset, biases), mass


def targets_of(data: Data) -> tuple[np.ndarray, float]:
    """Targets q [K, N] that sum to 1, and what they summed to."""
    labels = np.asarray(data.labels)
    q = np.arange(data.num_classes)[:, None] == labels if labels.ndim == 1 else labels.T
    q = q.astype(np.float64)
    if data.class_weights is not None:
        q = q * np.asarray(data.class_weights, np.float64)[:, None]
    if data.weights is not None:
        q = q * np.asarray(data.weights, np.float64)
    q = q / len(labels)
    mass = float(q.sum())
    return q / mass, mass


def _newton(table: Table, tol: float) -> End | None:
    """The end of Newton's steps from 0; None where it is not clear."""
    theta = np.zeros((len(table.targets), table.features.shape[1]))
    z = np.broadcast_to(table.offset, table.targets.shape)
    single = table._replace(
        features=table.features.astype(np.float32),
        targets=table.targets.astype(np.float32),
        ridge=table.ridge.astype(np.float32),
    )
    first = table.value(theta, z)
    decrement, move, passes, near = np.inf, np.inf, 2, False
    among, precondition = table, _centred
    most_passes = MOST_WORK / (table.targets.size * (table.width + 16))
    for step in range(MOST_STEPS):
        p = probabilities(z)
        gradient = table.gradient(theta, p)
        norm = np.max(np.abs(gradient))
        if not np.isfinite(norm) or (near and table.is_loose and move >= STILL):
            return None
        if passes > most_passes:
            return None
        # The norm in the units of the features is at most 2^(1/2) times as large.
        at_end = converged(table.value(theta, z), first, 2 * norm, decrement, tol)
        if at_end and (move < STILL or norm == 0):
            return End(theta, first, decrement, step, passes)
        near = near or norm < NEAR
        if step & (step - 1) == 0:  # the probabilities settle: at steps 0, 1, 2, 4, 8 and so on
            least, *parts = _preconditioner(table, p)
            if not least > 0:
                return None
            among = single if least > COARSE else table
            precondition = partial(_apply, *map(among.rounded, parts))
        tolerance = np.clip(3 * np.sqrt(norm), FINE, ROUGH)
        times, b = partial(among.hessian_times, among.rounded(p)), among.rounded(-gradient / norm)
        d, products = _solved(times, precondition, b, tolerance)
        d = _centred(d.astype(np.float64) * norm)
        dz = d @ table.features.T
        slope = float(np.vdot(gradient, d))
        t = _step_length(table, theta, z, d, dz, slope)
        if not t > 0:
            return None
        theta, z = theta + t * d, z + t * dz
        decrement, move = -slope / 2, t * np.max(np.ptp(dz, axis=0))
        passes += products + 2
    return None


def _judged(given: Table, mass: float, end: End, tol: float) -> FitResult | None:
    """The result, where parameters that are rounded by now are the optimum."""
    theta = end.theta.astype(np.float64)
    z = given.logits(theta)
    gradient, value = given.gradient(theta, probabilities(z)), given.value(theta, z)
    bound = np.sqrt(given.weights @ np.square(given.features))
    norm = np.max(np.abs(gradient) / np.where(bound > 0, bound, 1))
    separated = is_separated(given.targets, z - given.offset)
    if not converged(value, end.first, norm, end.decrement, tol):
        return None
    if separated and given.is_loose:
        return None
    kernel, bias = np.split(end.theta, [given.width], axis=1)
    bias = bias[:, 0] if given.biases else np.zeros(len(kernel), kernel.dtype)
    params = SoftmaxRegression(*map(jnp.asarray, (kernel.T, bias)))  # placed on a mesh, if any
    numbers = (end.steps, end.passes, float(norm), bool(separated))
    return FitResult(params, float(value * mass), int(Status.CONVERGED), *numbers, [])


def _solved(
    times: Callable, precondition: Callable, b: np.ndarray, tol: float
) -> tuple[np.ndarray, int]:
    """x with H x = b by conjugate gradients, as in `_linear_solves`, and the products."""
    x, r, z = np.zeros_like(b), b, precondition(b)
    direction, product = z, np.vdot(b, z)
    bound, products = tol * tol * product, 0
    while product > bound and products < 2 * CG_STEPS:
        image = times(direction)
        length = product / np.vdot(direction, image)
        x, r = x + length * direction, r - length * image
        z, before = precondition(r), product
        product = np.vdot(r, z)
        direction = z + product / before * direction
        products += 2
    return x, products


def _preconditioner(
    table: Table, p: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """The least relative curvature of the features; the means, T and inverse of `Kronecker`.

    The formulas are those of `_preconditioner`. The least one is 0 where it is not clear.
    """
    u = table.weights * p * complements(p)
    of_class = u.sum(1, keepdims=True)
    share = of_class[:, 0] / u.sum()
    m = share / (1 - np.minimum(share, 0.5))
    mean_eigenvalue = 1 / max(len(m) - 1, 1)
    sums = table.biases * (u @ table.features)
    means = sums / np.where(of_class > 0, of_class, 1) - sums.sum(0) / u.sum()
    means[:, table.width :] = 0
    a = (table.features.T * u.sum(0)) @ table.features
    a = mean_eigenvalue * (a - (1 - BETWEEN) * means.T @ (of_class * means))
    size = np.diag(a) + table.ridge
    unit = 1 / np.sqrt(size)
    a = unit[:, None] * a * unit
    whole = a + np.diag(table.ridge * unit * unit)
    if not (np.isfinite(whole).all() and np.all(m > 0)):
        return 0.0, means, a, m
    least = np.linalg.eigvalsh(whole)[0]
    if not least > CLEAR:
        return 0.0, means, a, m
    inverse = np.linalg.inv(np.linalg.cholesky(whole))
    eigenvalues, q = np.linalg.eigh(inverse @ a @ inverse.T)
    scale = 1 + (m / mean_eigenvalue - 1)[:, None] * eigenvalues
    return least, means, unit[:, None] * (inverse.T @ q), 1 / np.maximum(scale, CLEAR)


def _apply(
    means: np.ndarray, columns: np.ndarray, inverse: np.ndarray, gradient: np.ndarray
) -> np.ndarray:
    gradient = _centred(gradient)
    v = ((gradient - means * gradient[:, -1:]) @ columns * inverse) @ columns.T
    v[:, -1] -= np.sum(means * v, 1)
    return _centred(v)


def _step_length(
    table: Table, theta: np.ndarray, z: np.ndarray, d: np.ndarray, dz: np.ndarray, first: float
) -> float:
    """t near the minimum of phi(t) = f(theta + t d), by Newton's method on its slope from t = 1.

    The search is that of `_descent.step_length`.
    """
    linear, square = (np.vdot(part, table.ridge * d) for part in (theta, d))
    t, low, high = 1.0, 0.0, np.inf
    for _ in range(TRIALS):
        p = probabilities(z + t * dz)
        slope = np.vdot(_balanced(p, table.weights * p - table.targets), dz) + linear + t * square
        curvature = np.vdot(curved(table.weights, p, dz), dz) + square
        near = slope <= -OVERSHOOT * first and slope <= MIN_FRACTION * curvature * t
        if near and slope >= SLOPE_LEFT * first:
            return t
        low, high = (t, high) if slope < 0 else (low, t)
        newton = t - slope / curvature
        middle = 4 * t if np.isinf(high) else (low + high) / 2
        t = newton if low < newton < high and newton <= 10 * t else middle
    return low


def _moments(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column, as in `_standardised`; of the ones 0 and 1."""
    x, weights = table.features, table.weights
    root_mean_square = np.sqrt(weights @ np.square(x))
    mean = table.biases * (weights @ x)
    mean[table.width :] = 0
    deviation = np.sqrt(weights @ np.square(x - mean))
    varies = deviation > 64 * np.finfo(np.float64).eps * root_mean_square
    scale = np.where(varies, deviation, root_mean_square)
    return mean, np.where(scale > 0, scale, 1)


def probabilities(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(0))
    return e / e.sum(0)


def complements(p: np.ndarray) -> np.ndarray:
    """1 - p, of a class that is nearly certain as the sum of the others."""
    others = np.where(p > 0.5, 0, p).sum(0)
    return np.where(p > 0.5, others, 1 - p)


def _balanced(p: np.ndarray, residual: np.ndarray) -> np.ndarray:
    """A residual whose sum over the classes is 0, as exact where a class is nearly certain."""
    return np.where(p > 0.5, residual - residual.sum(0), residual)


def curved(weights: np.ndarray, p: np.ndarray, moves: np.ndarray) -> np.ndarray:
    """w_i (diag p_i - p_i p_i^T) moves_i."""
    mean = (p * moves).sum(0)
    return weights * (p * (moves - mean))


def _centred(theta: np.ndarray) -> np.ndarray:
    return theta - theta.mean(0)


def is_separated(targets: np.ndarray, scores: np.ndarray) -> Any:
    """Whether every example of a hard label has its own class strictly on top."""
    own = targets > 0
    lowest = np.where(own, scores, np.inf).min(0)
    highest = np.where(own, -np.inf, scores).max(0)
    return np.all((own.sum(0) <= 1) & (lowest > highest))
