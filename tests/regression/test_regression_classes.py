"""The number of classes in labels, classes without examples, and very many classes."""

import jax
import numpy as np
import pytest

from softjax import regression, streaming
from softjax.regression import _solve
from softjax.regression._problem import Data

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.usefixtures("compiled_fits")]

N, D = 30, 4
QUASI = regression.QUASI_SEPARATED


def data():
    return np.random.default_rng(0).normal(size=(N, D)), np.arange(N) % 3


FITS = {
    "fit": regression.fit,
    "fit_many": lambda x, y: regression.fit_many(x, y, l2=np.array([0.1, 1.0])),
    "bootstrap": regression.bootstrap,
    "cross_validate": regression.cross_validate,
    "fit_path": lambda x, y: regression.fit_path(x, y, l2=[0.1, 1.0]),
}


@pytest.mark.x64_once
@pytest.mark.parametrize("name", FITS)
def test_labels_that_show_no_class_0_or_more_classes_than_examples_are_refused(name):
    x, y = data()
    counting_from_1 = r"`labels` must be 0, ..., K - 1; pass num_classes=4 .* got 1 to 3"
    with pytest.raises(ValueError, match=counting_from_1):
        FITS[name](x, y + 1)
    with pytest.raises(ValueError, match=r"`labels` must be .* examples; .* a label of 1000000"):
        FITS[name](x, np.where(y == 2, 1_000_000, y))


@pytest.mark.x64_once
def test_classes_that_no_device_can_hold_are_refused_by_name():
    x, y = data()
    with pytest.raises(ValueError, match="`num_classes` must be such that the logits"):
        regression.fit(x, y, num_classes=10**12)
    with pytest.raises(ValueError, match="`num_classes` must be such that the logits"):
        regression.fit_many(x, y, l2=np.array([0.1, 1.0]), num_classes=10**12)


def without_examples():
    """Labels of three classes and weights that leave one of them without examples."""
    _, y = data()
    return {
        "class 0": (1 + y % 2, {}),
        "the last class": (y % 2, {}),
        "one between": (y % 2 * 2, {}),
        "by weights": (y, {"sample_weights": 1.0 * (y != 1)}),
        "of a distribution": (np.eye(3)[y], {"class_weights": np.array([1.0, 0.0, 2.0])}),
    }


@pytest.mark.x64_once
@pytest.mark.parametrize("name", without_examples())
def test_a_class_without_examples_has_no_optimum_whether_penalised_or_not(name):
    """Its bias, which no penalty holds, falls with every step: it depends on `tol`."""
    x, _ = data()
    y, weights = without_examples()[name]
    for l2 in (0.0, 0.1):
        for tol in (1e-3, 1e-6):
            result = regression.fit(x, y, l2=l2, tol=tol, num_classes=3, **weights)
            assert result.stop_reason == QUASI


@pytest.mark.x64_once
@pytest.mark.parametrize("solver", ["newton", "lbfgs", "proximal", "optax"])
def test_every_solver_says_so_but_firth_which_has_an_optimum(solver):
    x, y = data()
    assert regression.fit(x, y % 2, l2=0.1, num_classes=3, solver=solver).stop_reason == QUASI
    assert regression.fit(x, y % 2, num_classes=3, solver="firth").converged


@pytest.mark.x64_once
def test_folds_resamples_and_streams_that_lack_a_class_say_so():
    x, y = data()
    rare = np.where(np.arange(N) == 3, 2, y % 2)
    crossed = regression.cross_validate(x, rare, l2=0.1, folds=3)
    lacking = [not np.any(rare[crossed.folds != fold] == 2) for fold in range(3)]
    assert sum(lacking) == 1
    assert [reason == QUASI for reason in crossed.fits.stop_reason] == lacking
    booted = regression.bootstrap(x, rare, l2=0.1, resamples=20).resamples
    assert {*booted.stop_reason} == {QUASI, regression.CONVERGED}
    falling = booted.params.bias[:, 2] < -8
    np.testing.assert_array_equal(falling, [reason == QUASI for reason in booted.stop_reason])
    lanes = np.stack([rare, y, y % 2])
    fits = regression.fit_many(x, lanes, l2=0.1, num_classes=3)
    assert fits.stop_reason == [regression.CONVERGED, regression.CONVERGED, QUASI]
    rows = streaming.ArrayRows(x, y)
    assert streaming.fit(rows, num_classes=4, l2=0.1).stop_reason == QUASI


@pytest.mark.x64_once
@pytest.mark.parametrize("solver", ["newton-cg", "lbfgs", "proximal"])
@pytest.mark.parametrize("shape", [(900, 3), (20, 50)])
def test_no_array_of_a_fit_is_of_classes_by_classes(shape, solver):
    """As traced; nothing is compiled or run."""
    num_classes = 701
    scalar = jax.ShapeDtypeStruct((), "float32")
    features = jax.ShapeDtypeStruct(shape, "float32")
    labels = jax.ShapeDtypeStruct(shape[:1], "int32")
    known = {"features": features, "labels": labels, "l2": scalar, "l1": scalar}
    data = Data(num_classes=num_classes, **known)
    theta = np.zeros((num_classes, shape[1] + 1), np.float32)
    state = _solve.solver_of(solver, data).start(data, theta)
    program = _solve.within_trace.lower(solver, data, scalar, state, np.int32(9))
    assert f"{num_classes}x{num_classes}" not in program.as_text()
