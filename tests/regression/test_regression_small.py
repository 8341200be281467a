"""Small tables and sparse features are fitted in NumPy, where the optimum is clear.

Nothing is compiled for them.

The reference is the formula of the gradient in NumPy float64: where it vanishes, a convex objective
has its optimum.
"""

import jax
import numpy as np
import pytest
from jax.experimental.sparse import BCOO
from jax.sharding import AxisType
from sparse_rows import sparse_rows

from softjax import regression
from softjax.regression import _cross_validation, _host_folds, _host_lbfgs, _host_newton, _solve

pytestmark = pytest.mark.compiled_quickly
N, D, K = 60, 3, 4


def drawn(seed=0, examples=N, classes=K):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(examples, D)) * np.array([1.0, 1e-3, 30.0]) + np.array([0.0, 0.0, 100.0])
    labels = np.argmax(rng.normal(size=(examples, classes)) + x[:, :1], 1)
    labels[:classes] = np.arange(classes)
    return x, labels.astype(np.int32)


def beside_a_huge_entry(seed):
    """Some examples of three features, one of which has a huge entry, and their generator."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(5, 40))
    x = rng.normal(size=(n, 3))
    labels = np.argmax(x @ rng.normal(size=(3, 3)) + rng.gumbel(size=(n, 3)), 1)
    labels[:3] = range(3)
    x[rng.integers(n), 0] = 10.0 ** rng.integers(2, 7)
    return x, labels, rng


def stored(x, seed=0):
    """The same matrix as BCOO: in any order, with places outside of it that only pad."""
    rows, columns = np.nonzero(x)
    places = np.stack([rows, columns], 1)
    order = np.random.default_rng(seed).permutation(len(rows))
    places = np.concatenate([places[order], [x.shape, x.shape]]).astype(np.int32)
    entries = np.append(x[rows, columns][order], [7, 7]).astype(x.dtype)
    return BCOO((entries, places), shape=x.shape)


def gradient(params, x, q, l2, factors, offset):
    """The gradient of the objective over the mass of q [N, K], relative to its largest size."""
    kernel, bias = (np.asarray(part, np.float64) for part in params)
    z = x @ kernel + bias + offset
    e = np.exp(z - z.max(1, keepdims=True))
    p, weights = e / e.sum(1, keepdims=True), q.sum(1)
    residual = weights[:, None] * p - q
    g = x.T @ residual + l2 * factors[:, None] * kernel * q.sum()
    size = np.sqrt(weights @ np.square(x) * q.sum())
    size = np.where(size > 0, size, 1)  # of a column of zeros
    return np.abs(g / size[:, None]).max(), np.abs(residual.sum(0)).max() / q.sum()


@pytest.fixture
def nothing_is_compiled(monkeypatch):
    def refuse(*_):
        raise AssertionError("a program was asked for")

    monkeypatch.setattr(_solve, "Run", refuse)


@pytest.mark.parametrize(
    "options",
    [
        {"l2": 0.01},
        {},
        {"l2": 0.01, "sample_weights": np.arange(N) % 3},
        {"l2": 0.3, "class_weights": np.array([1e-6, 1.0, 5.0, 2.0])},
        {"l2": 0.01, "offset": np.linspace(-3, 3, N * K).reshape(N, K)},
        {"l2": 0.1, "penalty_factors": np.array([1.0, 0.0, 4.0])},
        {"l2": 0.01, "fit_intercept": False},
    ],
    ids=lambda options: ", ".join(list(options)) or "none",
)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_the_gradient_of_a_fit_in_numpy_vanishes(
    options, sparse, nothing_is_compiled, monkeypatch, dtype
):
    x, labels = drawn()
    x = x.astype(dtype)
    if sparse:
        monkeypatch.setattr(_host_newton, "MOST_NUMBERS", 0)
        x[np.random.default_rng(1).random(x.shape) < 0.5] = 0
        x[5] = 0
        if options and np.all(options.get("penalty_factors", 1)):  # a penalty holds each feature
            x[:, 1] = 0
    one_hot = np.eye(K)[labels]
    for y, q in ((labels, one_hot), ((one_hot + 0.1).astype(dtype), one_hot + 0.1)):
        result = regression.fit(stored(x) if sparse else x, y, **options)
        assert (result.stop_reason, result.params.kernel.dtype) == ("converged", dtype)
        q = q * np.asarray(options.get("class_weights", np.ones(K)))
        weights = options.get("sample_weights", np.ones(N))
        q = q * (weights / weights.mean())[:, None]
        factors, offset = options.get("penalty_factors", np.ones(D)), options.get("offset", 0)
        # class weights do not enter the mean, the penalty does: l2 is beside a sum over N
        l2 = options.get("l2", 0) * N / q.sum()
        of_kernel, of_bias = gradient(result.params, x.astype(np.float64), q, l2, factors, offset)
        assert of_kernel <= 1.1e-6
        if options.get("fit_intercept", True):
            assert of_bias <= 1.1e-6
        else:
            assert not np.asarray(result.params.bias).any()


@pytest.fixture
def all_are_large(monkeypatch):
    monkeypatch.setattr(_host_newton, "takes", lambda *_: False)
    for name, number in (("FEWEST_NUMBERS", 0), ("FEWEST_CLASSES", 2), ("SAMPLE", 40)):
        monkeypatch.setattr(_host_lbfgs, name, number)
    monkeypatch.setattr(_host_lbfgs, "FEWEST_ROWS", 16)
    monkeypatch.setattr(_host_lbfgs, "CACHED", 0)


def test_sums_of_a_part_of_the_examples_and_at_zero(monkeypatch):
    """If each example occurs twice, every second one has the scatter of all."""
    x, labels = drawn()
    labels, weights = np.asarray(labels), np.arange(N) % 3 / np.sum(np.arange(N) % 3)
    one = _host_lbfgs.Large(x, labels, weights, np.zeros(D + 1), 1).with_moments()
    theta = np.random.default_rng(1).normal(size=(K, D + 1))
    whole = one.at(theta, curved=True)
    monkeypatch.setattr(_host_lbfgs, "SCATTERED", N // (D + 1))
    two = one._replace(features=x.repeat(2, 0), labels=labels.repeat(2), weights=weights.repeat(2))
    half = two._replace(weights=two.weights / 2).at(theta, curved=True)
    for part, other in zip(half, whole, strict=True):
        np.testing.assert_allclose(part, other, atol=1e-14)
    for bias in (1, 0):
        here, zero = one._replace(bias=bias), np.zeros((K, D + 1))
        np.testing.assert_allclose(here.at_zero(K).gradient, here.at(zero).gradient, atol=1e-15)
        assert here.at_zero(K).loss == pytest.approx(here.at(zero).loss, rel=1e-14)


@pytest.mark.parametrize(
    "options",
    [
        {"l2": 0.01},
        {"l2": 1e-4, "sample_weights": np.arange(N) % 3},
        {"l2": 0.3, "class_weights": np.array([1e-3, 1.0, 5.0, 2.0])},
        {"l2": 0.01, "fit_intercept": False},
    ],
    ids=lambda options: ", ".join(list(options)),
)
def test_the_gradient_of_a_fit_to_a_large_table_vanishes(
    options, nothing_is_compiled, all_are_large, dtype
):
    x, labels = drawn()
    x = x.astype(dtype)
    result = regression.fit(x, labels, **options)
    assert (result.stop_reason, result.params.kernel.dtype) == ("converged", dtype)
    q = np.eye(K)[labels] * options.get("class_weights", np.ones(K))
    weights = options.get("sample_weights", np.ones(N))
    q *= (weights / weights.mean())[:, None]
    l2 = options["l2"] * N / q.sum()
    norms = gradient(result.params, x.astype(np.float64), q, l2, np.ones(D), 0)
    assert max(norms[: 1 + options.get("fit_intercept", True)]) <= 1.1e-6
    kernel, bias = (np.asarray(part, np.float64) for part in result.params)
    z = x.astype(np.float64) @ kernel + bias
    losses = np.logaddexp.reduce(z, 1, keepdims=True) - z
    penalty = options["l2"] / 2 * np.square(kernel).sum()
    assert abs(np.vdot(q, losses) / N + penalty - result.objective) < 1e-6


@pytest.mark.parametrize("why", ["no examples of a class", "far from 0", "no penalty", "few steps"])
def test_a_large_table_without_a_clear_end_is_left_to_the_compiled_solver(
    why, nothing_is_compiled, all_are_large
):
    x, labels = drawn()
    options = {"l2": 0.0 if why == "no penalty" else 0.01, "num_classes": K + (why[:2] == "no")}
    options["max_steps"] = 1 if why == "few steps" else None
    x = x + np.float32(1e7) * (why == "far from 0")
    with pytest.raises(AssertionError, match="a program was asked for"):
        regression.fit(x.astype(np.float32), labels, **options)


@pytest.mark.x64_once(True)
def test_a_small_fit_is_that_of_the_compiled_solver(monkeypatch):
    x, labels = drawn()
    small = regression.fit(x, labels, l2=0.01, tol=1e-9)
    monkeypatch.setattr(_host_newton, "takes", lambda *_: False)
    compiled = regression.fit(x, labels, l2=0.01, tol=1e-9)
    scale = x.std(0)[:, None]
    np.testing.assert_allclose(
        small.params.kernel * scale, compiled.params.kernel * scale, atol=1e-8
    )
    assert abs(small.objective - compiled.objective) < 1e-13
    assert small.separated == compiled.separated
    kinds = [{name: type(value) for name, value in r.history[0].items()} for r in (small, compiled)]
    assert kinds[0] == kinds[1]
    assert type(small.params.kernel) is type(compiled.params.kernel)


@pytest.mark.x64_once(True)
def test_sparse_features_give_the_fit_of_dense_ones(nothing_is_compiled):
    """Also where entries are stored in two parts, and beside entries outside of the matrix."""
    x, labels = drawn()
    x = np.where(np.random.default_rng(1).random(x.shape) < 0.5, x, 0.0)
    rows = sparse_rows(x, nse=x.size)
    data = np.concatenate([rows.data, rows.data / 4])
    halves = BCOO((data, np.tile(rows.indices, (2, 1))), shape=x.shape)
    folds = {"folds": np.arange(N) % 4, "l2": [0.01, 1.0]}
    for features, of in ((rows, x), (halves, 1.25 * x)):
        sparse, dense = (regression.fit(each, labels, l2=0.01) for each in (features, of))
        np.testing.assert_array_equal(sparse.params.kernel, dense.params.kernel)
        sparse, dense = (regression.fit_path(each, labels, **folds) for each in (features, of))
        losses = (path.cross_validation.loss for path in (sparse, dense))
        np.testing.assert_array_equal(*losses)


@pytest.mark.x64_once(True)
def test_a_fit_in_numpy_starts_where_it_is_told_to(nothing_is_compiled, monkeypatch):
    x, labels = drawn()
    options = {"l2": 0.01, "tol": 1e-9}
    for rows, small in ((x, 10**9), (stored(x), 0)):
        monkeypatch.setattr(_host_newton, "MOST_NUMBERS", small)
        first = regression.fit(rows, labels, **options)
        again = regression.fit(rows, labels, init=first.params, **options)
        assert again.steps < first.steps
        assert abs(again.objective - first.objective) < 1e-12
        far = jax.tree.map(lambda leaf: leaf + 1e3 * np.arange(K), first.params)
        assert regression.fit(rows, labels, init=far, **options).steps == first.steps


def left_to_gain(params, x, q, ridge):
    """What Newton's step from some parameters promises, relative to the objective."""
    x = np.column_stack([x, np.ones(len(x))])
    theta = np.concatenate((params[0], params[1][None])).astype(np.float64)
    z = x @ theta
    z = z - z.max(1, keepdims=True)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    weights, ridge = q.sum(1), np.append(ridge, 0)
    g = x.T @ (weights[:, None] * p - q) + ridge[:, None] * theta
    h = -np.einsum("i,ik,il,ij,im->jkml", weights, p, p, x, x, optimize=True)
    for k in range(K):
        h[:, k, :, k] += (weights * p[:, k] * x.T) @ x + np.diag(ridge)
    size = np.sqrt(np.einsum("jkjk->jk", h)).ravel()
    size = np.where(size > 0, size, 1)
    h = h.reshape(len(size), -1) / size / size[:, None]
    promise = g.ravel() / size @ np.linalg.lstsq(h, g.ravel() / size, 1e-13)[0] / 2
    value = -np.sum(q * np.log(np.where(q > 0, p, 1)))
    return promise / (value + np.sum(ridge[:, None] * theta**2) / 2)


