"""Fits of every solver, compared with the best fit that SciPy finds for the same objective.

SciPy's fit need not be the optimum to prove a fit wrong: parameters with a smaller objective are
enough. Objectives are computed in float64, from the features of the fit.
"""

from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import scipy.optimize
from jax.experimental.sparse import BCOO

from softjax import regression, streaming
from softjax.regression import _host_newton
from tests import oracles
from tests.campaign import Failure, Outcome

NAME = "fits"
FIGURE = "what a fit that says 'converged' is above SciPy, over 10 tol of the objective"

SOLVERS = ("newton-cg", "lbfgs", "newton", "proximal", "proximal l1", "firth", "optax", "streaming")
SPARSE = ("newton-cg", "lbfgs", "proximal", "proximal l1")
SIZES = ((12, 60, 250), (1, 3, 7), (2, 3, 5))  # few, since each is a program of its own
TOL = 1e-6
STEPS = 3000


class Problem(NamedTuple):
    """The data of a fit: features [N, D], labels as given, and the options of `fit`."""

    x: np.ndarray
    labels: np.ndarray
    num_classes: int
    options: dict[str, Any]
    words: str

    @property
    def penalties(self) -> tuple[float, float]:
        return self.options.get("l2", 0.0), self.options.get("l1", 0.0)

    def costs(self) -> np.ndarray:
        """[N, K]: the objective is the sum of these times -log p, plus the penalties."""
        targets = self.labels
        if targets.ndim == 1:
            targets = np.eye(self.num_classes)[targets]
        weights = np.asarray(self.options.get("sample_weights", np.ones(len(self.x))), np.float64)
        of_classes = np.asarray(self.options.get("class_weights", 1.0), np.float64)
        return weights[:, None] * targets * of_classes / weights.sum()


def run(rng: np.random.Generator) -> Outcome:
    solver = str(rng.choice(SOLVERS))
    problem = draw(rng, solver)
    result, words = fitted(rng, problem, solver)
    words = f"{solver} {words} {problem.words}: {result.stop_reason} after {result.steps}"
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.params)):
        raise Failure(f"{words}: the parameters are not finite")
    theta = np.vstack([result.params.kernel, result.params.bias[None]]).astype(np.float64)
    reason = result.stop_reason
    if reason in (regression.SEPARATED, regression.QUASI_SEPARATED):
        check_separation(problem, theta, reason, words)
        return Outcome(0.0, reason)
    if reason == regression.NON_FINITE:
        raise Failure(f"{words}: of finite data")
    best, found = (firth_best if solver == "firth" else best_of_scipy)(problem, theta)
    excess = (found - best) / max(abs(best), 1e-300)
    float32 = problem.x.dtype == np.float32
    if reason == regression.PRECISION_FLOOR and excess > (1e-3 if float32 else 1e-6):
        raise Failure(f"{words}: {excess:.2g} of the objective above {best:.9g}")
    if reason != regression.CONVERGED:
        return Outcome(0.0, reason)
    share = max(excess, 0) / (10 * TOL)
    if share > 1:
        raise Failure(f"{words}: {excess:.2g} of the objective above {best:.9g}")
    return Outcome(share, reason)


