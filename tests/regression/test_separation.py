"""Detection of complete and quasi-complete separation, without false reports."""

import jax
import numpy as np
import pytest
from scipy.optimize import linprog
from sparse_rows import sparse_rows

from softjax import regression, streaming

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.usefixtures("compiled_fits")]

N = 24


def two_classes():
    """Features [N, 3] of every kind, for the labels 0, 1, 0, 1, ..."""
    rng = np.random.default_rng(0)
    y = np.arange(N) % 2
    side, noise = 2 * y - 1, rng.normal(size=N)
    level = np.where(np.arange(N) < 10, 0, side)  # the first ten cannot be told apart
    rare = 1.0 * (y * (np.arange(N) < 4))
    outlier = np.where(np.arange(N) == 1, 1e3, noise)
    other_way_round = np.where(np.arange(N) < 2, -1e-3, 1) * side
    more, last = rng.normal(size=(2, N))
    kinds = {
        "complete": ((side * (1 + noise**2), more, last), regression.SEPARATED),
        "a boundary": ((level, more, last), regression.QUASI_SEPARATED),
        "a boundary at 2000": ((2000 + level, more, last), regression.QUASI_SEPARATED),
        "a boundary, collinear": ((level, 3 * level, -2 * level), regression.QUASI_SEPARATED),
        "a rare level": ((rare, more, last), regression.QUASI_SEPARATED),
        "overlap": ((noise, more, last), regression.CONVERGED),
        "overlap, collinear": ((noise, 3 * noise, -2 * noise), regression.CONVERGED),
        "almost collinear": ((noise, noise + 1e-7 * more, last), regression.CONVERGED),
        "an outlier": ((outlier, more, last), regression.CONVERGED),
        "a pair the other way round": (other_way_round * [[1], [3], [-2]], regression.CONVERGED),
    }
    return y, {name: (np.stack(columns, 1), end) for name, (columns, end) in kinds.items()}


@pytest.mark.x64_once(True)
@pytest.mark.parametrize("name", two_classes()[1])
def test_two_classes(name):
    y, cases = two_classes()
    x, expected = cases[name]
    result = regression.fit(x, y)
    assert result.stop_reason == expected
    assert result.separated == (expected == regression.SEPARATED)
    assert all(np.isfinite(leaf).all() for leaf in result.params)
    if expected == regression.QUASI_SEPARATED:
        assert result.objective > 0.1


@pytest.mark.x64_once(True)
def test_a_fit_that_separates_all_examples_at_its_limit_of_steps_says_so():
    """With more features than examples: the rounding of the loss kept it from an earlier end."""
    x = np.random.default_rng(0).normal(size=(20, 50))
    result = regression.fit(x, np.arange(20) % 3, tol=1e-10, max_steps=60)
    assert result.separated
    assert result.stop_reason == regression.SEPARATED


@pytest.mark.x64_once(True)
@pytest.mark.parametrize(("num_classes", "tol"), [(2, 1e-10), (3, 1e-8)])
def test_random_data_are_told_as_a_linear_program_tells_them(num_classes, tol):
    """Also where the parameters have grown so far that a step moves nothing any more."""
    found = {}
    for seed in range(24):
        rng = np.random.default_rng(seed)
        shape = (40, num_classes + 1)
        x = rng.normal(size=shape) if seed % 2 else 1.0 * rng.integers(-2, 3, size=shape)
        scores = x @ rng.normal(size=(shape[1], num_classes)) * (1 + 2 * (seed % 3))
        y = (scores + rng.gumbel(size=scores.shape) * (0.1 + seed % 5)).argmax(1)
        if seed % 4 < 2:
            x[:, 0] = rng.random(40) < 0.15
            y[x[:, 0] == 1] = 0
        expected = by_linear_program(x, y, num_classes)
        assert regression.fit(x, y, num_classes=num_classes, tol=tol).stop_reason == expected, seed
        found[expected] = found.get(expected, 0) + 1
    assert min(found[kind] for kind in (regression.CONVERGED, regression.QUASI_SEPARATED)) >= 3