@pytest.mark.x64_once(True)
@pytest.mark.parametrize("kind", ["far", "huge", "constant", "scales", "nearly collinear", "plain"])
def test_what_a_fit_in_numpy_calls_an_optimum_is_one(kind, nothing_is_compiled, monkeypatch):
    rng, found = np.random.default_rng(len(kind)), 0
    for seed in range(8):
        x, labels = drawn(seed)
        x[:, 2] -= 100
        weights = np.where(np.arange(N) < K, 1.0, rng.integers(0, 3, N))
        if kind == "far":
            x[:, 0] += 10.0 ** (seed % 4 + 1)
        elif kind == "huge":
            x[rng.integers(N), 0] = 10.0 ** (seed + 1)
        elif kind == "constant":  # within a class
            x[:, 0] = labels + (labels == 1) * 1e-9 * x[:, 0]
        elif kind == "scales":
            x *= 10.0 ** rng.integers(-6, 6, D)
        elif kind == "nearly collinear":
            x[:, 0] = x[:, 1] * (1 + 10.0 ** -(seed + 1) * x[:, 2])
        l2, tol = 10.0 ** -(seed % 4 * 2), 10.0 ** -(6 + seed % 2 * 4)
        q = np.eye(K)[labels] * (weights / weights.sum())[:, None]
        for rows, small in ((x, 10**9), (stored(x), 0)):
            monkeypatch.setattr(_host_newton, "MOST_NUMBERS", small)
            options = {"l2": l2, "sample_weights": weights, "tol": tol}
            try:
                params = regression.fit(rows, labels, **options).params
            except AssertionError:  # an end in doubt is left to the compiled solver
                continue
            found += 1
            assert left_to_gain(tuple(map(np.asarray, params)), x, q, np.full(D, l2)) <= tol
    assert found > 4


