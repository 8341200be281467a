"""L-BFGS in NumPy, for large tables of dense features with many classes and a penalty.

The time of such a fit is that of products with the features and of softmaxes. Here the examples are
read once for each step, in blocks whose logits stay in the cache,

    Z = theta X^T,   R = w softmax(Z) - q,   G = G + R X,

and no array [K, N] is made. XLA:CPU takes several times as long for the same softmax.

The direction is that of `_lbfgs`. How far to go along it is first searched on a sample of the
examples, with slopes corrected by their known difference at 0; nearly always all examples then
accept this length. Sums over the examples are float64, whatever the dtype of the features.

Only a clear end is accepted, as in `_host_newton`; other fits are left to the compiled solvers.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from softjax.regression._descent import SLOPE_LEFT
from softjax.regression._features import CACHED, is_sparse
from softjax.regression._frame import centre_of
from softjax.regression._host_arrays import is_on_host, placed
from softjax.regression._host_newton import COARSE, FAR, step_length
from softjax.regression._host_preconditioner import CLEAR, Preconditioner, diagonalised
from softjax.regression._lbfgs import LENGTH
from softjax.regression._loop import STILL, converged, rounding_of
from softjax.regression._model import SoftmaxRegression
from softjax.regression._objective import centred
from softjax.regression._preconditioner import LARGEST_FACTOR
from softjax.regression._problem import Data
from softjax.regression._result import FitResult, Status
from softjax.regression._table import curved as curved_by
from softjax.regression._table import probabilities

# Fewer logits, or logits of fewer classes, are left to Newton's method.
FEWEST_NUMBERS, FEWEST_CLASSES = 2**20, 32
# The steps at which the preconditioner is built from all examples; at step 0 the sample suffices.
BUILDS = (1, 4, 16)
# A fit with a clear end takes fewer steps.
MOST_STEPS = 60
# The number of examples of the sample, and the fewest of a block.
SAMPLE, FEWEST_ROWS = 2**11, 2**8
# The scatter of the features is estimated from at least this many examples for each feature.
SCATTERED = 32
# The number of lengths that are tried with all examples.
TRIALS = 4


class Sums(NamedTuple):
    """What a pass over the examples adds up.

    Attributes:
        loss: sum_i w_i (-log p_i,y_i).
        gradient: of the loss, [K, D + 1].
        separated: whether the score of each label with weight is strictly the largest.
        of_class: sum_i u_ki, [K, 1], for u_ki = w_i p_ik (1 - p_ik).
        sums: sum_i u_ki (x_i - mean), [K, D + 1].
        scatter: sum_ki u_ki (x_i - mean) (x_i - mean)^T, [D + 1, D + 1], estimated from a part of
            the examples if there are many.
    """

    loss: float
    gradient: np.ndarray
    separated: bool
    of_class: Any
    sums: Any
    scatter: Any


class Large(NamedTuple):
    """A problem with the objective sum_i w_i (-log p_i,y_i) + sum_j ridge_j |theta_j|^2 / 2.

    Attributes:
        features: [N, D].
        labels: y [N].
        weights: w [N], which sum to 1, in the dtype of the features.
        ridge: [D + 1]; 0 for the bias.
        bias: 1, or 0 without an intercept.
        mean: of the features, [D]; 0 without an intercept.
        squares: the mean squares of the features, [D].
    """

    features: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    ridge: np.ndarray
    bias: int
    mean: Any = 0.0
    squares: Any = 0.0

    def blocks(self, num_classes: int) -> Iterator[slice]:
        """The examples in blocks whose logits stay in the cache."""
        size, examples = max(CACHED // num_classes, FEWEST_ROWS), len(self.labels)
        return (slice(first, first + size) for first in range(0, examples, size))

    def with_moments(self) -> "Large":
        """The problem with the means and the mean squares of its features."""
        mean, squares = np.zeros((2, self.features.shape[1]))
        for rows in self.blocks(self.features.shape[1]):
            x, w = self.features[rows], self.weights[rows]
            mean += w @ x
            squares += w @ np.square(x)
        return self._replace(mean=self.bias * mean, squares=squares)

    def among(self, rows: np.ndarray) -> "Large":
        x, labels, w = self.features[rows], self.labels[rows], self.weights[rows]
        return self._replace(features=x, labels=labels, weights=w / w.sum())

    def scores(self, v: np.ndarray, rows: slice = slice(None)) -> np.ndarray:
        """v (x, 1)^T, [K, n], for v [K, D + 1]."""
        v = v.astype(self.features.dtype)
        z = v[:, :-1] @ self.features[rows].T
        z += v[:, -1:]
        return z

    def farthest(self, v: np.ndarray) -> Any:
        """The largest difference of two scores of an example."""
        return max(np.max(np.ptp(self.scores(v, rows), 0)) for rows in self.blocks(len(v)))

    def at_zero(self, num_classes: int) -> Sums:
        """The sums at theta = 0, where p = 1 / K: no softmax, and one product with the labels."""
        from scipy.sparse import csr_array

        gradient = np.zeros((num_classes, self.features.shape[1] + 1))
        gradient[:, -1] = -self.bias * np.bincount(self.labels, self.weights, num_classes)
        for rows in self.blocks(num_classes):
            x, w = self.features[rows], self.weights[rows].astype(np.float64)
            own = w, self.labels[rows], np.arange(len(w) + 1)
            gradient[:, :-1] -= csr_array(own, shape=(len(w), num_classes)).T @ x
        return Sums(np.log(num_classes), centred(gradient), False, 0.0, 0.0, 0.0)

    def at(self, theta: np.ndarray, curved: bool = False) -> Sums:
        """The sums at theta; those of the preconditioner only if `curved`."""
        num_classes, size = theta.shape
        sums, gradient = np.zeros((2, num_classes, size))
        of_class, scatter = np.zeros((num_classes, 1)), np.zeros((size, size))
        loss, separated, mean = 0.0, True, self.mean.astype(self.features.dtype)
        every, scattered = max(1, len(self.labels) // (SCATTERED * size)), 0.0
        for rows in self.blocks(num_classes):
            x, w = self.features[rows], self.weights[rows]
            own = self.labels[rows], np.arange(len(w))
            e = self.scores(theta, rows)
            score = e[own]
            e[own] = -np.inf
            top = e.max(0)
            separated &= bool(np.all((score > top) | (w == 0)))
            top = np.maximum(top, score)
            below = score - top
            e -= top
            np.exp(e, out=e)
            others = e.sum(0)
            total = others + np.exp(below)
            # log1p of the others if the label has the largest logit.
            losses = np.where(below == 0, np.log1p(others), np.log(total) - below)
            loss += np.vdot(w, losses.astype(np.float64))
            e *= w / total
            # An own entry w p - w is minus the sum of the others, also if the label is certain.
            e[own] = -w * (others / total)
            gradient[:, :-1] += e @ x
            gradient[:, -1] += e.sum(1)
            if curved:
                # |R| is w p, and w (1 - p) for the label: w p (1 - p) has one form for both.
                u = np.abs(e, out=e)
                u *= 1 - u * np.divide(1, w, out=np.zeros_like(w), where=w > 0)
                x = x - mean
                of_class += u.sum(1, keepdims=True)
                sums[:, :-1] += u @ x
                of_example = u.sum(0)[::every]
                scattered += of_example.sum()
                x = np.sqrt(of_example)[:, None] * x[::every]
                scatter[:-1, :-1] += x.T @ x
        if curved:
            scatter *= of_class.sum() / scattered
        gradient[:, -1] *= self.bias
        return Sums(loss, gradient, separated, of_class, sums, scatter)

    def preconditioner(self, here: Sums) -> Preconditioner:
        """The preconditioner `Kronecker` of the sums at a point."""
        of_class, sums, scatter = here[3:]
        total, away = of_class.sum(), self.bias * sums.sum(0) / of_class.sum()
        scatter = scatter - total * np.outer(away, away)
        scatter[-1, -1] = total  # without an intercept any number, since the gradient is 0
        means = self.bias * sums / np.where(of_class > 0, of_class, 1) - away
        means[:, -1] = 0
        middle = np.append(self.mean, 0) + away
        return diagonalised(middle, means, of_class, scatter, self.ridge)


def takes(data: Data) -> bool:
    """Whether the data are known, and are a large table with many classes and a penalty."""
    x = data.features
    examples, width = x.shape
    return (
        not is_sparse(x)
        and data.num_classes >= FEWEST_CLASSES
        and examples * data.num_classes >= FEWEST_NUMBERS
        and width < min(LARGEST_FACTOR, examples)
        and data.labels.ndim == 1
        and data.offset is None
        and data.factors is None
        and is_on_host(data)
        and float(data.l2) > 0
        and centre_of(x, data.weights) is None
    )


def optimum(data: Data, tol: float) -> FitResult | None:
    """The optimum, with steps from 0; None if its end is not clear."""
    x, labels = np.asarray(data.features), np.asarray(data.labels)
    w = np.full(len(x), 1 / len(x))
    w = w if data.weights is None else w * np.asarray(data.weights, np.float64)
    if data.class_weights is not None:
        w = w * np.asarray(data.class_weights, np.float64)[labels]
    mass = w.sum()
    if not np.all(np.bincount(labels, w, data.num_classes) > 0):  # such a bias has no optimum
        return None
    ridge = np.append(np.full(x.shape[1], float(data.l2) / mass), 0)
    bias = int(data.constant > 0)
    problem = Large(x, labels, (w / mass).astype(x.dtype), ridge, bias)
    with contextlib.suppress(np.linalg.LinAlgError), np.errstate(all="ignore"):
        return _lbfgs(problem.with_moments(), mass, data.num_classes, tol)
    return None


def _lbfgs(problem: Large, mass: float, num_classes: int, tol: float) -> FitResult | None:
    """The end of the steps of L-BFGS from 0; None if it is not clear."""
    x, ridge = problem.features, problem.ridge
    squares = np.append(problem.squares, problem.bias)
    bound = np.sqrt(np.where(squares > 0, squares, 1))
    count = min(SAMPLE, len(x))
    sample = problem.among(np.sort(np.random.default_rng(0).choice(len(x), count, replace=False)))
    theta = np.zeros((num_classes, x.shape[1] + 1), x.dtype)
    found = sample.preconditioner(sample.at(theta, curved=True))
    here, memory = problem.at_zero(num_classes), []
    gradient = here.gradient
    first, decrement = here.loss, np.inf
    for step in range(MOST_STEPS):
        value, norm = here.loss + _penalty(ridge, theta), np.max(np.abs(gradient) / bound)
        at_end = converged(value, first, norm, decrement, tol)
        if at_end and (norm == 0 or (step and problem.farthest(memory[-1][0]) < STILL)):
            parts: Any = theta[:, :-1].T, theta[:, -1]
            params = placed(SoftmaxRegression(*parts))
            counts = (step, 2 * step + 2, float(norm), here.separated)
            return FitResult(params, float(value * mass), int(Status.CONVERGED), *counts, [])
        if step in BUILDS:
            found = problem.preconditioner(here)
        least = COARSE if x.dtype == np.float32 else CLEAR
        if not (found.least > least and found.distance <= FAR):
            return None
        d = -_inverse_hessian(found.apply, memory, gradient)
        slope: Any = np.vdot(gradient, d)
        end = _searched(problem, sample, theta, d, (value, slope), step + 1 in BUILDS)
        if end is None:
            return None
        there, here = end
        after = centred(here.gradient + ridge * there)
        memory = [*memory, (there.astype(np.float64) - theta, after - gradient)][-LENGTH:]
        theta, gradient, decrement = there, after, -slope / 2
    return None


def _searched(
    problem: Large,
    sample: Large,
    theta: np.ndarray,
    d: np.ndarray,
    begin: tuple[Any, Any],
    curved: bool,
) -> tuple[np.ndarray, Sums] | None:
    """The parameters at the end of a step along d, and the sums there; None if none is found.

    The slope of the objective is that of the sample, plus a correction which is exact at 0, and
    then also at the last length that all examples did not accept. `begin` is the objective and its
    slope at 0.
    """
    value, first = begin
    z, dz, w = sample.scores(theta), sample.scores(d), sample.weights
    square = np.vdot(d, problem.ridge * d)

    def of_sample(t: float) -> tuple[Any, Any]:
        p = probabilities(z + z.dtype.type(t) * dz)
        return np.vdot(w, (p * dz).sum(0)) + t * square, np.vdot(curved_by(w, p, dz), dz) + square

    base, (last, rise) = first - of_sample(0.0)[0], (1.0, 0.0)

    def along(t: float) -> tuple[Any, Any]:
        slope, curvature = of_sample(t)
        return slope + base + rise * t / last, curvature

    for _ in range(TRIALS):
        t = step_length(along, first)
        there = centred(theta + t * d).astype(theta.dtype)
        here = problem.at(there, curved)
        slope = np.vdot(here.gradient + problem.ridge * there, d)
        lower = here.loss + _penalty(problem.ridge, there) <= value + rounding_of(
            theta.dtype.type(value)
        )
        if SLOPE_LEFT * first <= slope <= -SLOPE_LEFT * first and lower:
            return there, here
        last, rise = t, slope - of_sample(t)[0] - base
    return None


def _penalty(ridge: np.ndarray, theta: np.ndarray) -> float:
    return np.vdot(theta, ridge * theta) / 2


def _inverse_hessian(
    precondition: Callable, memory: list[tuple[np.ndarray, np.ndarray]], gradient: np.ndarray
) -> np.ndarray:
    """H^-1 gradient by the two loops over the steps and the changes of the gradient in memory.

    Source: J. Nocedal and S. J. Wright, "Numerical Optimization" (2006), algorithm 7.4.
    """
    d, parts = gradient, []
    for moved, change in memory[::-1]:
        parts.append(np.vdot(moved, d) / np.vdot(moved, change))
        d = d - parts[-1] * change
    d = precondition(d)
    if memory:
        moved, change = memory[-1]
        d *= np.vdot(moved, change) / np.vdot(change, precondition(change))
    for (moved, change), part in zip(memory, parts[::-1], strict=True):
        d = d + (part - np.vdot(change, d) / np.vdot(moved, change)) * moved
    return d