@pytest.mark.x64_once(True)
@pytest.mark.parametrize("way", ["proximal", "lbfgs", "optax", "streaming", "fit_many", "sparse"])
def test_no_solver_converges_where_there_is_no_optimum(way):
    """Nor do many fits at once, or a stream."""
    y, cases = two_classes()
    for name, (x, expected) in cases.items():
        if way == "fit_many":
            (reason, _) = regression.fit_many(x, np.stack([y, y])).stop_reason
        elif way == "streaming":
            reason = streaming.fit(streaming.ArrayRows(x, y), num_classes=2).stop_reason
        elif way == "sparse":
            reason = regression.fit(sparse_rows(x, nse=80), y).stop_reason  # with padding
        else:
            # Of 20,000 steps of "proximal" the last 18,000 change nothing but the time.
            limit = 2000 if way == "proximal" else None
            reason = regression.fit(x, y, solver=way, max_steps=limit).stop_reason
        # Steps of the first order may not come so far.
        assert reason in (expected, regression.PRECISION_FLOOR, regression.STEP_LIMIT), name
        if "boundary" in name or name in ("a rare level", "overlap"):
            assert reason == expected, name


def by_linear_program(x, y, num_classes):
    """The most of the margins of all examples, none below 0 and each counted up to 1."""
    augmented = np.hstack([x, np.ones((len(x), 1))])
    own, other = np.eye(num_classes)[y], np.eye(num_classes)
    rows = [
        np.kron(own[i] - other[k], augmented[i])
        for i in range(len(x))
        for k in range(num_classes)
        if k != y[i]
    ]
    count, size = len(rows), len(rows[0])
    rows = [row / np.linalg.norm(row) for row in rows]  # an enormous entry is no larger margin
    program = linprog(
        np.append(np.zeros(size), -np.ones(count)),
        A_ub=np.hstack([-np.array(rows), np.eye(count)]),
        b_ub=np.zeros(count),
        bounds=[(None, None)] * size + [(0, 1)] * count,
    )
    if -program.fun > count - 1e-6:
        return regression.SEPARATED
    return regression.QUASI_SEPARATED if -program.fun > 1e-6 else regression.CONVERGED


def three_classes():
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(N, 4))
    y = np.arange(N) % 3
    last = np.stack([np.where(y == 2, rng.integers(0, 3, N), 0), *noise.T[:3]], 1)
    return {
        "overlap": (noise, y, regression.CONVERGED),
        "without examples": (noise, np.arange(N) % 2, regression.QUASI_SEPARATED),
        "one ahead of two": (last, y, regression.QUASI_SEPARATED),
        "complete": (10 * np.eye(4)[y] + noise / 4, y, regression.SEPARATED),
    }


@pytest.mark.x64_once(True)
@pytest.mark.parametrize("name", three_classes())
def test_three_classes(name):
    x, y, expected = three_classes()[name]
    assert regression.fit(x, y, num_classes=3).stop_reason == expected
    # A penalty gives an optimum, but where the bias of a class without examples falls for ever.
    if name != "without examples":
        expected = regression.CONVERGED
    assert regression.fit(x, y, num_classes=3, l2=0.01).stop_reason == expected


@pytest.mark.x64_once(True)
def test_under_jit_and_vmap():
    y, cases = two_classes()
    names = ("complete", "a boundary", "overlap")
    x, expected = zip(*map(cases.get, names), strict=True)
    fits = jax.jit(jax.vmap(lambda x: regression.fit(x, y, num_classes=2)))(np.stack(x))
    assert fits.stop_reason == list(expected)


@pytest.mark.x64_once
def test_firth_has_an_optimum_where_classes_are_separated():
    x, y = np.arange(6.0)[:, None] * [1, 0, 0, 0], np.arange(6) // 2
    fit = regression.fit(x, y, solver="firth")
    assert fit.converged
    assert np.abs(fit.params.kernel).max() < 1


@pytest.mark.x64_once(True)
@pytest.mark.parametrize(
    ("solver", "tol"), [("newton-cg", 1e-6), ("newton-cg", 1e-8), ("newton", 1e-10)]
)
def test_one_class_that_is_separated_from_two_that_overlap(solver, tol):
    """The ties of the two classes are exact but for rounding, of which the proof makes nothing."""
    for seed in range(12):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(int(rng.integers(16, 40)), 4))
        y = np.argmax(x @ rng.normal(size=(4, 3)) + rng.gumbel(size=(len(x), 3)), 1)
        y[:4] = 0, 1, 0, 1
        x[:4] = np.array([[1], [1], [-1], [-1]]) * rng.normal(size=4)  # these two overlap
        normal = rng.normal(size=4)
        level = x @ normal / np.linalg.norm(normal)
        x += np.where(y == 2, 1 + level[y < 2].max() - level, 0)[:, None] * normal
        y[-1], x[-1] = 2, 9 * normal
        weights = rng.random(len(x))
        fit = regression.fit(x, y, solver=solver, sample_weights=weights, tol=tol)
        assert fit.stop_reason == "quasi-separated", seed