@pytest.mark.x64_once(True)
def test_a_loose_tolerance_is_kept_beside_a_huge_entry(nothing_is_compiled):
    """A step that only rounding stopped, and one beside extreme features, do not prove an end."""
    ended = 0
    for seed in (*range(590, 600), *range(740, 750), *range(890, 900), *range(990, 1000)):
        x, labels, rng = beside_a_huge_entry(seed)
        l2, tol = 10 ** rng.uniform(-4, -1), 10.0 ** -int(rng.integers(3, 6))
        try:
            loose, tight = (regression.fit(x, labels, l2=l2, tol=t) for t in (tol, 1e-10))
        except AssertionError:  # an end in doubt is left to the compiled solver
            continue
        ended += 1
        assert loose.objective <= tight.objective * (1 + 4 * tol), seed
    assert ended > 30


@pytest.mark.x64_once(False)
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [1e-40, 1e-30, 3e38])
def test_weights_of_any_size_give_one_fit_and_no_warning(size, nothing_is_compiled):
    x, labels = drawn()
    result = regression.fit(x, labels, l2=0.01, sample_weights=np.full(N, size))
    expected = regression.fit(x, labels, l2=0.01)
    assert abs(result.objective - expected.objective) < 1e-6
    assert result.stop_reason == "converged"