def draw(rng: np.random.Generator, solver: str) -> Problem:
    n, d, k = (int(rng.choice(sizes)) for sizes in SIZES)
    words = [f"[{n}, {d}] of {k} classes"]
    x = rng.standard_normal((n, d))
    if rng.random() < 0.3:
        x = 1.0 * (x > rng.choice([0.0, 1.5]))
        words.append("indicators")
    if rng.random() < 0.2:
        x[:, -1] = x[:, :-1].sum(1) + (0 if rng.random() < 0.5 else 1e-3) * x[:, -1]
        words.append("collinear")
    scores = x @ rng.standard_normal((d, k)) * float(rng.choice([0.0, 1.0, 5.0, 30.0]))
    y = np.argmax(scores + rng.gumbel(size=(n, k)), 1)
    if rng.random() < 0.2:
        x[rng.integers(n)] *= 1e3
        words.append("an outlier")
    if rng.random() < 0.3:
        x = x * 10 ** rng.uniform(-3, 3, d)
        words.append("scales")
    if rng.random() < 0.2:
        x = x + rng.choice([10.0, 1000.0]) * x.std(0)
        words.append("far from 0")
    if rng.random() < 0.2:
        y = np.where((y == k - 1) & (np.arange(n) > n // 2), 0, y)
        words.append("a rare class")
    y[:k] = np.arange(k)
    dtype = np.float32 if rng.random() < 0.4 else np.float64
    x, labels = x.astype(dtype), y.astype(np.int32)
    options: dict[str, Any] = {}
    if rng.random() < 0.7 and solver != "firth":
        options["l2"] = float(rng.choice([1e-6, 1e-4, 1e-2, 1.0]))
    if solver == "proximal l1":
        options["l1"] = float(rng.choice([1e-4, 1e-2, 0.1]))
    if solver not in ("firth", "streaming"):
        if rng.random() < 0.25:
            labels = rng.dirichlet(np.ones(k), n) * float(rng.choice([1.0, 1.0, 20.0]))
            labels = np.round(labels) + np.eye(k)[y] if rng.random() < 0.3 else labels
            labels = labels.astype(dtype)
            words.append("soft labels")
        if rng.random() < 0.3:
            weights = rng.random(n) + 0.1 if rng.random() < 0.5 else 1.0 * rng.integers(0, 3, n)
            options["sample_weights"] = weights * float(rng.choice([1e-3, 1.0, 1e4])) + 0.0
            options["sample_weights"][:k] += 1
        if rng.random() < 0.2:
            options["class_weights"] = rng.random(k) + 0.2
    words.append(np.dtype(dtype).name)
    words += [
        f"{key} {value if np.ndim(value) == 0 else 'given'}" for key, value in options.items()
    ]
    return Problem(x, labels, k, options, ", ".join(words))


def fitted(rng, problem: Problem, solver: str) -> tuple[regression.FitResult, str]:
    x, labels, options = (
        problem.x,
        problem.labels,
        {**problem.options, "num_classes": problem.num_classes},
    )
    if solver == "streaming":
        return streaming.fit(streaming.ArrayRows(x, labels), max_steps=STEPS, **options), ""
    name = solver.split()[0]
    if solver == "optax":
        return regression.fit(x, labels, solver=name, epochs=300, **options), ""
    how = str(rng.choice(["", "compiled", "jit", "sparse"]))
    if how == "sparse" and solver in SPARSE:
        x = BCOO.fromdense(x)
    elif how == "jit":
        traced = jax.jit(
            lambda x, labels: regression.fit(x, labels, solver=name, max_steps=STEPS, **options)
        )
        return traced(x, labels), how
    elif how == "compiled":
        with mock.patch.object(_host_newton, "takes", return_value=False):  # none in NumPy
            return regression.fit(x, labels, solver=name, max_steps=STEPS, **options), how
    else:
        how = ""
    return regression.fit(x, labels, solver=name, max_steps=STEPS, **options), how


# The objective, at features that are standardised: the same, in other coordinates of the bias


class Standard(NamedTuple):
    """The objective as a function of the parameters [D + 1, K] of standardised features."""

    x: np.ndarray  # [N, D + 1], the last column 1
    mean: np.ndarray
    scale: np.ndarray
    costs: np.ndarray
    l2: float
    l1: float

    @classmethod
    def of(cls, problem: Problem) -> "Standard":
        x = problem.x.astype(np.float64)
        mean, scale = x.mean(0), x.std(0)
        scale = np.where(scale > 1e-12 * np.abs(mean), scale, 1.0)
        standardised = np.hstack([(x - mean) / scale, np.ones((len(x), 1))])
        return cls(standardised, mean, scale, problem.costs(), *problem.penalties)

    def parameters(self, theta: np.ndarray) -> np.ndarray:
        """The parameters of the standardised features, from those of the original features."""
        kernel, bias = theta[:-1], theta[-1]
        return np.vstack([kernel * self.scale[:, None], (bias + self.mean @ kernel)[None]])

    def penalised(self, theta: np.ndarray) -> np.ndarray:
        return theta.reshape(self.x.shape[1], -1)[:-1] / self.scale[:, None]

    def value(self, theta: np.ndarray) -> float:
        z = self.x @ theta.reshape(self.x.shape[1], -1)
        kernel = self.penalised(theta)
        penalty = self.l2 / 2 * (kernel**2).sum() + self.l1 * np.abs(kernel).sum()
        return float((self.costs * -oracles.log_softmax(z)).sum() + penalty)

    def gradient(self, theta: np.ndarray) -> np.ndarray:
        """The gradient without l1."""
        p = oracles.softmax(self.x @ theta.reshape(self.x.shape[1], -1))
        g = self.x.T @ (self.costs.sum(1, keepdims=True) * p - self.costs)
        g[:-1] += self.l2 * self.penalised(theta) / self.scale[:, None]
        return g.ravel()

    def hessian(self, theta: np.ndarray) -> np.ndarray:
        p = oracles.softmax(self.x @ theta.reshape(self.x.shape[1], -1))
        middle = p[:, :, None] * (np.eye(p.shape[1]) - p[:, None, :])
        middle = middle * self.costs.sum(1)[:, None, None]
        size = theta.size
        h = np.einsum("ni,nj,nkl->ikjl", self.x, self.x, middle, optimize=True).reshape(size, size)
        ridge = np.append(self.l2 / self.scale**2, 0)
        return h + np.diag(np.repeat(ridge, p.shape[1]))


def best_of_scipy(problem: Problem, theta: np.ndarray) -> tuple[float, float]:
    """The smallest objective that SciPy finds, and the objective of the fit."""
    f = Standard.of(problem)
    ours = f.parameters(theta).ravel()
    found = f.value(ours)
    candidates = [found]
    for start in (np.zeros_like(ours), ours):
        if f.l1:
            candidates.append(with_l1(f, start))
        else:
            options = {"gtol": 1e-12, "maxiter": 200, "max_trust_radius": 1e4}
            result = scipy.optimize.minimize(
                f.value,
                start,
                jac=f.gradient,
                hess=f.hessian,
                method="trust-exact",
                options=options,
            )
            candidates.append(f.value(result.x))
    return min(candidates), found


def with_l1(f: Standard, start: np.ndarray) -> float:
    """The optimum with l1, by L-BFGS-B on the positive and the negative part of the kernel."""
    size = start.size
    smooth = f._replace(l1=0.0)
    slope = np.repeat(np.append(f.l1 / f.scale, 0), size // f.x.shape[1])

    def value_and_gradient(parts):
        theta = parts[:size] - parts[size:]
        g = smooth.gradient(theta)
        value = smooth.value(theta) + slope @ parts[:size] + slope @ parts[size:]
        return value, np.concatenate([g + slope, slope - g])

    result = scipy.optimize.minimize(
        value_and_gradient,
        np.concatenate([np.maximum(start, 0), np.maximum(-start, 0)]),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, None)] * (2 * size),
        options={"maxiter": 3000, "maxfun": 6000, "ftol": 1e-15, "gtol": 1e-10},
    )
    return f.value(result.x[:size] - result.x[size:])


def firth_best(problem: Problem, theta: np.ndarray) -> tuple[float, float]:
    """The same for Firth's method: with -log det(information) / 2N, the first class at 0.

    It is computed on the span of the features; its basis changes the determinant by a constant.
    """
    f = Standard.of(problem)
    logits = f.x @ f.parameters(theta)
    basis, sizes, _ = np.linalg.svd(f.x, full_matrices=False)
    basis = basis[:, sizes > 1e-11 * sizes[0]] * np.sqrt(len(f.x))
    width = basis.shape[1]
    f = f._replace(x=basis, scale=np.ones(width - 1))
    ours = (basis.T @ (logits - logits[:, :1])[:, 1:] / len(basis)).ravel()

    def value(free):
        theta = np.hstack([np.zeros((width, 1)), free.reshape(width, -1)]).ravel()
        classes = problem.num_classes
        kept = [i for i in range(theta.size) if i % classes]
        sign, log_det = np.linalg.slogdet(len(f.x) * f.hessian(theta)[np.ix_(kept, kept)])
        return f.value(theta) - log_det / 2 / len(f.x) if sign > 0 else np.inf

    candidates = [value(ours)]
    for start in (ours, np.zeros_like(ours)):
        result = scipy.optimize.minimize(value, start, method="BFGS", options={"maxiter": 50})
        candidates.append(result.fun)
    return min(candidates), candidates[0]


def check_separation(problem: Problem, theta, reason, words) -> None:
    """Checks by a linear program whether some direction lets no example fall behind."""
    if any(problem.penalties):
        raise Failure(f"{words}: with a penalty there is an optimum")
    costs = problem.costs()
    f = Standard.of(problem)
    rows = []
    for i, k in zip(*np.nonzero(costs), strict=True):
        others = [j for j in range(costs.shape[1]) if j != k]
        difference = np.eye(costs.shape[1])[k] - np.eye(costs.shape[1])[others]
        rows.append(np.einsum("d,jk->jdk", f.x[i], difference).reshape(len(others), -1))
    margins = np.concatenate(rows)
    if len(margins) > 1500:
        return
    result = scipy.optimize.linprog(
        -margins.sum(0), A_ub=-margins, b_ub=np.zeros(len(margins)), bounds=(-1, 1), method="highs"
    )
    if result.status == 0 and -result.fun < 1e-6:
        raise Failure(f"{words}: the data are not")
    if reason == regression.SEPARATED and problem.labels.ndim == 1:
        at = margins @ f.parameters(theta).ravel()
        if not np.all(at > 0):
            raise Failure(f"{words}: {np.sum(at <= 0)} margins of the parameters are not positive")
