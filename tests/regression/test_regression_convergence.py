"""The meaning of "converged" in every solver, and changes of the data that keep the optimum.

Many problems of one shape are solved at once, so that one program for each solver is enough.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from sparse_rows import sparse_rows

from softjax import regression, streaming
from softjax.regression import _preconditioner, _solve
from softjax.regression._loop import NEWTONIAN
from softjax.regression._problem import Data

pytestmark = [
    pytest.mark.x64_once(True),
    pytest.mark.compiled_quickly,
    pytest.mark.usefixtures("compiled_fits"),
]

N, D, K = 24, 3, 3
SOLVERS = ("newton-cg", "newton", "lbfgs", "proximal", "firth")
L2 = 1e-3
TOL = 1e-6
RANDOM = 60  # of each solver; the campaign has 500


def fits(solver, problems):
    """The program of a solver for many problems of one shape: what `fit` runs for one.

    An end that `fit` doubts, and for which it looks for a proof of separation, is none here.
    """
    advance = partial(_solve.advance, solver)
    limit = jnp.int32(50 if solver == "firth" else 200)  # all wait for the slowest

    def one(x, targets, weights, class_weights, l2, l1, theta):
        mean = jnp.mean(weights)
        data = Data(
            num_classes=K,
            features=x,
            labels=targets,
            weights=weights / mean,
            class_weights=class_weights,
            l2=l2,
            l1=l1,
            count=mean * N,
        )
        theta = _solve.start_of(solver, data, theta)
        state = jax.tree.map(jnp.asarray, _solve.solver_of(solver, data).start(data, theta))
        outcome = advance(data, jnp.asarray(TOL), state, limit)
        floor = jnp.int32(_solve.Status.PRECISION_FLOOR)
        status = jnp.where(outcome.suspected | outcome.hidden, floor, outcome.status)
        return outcome.state.theta, outcome.objective, status

    return map(np.asarray, jax.jit(jax.vmap(one))(*map(np.stack, zip(*problems, strict=True))))


def base(seed=0):
    """Features, labels as a distribution, weights, class weights, l2, l1 and a start."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N, D))
    z = x @ rng.normal(size=(D, K)) + rng.gumbel(size=(N, K))
    weights = rng.permutation(np.repeat([0.0, 1.0, 2.0], N // 3))
    return x, np.eye(K)[z.argmax(1)], weights, np.ones(K), L2, 0.0, np.zeros((K, D + 1))


def of(problem, **changes):
    names = ("x", "targets", "weights", "class_weights", "l2", "l1", "theta")
    return tuple({**dict(zip(names, problem, strict=True)), **changes}.values())


def laws(solver):
    """Problems with the optimum of `base`, and how its parameters [K, D + 1] follow from theirs."""
    problem = x, targets, weights, _, l2, *_ = base()
    l2 = 0.0 if solver == "firth" else l2
    problem = of(problem, l2=l2)
    rng = np.random.default_rng(1)
    rows, classes = rng.permutation(N), np.array([2, 0, 1])
    absent = weights[:, None] == 0
    copies = np.repeat(np.arange(N), weights.astype(int))
    mean, scale = np.array([100.0, -300.0, 7.0]), np.array([1e-6, 1e3, 2.0])
    confident = 1e4 * rng.normal(size=(K, D + 1))

    def shifted(theta):
        return np.c_[theta[:, :-1], theta[:, -1] + theta[:, :-1] @ mean]

    def same(theta):
        return theta

    cases = {
        "as it is": (problem, same),
        "rows of weight 0 are others": (
            of(
                problem,
                x=np.where(absent, rng.normal(size=x.shape) * 50, x),
                targets=np.where(absent, np.roll(targets, 1, 1), targets),
            ),
            same,
        ),
        "rows in place of weights": (
            of(problem, x=x[copies], targets=targets[copies], weights=np.ones(N)),
            same,
        ),
        "rows in another order": (
            of(problem, x=x[rows], targets=targets[rows], weights=weights[rows]),
            same,
        ),
        "classes in another order": (
            of(problem, targets=targets[:, classes]),
            lambda theta: theta[np.argsort(classes)],
        ),
        "features around other means": (of(problem, x=x + mean), shifted),
        "from a model that is sure of other labels": (of(problem, theta=confident), same),
    }
    if solver != "firth":
        # Of Firth's penalty weights are numbers of examples.
        for c in (1e-12, 1e-3, 1e12):
            scaled = {"l2": l2 * c, "class_weights": np.full(K, c)}
            cases[f"weights times {c}"] = (of(problem, weights=weights * c), same)
            cases[f"class weights times {c}"] = (of(problem, **scaled), same)
            soft = {"l2": l2 * c, "targets": targets * c}
            cases[f"labels times {c}"] = (of(problem, **soft), same)
    return cases, (of(problem, l2=0.0), of(problem, l2=0.0, x=x * scale), scale)


def random_problem(seed):
    """Features of every kind, and starts, weights and penalties of every size."""
    rng = np.random.default_rng([7, seed])
    x = rng.normal(size=(N, D))
    kind = seed % 6
    if kind == 1:
        x += rng.uniform(-300, 300, D)
    elif kind == 2:
        x *= 10 ** rng.uniform(-5, 5, D)
    elif kind == 3:
        x[:, 2] = x[:, 0] - x[:, 1] + 10 ** rng.uniform(-7, 0) * x[:, 2]
    elif kind == 4:
        x[:, 1] = -x[:, 0] + 0.3 * x[:, 1] - 0.3
    elif kind == 5:
        x = np.exp(2 * x)
    z = (x - x.mean(0)) / x.std(0) @ rng.normal(size=(D, K)) + rng.gumbel(size=(N, K))
    targets = np.eye(K)[z.argmax(1)] if rng.random() < 0.5 else scipy.special.softmax(z, -1)
    targets *= 10 ** rng.uniform(-9, 9)
    weights = rng.integers(0, 3, N) + np.eye(N)[0]
    class_weights = 10 ** rng.uniform(-1, 1, K)
    size = targets.sum(-1).mean()
    l2 = size * rng.choice([0, 1e-6, 1e-2]) * x.var(0).max()
    theta = 10 ** rng.uniform(-2, 5) * rng.normal(size=(K, D + 1)) * (rng.random() < 0.5)
    return x, targets, weights, class_weights, l2, 0.0, theta


def random_problem_for(solver, seed):
    """One that the solver takes: without l2, or with l1."""
    problem = random_problem(seed)
    size = problem[1].sum(-1).mean()
    if solver == "firth":  # which counts examples
        return of(problem, l2=0.0, targets=problem[1] / size)
    return of(problem, l1=[0.0, 1e-4, 1e-2][seed % 3] * size) if solver == "proximal" else problem


@cache
def solved(solver):
    cases, units = laws(solver)
    problems = [problem for problem, _ in cases.values()] + list(units[:2])
    drawn = [random_problem_for(solver, seed) for seed in range(RANDOM)]
    return cases, units, drawn, list(zip(*fits(solver, problems + drawn), strict=True))


def value(problem, theta):
    """The objective, its smallest subgradient relative to the documented size, in float64."""
    x, targets, weights, class_weights, l2, l1, _ = problem
    q = (weights / weights.sum())[:, None] * targets * class_weights
    z = x @ theta[:, :-1].T + theta[:, -1]
    log_p = scipy.special.log_softmax(z, -1)
    kernel = theta[:, :-1]
    objective = -(q * log_p).sum() + l2 / 2 * (kernel**2).sum() + l1 * np.abs(kernel).sum()
    residual = q.sum(-1, keepdims=True) * np.exp(log_p) - q
    slope = residual.T @ x + l2 * kernel
    at_zero = np.sign(slope) * np.maximum(np.abs(slope) - l1, 0)
    slope = np.where(kernel == 0, at_zero, slope + l1 * np.sign(kernel))
    mass = q.sum()
    size = np.sqrt(mass * (q.sum(-1) @ x**2))
    norm = max(np.max(np.abs(slope) / size), np.abs(residual.sum(0)).max() / mass)
    return objective, norm, mass * np.log(K)


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_changes_no_optimum(solver):
    cases, _, _, results = solved(solver)
    (theta, _, _), *_ = results
    for (name, (_, back)), (other, _, status) in zip(cases.items(), results, strict=False):
        assert status == _solve.Status.CONVERGED, name
        # The gradient is within 1e-6, and the curvature is some hundredths.
        np.testing.assert_allclose(back(other), theta, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_units_of_the_features(solver):
    """Without a penalty of the kernel."""
    cases, (_, _, scale), _, results = solved(solver)
    (plain, _, _), (scaled, _, status) = results[len(cases) : len(cases) + 2]
    assert status == _solve.Status.CONVERGED
    np.testing.assert_allclose(scaled[:, :-1] * scale, plain[:, :-1], atol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_converged_is_the_optimum_and_no_point_above_the_start(solver):
    _, _, drawn, results = solved(solver)
    best = [min(solved(other)[3][-RANDOM + i][1] for other in SOLVERS[:3]) for i in range(RANDOM)]
    # The others are separated, or nearly collinear, which `fit` goes on with in float64.
    assert count_converged(solver, drawn, results[-RANDOM:], best) > 0.6 * RANDOM


def count_converged(solver, drawn, results, best):
    """How many of the fits say that they have converged, which each is then held to.

    `best` are the smallest objectives that are known, without l1.
    """
    converged = 0
    for i, (problem, (theta, objective, status)) in enumerate(zip(drawn, results, strict=True)):
        assert np.isfinite(theta).all(), i
        ours, norm, at_zeros = value(problem, theta)
        # A loss near 0 is known to the rounding of log p.
        np.testing.assert_allclose(objective, ours, rtol=1e-6, atol=1e-12 * at_zeros)
        if status != _solve.Status.CONVERGED:
            continue
        converged += 1
        if solver == "firth":
            continue  # its objective and its gradient have a part of the information
        assert ours <= at_zeros * (1 + 1e-9), i
        assert norm <= 2 * TOL, i
        if problem[5] == 0:
            assert ours <= best[i] * (1 + 3e-6), i
    return converged


# What `fit` and its relatives add to the programs


def nearly_collinear(e):
    """Features whose third is the sum of the others but for e times c, which the labels follow."""
    a, b, c = np.random.default_rng(0).normal(size=(3, 200))
    y = (np.random.default_rng(1).random(200) < 1 / (1 + np.exp(-2 * c))).astype(int)
    return np.stack([a, b, a + b + e * c], 1), np.stack([a, b, c], 1), y


@pytest.mark.parametrize("solver", ["newton-cg", "newton"])
def test_nearly_collinear_features_end_at_the_optimum(solver):
    """That of the same span, without a penalty."""
    _, apart, y = nearly_collinear(1.0)
    best = regression.fit(apart, y).objective
    for e in (1e-2, 1e-4, 1e-5, 1e-6, 1e-7):
        result = regression.fit(nearly_collinear(e)[0], y, solver=solver)
        assert result.converged, (e, result.stop_reason)
        assert result.objective == pytest.approx(best, rel=2e-6)


@pytest.mark.parametrize(
    ("way", "dtype"),
    [
        ("sparse", "float64"),
        ("sparse", "float32"),
        ("sparse lbfgs", "float64"),
        ("sparse proximal", "float64"),
        ("many features", "float64"),
    ],
)
def test_a_diagonal_metric_does_not_hide_nearly_collinear_features(way, dtype, monkeypatch):
    """Of sparse or of many features; the best is that of the few, dense."""
    for e in (1e-2, 1e-6, 1e-7):
        x, _, y = nearly_collinear(e)
        x = x.astype(dtype)
        best = regression.fit(x.astype(np.float64), y).objective
        if way == "many features":
            monkeypatch.setattr(_preconditioner, "LARGEST_FACTOR", 16)
            x = np.c_[x, np.zeros((len(x), 16), dtype)]
            assert _preconditioner.is_diagonal(x)
            result = regression.fit(x, y)
        else:
            solver = way.partition(" ")[2] or "newton-cg"
            result = regression.fit(sparse_rows(x), y, solver=solver)
        assert result.stop_reason in (regression.CONVERGED, regression.PRECISION_FLOOR)
        if result.converged or dtype == "float64":
            assert result.objective == pytest.approx(best, rel=1e-5), e
        if dtype == "float64" and e > 1e-7:
            assert result.converged, e


@pytest.mark.parametrize(
    ("form", "dtype"),
    [(np.asarray, "float32"), (lambda x: sparse_rows(x), "float64")],
)
def test_many_fits_at_once_do_not_hide_nearly_collinear_features(form, dtype):
    for e in (1e-2, 1e-6):
        x, _, y = nearly_collinear(e)
        x = x.astype(dtype)
        fits = regression.fit_many(form(x), np.stack([y, 1 - y]))
        best = regression.fit(x.astype(np.float64), y).objective
        for reason, objective in zip(fits.stop_reason, fits.objective, strict=True):
            # Parameters of the size of 1 / e are rounded in float32.
            assert reason == regression.CONVERGED or e < 1e-2 or dtype == "float32"
            if reason == regression.CONVERGED:
                assert objective == pytest.approx(best, rel=1e-5)


def test_nearly_collinear_features_of_float32_do_not_converge_elsewhere():
    """Parameters of the size of 1 / e are rounded, and may be at the floor of the precision."""
    for e in (1e-2, 1e-4, 1e-5, 1e-6):
        x, _, y = nearly_collinear(e)
        rounded, programs = x.astype(np.float32), _solve.within_trace._cache_size()
        result = regression.fit(rounded, y)
        # What continues in float64 has the program of a fit, and none that is part of a trace.
        assert _solve.within_trace._cache_size() == programs
        best = regression.fit(rounded.astype(np.float64), y).objective
        if result.converged or e >= 1e-4:
            assert result.objective == pytest.approx(best, rel=1e-4)
        assert result.objective < 1.1 * best, e


def test_collinear_features_without_a_difference_converge():
    x, _, y = nearly_collinear(0.0)
    result = regression.fit(x, y)
    assert result.converged
    without = np.where(np.arange(3) < 2, x, 0)
    assert result.objective == pytest.approx(regression.fit(without, y).objective, rel=1e-9)


@pytest.mark.x64_once
@pytest.mark.parametrize("solver", ["newton-cg", "newton", "lbfgs"])
def test_columns_of_ones_and_zeros_that_sum_to_one_converge_in_float32(solver):
    """Float64 finds that nothing is left along what the columns have in common."""
    rng = np.random.default_rng(0)
    x = np.c_[np.eye(3)[rng.integers(3, size=200)], rng.normal(size=200)].astype(np.float32)
    y = (x[:, 1:] + rng.gumbel(size=(200, K))).argmax(1)
    result = regression.fit(x, y, solver=solver)
    assert result.converged
    without = np.where(np.arange(4) < 1, 0, x.astype(np.float64))
    with jax.enable_x64(True):
        best = regression.fit(without, y).objective
    assert result.objective == pytest.approx(best, rel=1e-6)


def test_fits_of_a_scale_are_those_of_another_in_optax_and_many():
    x, targets, weights, *_ = base()
    expected = regression.fit(x, targets, l2=L2, sample_weights=weights, tol=1e-10).params
    for c in (1e-12, 1.0):
        options = {"class_weights": np.full(K, c), "l2": c * L2}
        result = regression.fit(x, targets, sample_weights=weights, solver="optax", **options)
        assert result.converged
        np.testing.assert_allclose(result.params.kernel, expected.kernel, atol=1e-4)
        lanes = np.stack([weights, 1e9 * weights])
        many = regression.fit_many(x, targets, sample_weights=lanes, **options)
        assert np.all(many.converged)
        for kernel in many.params.kernel:
            np.testing.assert_allclose(kernel, expected.kernel, atol=1e-4)


def test_a_stream_ends_at_the_optimum_of_nearly_collinear_features():
    x, apart, y = nearly_collinear(1e-5)
    result = streaming.fit(streaming.ArrayRows(x, y), num_classes=2)
    assert result.converged
    assert result.objective == pytest.approx(regression.fit(apart, y).objective, rel=2e-6)


@pytest.mark.x64_once
def test_labels_too_small_for_a_sum_in_float32_are_fitted():
    """Their products with 1 / N would be 0."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, D)).astype(np.float32)
    labels = rng.uniform(0.2, 1, (N, K)).astype(np.float32)
    small = regression.fit(x, labels * np.float32(1e-37))
    plain = regression.fit(x, labels)
    assert small.converged
    np.testing.assert_allclose(small.params.kernel, plain.params.kernel, atol=1e-4)


def test_a_newton_step_of_few_nats_leaves_little_to_promise():
    """The bound that `NEWTONIAN` is derived from, at random points of random problems."""
    rng, bound = np.random.default_rng(5), lambda m: np.exp(m) * ((np.exp(m) - 1 - m) / m) ** 2
    seen = []
    for _ in range(100):
        x = np.column_stack([rng.normal(size=(N, D)) * 10 ** rng.uniform(-1, 1, D), np.ones(N)])
        y, l2 = rng.integers(K, size=N), 10 ** rng.uniform(-4, 0)

        def gradient_and_hessian(theta, x=x, y=y, l2=l2):
            p = scipy.special.softmax(x @ theta, 1)
            g = x.T @ (p - np.eye(K)[y]) / N + l2 * theta
            own = p[:, :, None] * (np.eye(K) - p[:, None])
            h = np.einsum("nd,nkj,ne->dkej", x, own, x) / N
            return g.ravel(), h.reshape(g.size, -1) + l2 * np.eye(g.size)

        theta = rng.normal(size=(D + 1, K)) / np.abs(x).max(0)[:, None]
        for _ in range(4):
            g, h = gradient_and_hessian(theta)
            d = -np.linalg.solve(h, g)
            m = np.ptp(x @ d.reshape(theta.shape), axis=1).max()
            theta += d.reshape(theta.shape) * min(1, 3 / m)
            if 1e-3 < m < 3:
                after, curvature = gradient_and_hessian(theta)
                left = after @ np.linalg.solve(curvature, after) / (g @ -d)
                assert left <= bound(m) * (1 + 1e-6), (m, left, bound(m))
                seen.append(m)
    assert len(seen) > 100
    assert min(seen) < NEWTONIAN
    assert bound(NEWTONIAN) < 0.15