@pytest.mark.x64_once(False)
def test_the_parameters_of_a_small_fit_are_on_the_mesh_that_is_set(nothing_is_compiled):
    x, labels = drawn()
    mesh = jax.make_mesh((1,), ("a",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        for part in regression.fit(x, labels, l2=0.01).params:
            assert part.sharding.mesh == mesh


@pytest.mark.x64_once(False)
def test_a_small_fit_is_on_the_default_device(nothing_is_compiled):
    x, labels = drawn()
    device = jax.devices()[-1]
    with jax.default_device(device):
        result = regression.fit(x, labels, l2=0.01)
    assert all(part.devices() == {device} for part in result.params)


@pytest.mark.x64_once(True)
@pytest.mark.parametrize(
    "case", ["separated", "partly", "collinear", "absent", "few steps", "far", "work", "sparse"]
)
def test_an_end_in_doubt_is_left_to_the_compiled_solvers(case, monkeypatch):
    x, labels = drawn()
    options = {}
    if case == "separated":
        labels = (x[:, 0] > 0).astype(np.int32)
    elif case == "partly":  # one example of class 3 alone, at the border
        x, labels = drawn(classes=3)
        x[0], labels[0] = [50.0, 0.0, 0.0], 3
    elif case == "collinear":
        x[:, 1] = x[:, 0] * (1 + 1e-12)
    elif case == "absent":
        options = {"num_classes": K + 1, "l2": 0.1}
    elif case == "few steps":
        options = {"max_steps": 1}
    elif case == "sparse":  # and collinear, without a penalty
        x[:, 1] = x[:, 0]
        x = stored(x)
        monkeypatch.setattr(_host_newton, "MOST_NUMBERS", 0)
    elif case == "work":  # more than three products with the features
        monkeypatch.setattr(_host_newton, "MOST_WORK", 3 * N * K * (D + 16))
    else:
        x = (x + 1e7).astype(np.float32)
    asked = []

    class Asked(Exception):
        pass

    def run(*arguments):
        asked.append(arguments)
        raise Asked

    monkeypatch.setattr(_solve, "Run", run)
    with pytest.raises(Asked):
        regression.fit(x, labels, **options)


@pytest.mark.x64_once(True)
@pytest.mark.parametrize(
    "case", ["clear", "alone", "few steps", "watched", "work", "large", "sparse"]
)
def test_folds_in_doubt_or_too_many_are_left_to_the_compiled_program(case, monkeypatch):
    x, labels = drawn()
    options, folds = {}, np.arange(N) % 4
    if case == "alone":  # one class in one fold
        folds = np.where(labels == 3, 0, folds)
    elif case == "few steps":
        options = {"max_steps": 1}
    elif case == "watched":
        options = {"callback": lambda event: None}
    elif case == "work":
        monkeypatch.setattr(_host_folds, "MOST_WORK", 10 * N * K * (D + 16) - 1)
    elif case == "large":
        monkeypatch.setattr(_host_newton, "MOST_NUMBERS", N * (D + K) - 1)
    elif case == "sparse":  # of any size, and clear
        monkeypatch.setattr(_host_newton, "MOST_NUMBERS", 0)
        x = stored(x)

    class Asked(Exception):
        pass

    def run(*_, **__):
        raise Asked

    monkeypatch.setattr(_cross_validation, "run", run)

    def path():
        return regression.fit_path(x, labels, l2=[0.1, 1.0], folds=folds, **options)

    if case in ("clear", "sparse"):  # ten fits
        assert path().cross_validation.fits.converged.all()
    else:
        with pytest.raises(Asked):
            path()


@pytest.mark.x64_once(True)
def test_penalties_below_one_in_doubt_are_left_to_the_compiled_program(monkeypatch):
    x, labels = drawn()
    options = {"l2": [0.1, 0.01, 1.0, 0.02], "folds": np.arange(N) % 4}
    expected = regression.fit_path(x, labels, **options)
    validated, solved = expected.cross_validation, _host_newton.solved

    def doubtful(known, targets, l2, *others):
        return None if l2 < 0.05 else solved(known, targets, l2, *others)

    def run(data, *_, init, **__):
        np.testing.assert_array_equal(data.l2, [0.01, 0.02])
        np.testing.assert_array_equal(init.kernel, expected.fits.params.kernel[0])
        outcomes = expected.fits, validated.fits, (validated.loss, validated.accuracy)
        return [jax.tree.map(lambda leaf, p=p: leaf[p], outcomes) for p in (1, 3)]

    monkeypatch.setattr(_host_newton, "solved", doubtful)
    monkeypatch.setattr(_cross_validation, "run", run)
    path = regression.fit_path(x, labels, **options)
    for ours, theirs in zip(*map(jax.tree.leaves, (path, expected)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
