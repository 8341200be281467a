"""Tables and labels of any kind, as the estimators of softjax.sklearn take them."""

import jax
import numpy as np
import pytest

pytest.importorskip("sklearn")
import pandas as pd
import sklearn
from flowers import LOGITS, TWO, WEIGHTS, D, N, X, Y, fitted, frame

from softjax import models, regression
from softjax.sklearn import SoftmaxClassifier, SoftmaxClassifierCV

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once]


def polars_frame():
    polars = pytest.importorskip("polars")
    return polars.DataFrame(dict(zip("abcd", X.T, strict=True)))


@pytest.mark.parametrize(
    "kind",
    [np.asfortranarray, np.ndarray.tolist, lambda x: frame(), lambda x: polars_frame()],
    ids=["fortran", "list", "pandas", "polars"],
)
def test_tables_of_any_kind_give_one_fit(kind, classifier):
    table = kind(X)
    ours = SoftmaxClassifier().fit(table, pd.Series(Y, dtype="category"))
    np.testing.assert_array_equal(ours.coef_, classifier.coef_)
    assert ours.predict(table).tolist() == classifier.predict(X).tolist()
    assert ours.n_features_in_ == D
    names = getattr(ours, "feature_names_in_", np.array([])).tolist()
    assert names == (list("abcd") if hasattr(table, "columns") else [])
    if names:
        with pytest.raises(ValueError, match="feature names should match"):
            ours.predict(frame("badc"))


@pytest.mark.parametrize(
    "labels",
    [LOGITS.argmax(1) * 7 - 3, LOGITS.argmax(1) / 2 + 0.5 * (LOGITS.argmax(1) == 1), TWO == "yes"],
    ids=["integers", "whole floats", "truth values"],
)
def test_labels_of_any_kind_come_back(labels):
    ours = fitted(labels)
    assert ours.classes_.tolist() == np.unique(labels).tolist()
    assert ours.predict(X).dtype == labels.dtype
    assert ours.score(X, labels) > 0.6


@pytest.mark.parametrize("kind", ["object", "str", "string[pyarrow]", "unused", "enum", "index"])
def test_texts_of_any_container_are_one_set_of_classes(kind, classifier):
    """A category without examples is no class, and the classes are sorted as texts."""
    labels = pd.Series(Y, index=np.arange(N)[::-1])
    if kind == "unused":
        categories = ["tulip", "oak", "rose", "lily"]
        labels = labels.astype(pd.CategoricalDtype(categories, ordered=True))
    elif kind == "enum":
        polars = pytest.importorskip("polars")
        labels = polars.Series(Y.tolist(), dtype=polars.Enum(["tulip", "oak", "rose", "lily"]))
    else:
        labels = pd.Index(Y) if kind == "index" else labels.astype(kind)
    ours = SoftmaxClassifier().fit(X, labels)
    assert ours.classes_.tolist() == classifier.classes_.tolist()
    assert ours.predict(X).tolist() == classifier.predict(X).tolist()
    np.testing.assert_array_equal(ours.coef_, classifier.coef_)
    weights = {"rose": 2.0, "lily": 0.5}
    for given in ("balanced", weights):
        weighted = SoftmaxClassifier(class_weight=given).fit(X, labels, WEIGHTS)
        expected = SoftmaxClassifier(class_weight=given).fit(X, Y, WEIGHTS)
        np.testing.assert_array_equal(weighted.coef_, expected.coef_)
    if kind != "enum":
        with pytest.raises(ValueError, match="NaN among texts: a label is missing"):
            SoftmaxClassifier().fit(X, pd.Series(labels).mask(np.arange(N) == 3))


@pytest.mark.parametrize("column", [["low"] * 5 + ["high"], pd.date_range("2020-01-01", periods=6)])
def test_a_column_that_holds_no_numbers_is_named(column):
    y, numbers = np.arange(6) % 2, np.arange(6.0)
    frame = pd.DataFrame({"n": numbers, "other one": column})
    model = SoftmaxClassifier().fit(frame.assign(**{"other one": numbers**2}), y)
    for call in (SoftmaxClassifier().fit, SoftmaxClassifierCV().fit, model.score):
        with pytest.raises(TypeError, match=r"table of numbers .* got column 'other one' of dtype"):
            call(frame, y)


@pytest.mark.parametrize("dtype", ["Int64", "UInt64", "boolean", "int64[pyarrow]", "text"])
def test_labels_keep_their_values_in_any_dtype(dtype):
    """scikit-learn makes floats of nullable ones, in which 2^53 and 2^53 + 1 are one class."""
    codes = LOGITS.argmax(1)
    values = np.array([False, True, True] if dtype == "boolean" else [2**53, 2**53 + 1, 2**62])
    if dtype == "text":
        values = np.array(["a", "b", "c" * 99], object)
        labels = values[codes].astype(np.dtypes.StringDType())
    else:
        labels = pd.Series(values[codes], dtype=dtype)
    ours, expected = fitted(labels), fitted(values[codes])
    assert ours.classes_.tolist() == expected.classes_.tolist()
    np.testing.assert_array_equal(ours.coef_, expected.coef_)
    assert ours.predict(X).tolist() == expected.predict(X).tolist()
    assert ours.score(X, labels) == expected.score(X, values[codes])
    if dtype != "text":
        with pytest.raises(ValueError, match="Input y contains NaN"):
            fitted(labels.mask(np.arange(N) == 3))


def test_features_and_labels_in_the_other_order_are_refused():
    x, y = np.eye(4), np.array(["a", "b", "a", "b"])
    for estimator in (SoftmaxClassifier(), SoftmaxClassifierCV()):
        with pytest.raises(
            ValueError, match=r"must be \[N, D\] and y \[N\], got them in the other"
        ):
            estimator.fit(y, x)


def test_a_table_that_is_not_computed_is_refused():
    polars = pytest.importorskip("polars")
    lazy, y = polars.LazyFrame({"a": [0.0, 1, 2, 3]}), [0, 1, 0, 1]
    model = models.Model(np.array([[-1.0, 1.0]]), np.zeros(2), ["low", "high"], ["a"])
    for call in (SoftmaxClassifier().fit, SoftmaxClassifierCV().fit, regression.fit):
        with pytest.raises(TypeError, match=r"got LazyFrame; its method collect\(\) computes"):
            call(lazy, y)
    with pytest.raises(TypeError, match=r"got LazyFrame; its method collect\(\) computes"):
        model.predict(lazy)


@pytest.mark.parametrize("kind", [SoftmaxClassifier, SoftmaxClassifierCV])
@pytest.mark.parametrize("l1_ratio", [0.0, 0.5])
def test_a_penalty_of_any_size_is_a_penalty(kind, l1_ratio):
    """Tiny weights, or a tiny C, ask for a penalty above all numbers: the coefficients are 0."""
    single = kind is SoftmaxClassifier
    least = {"C": 5e-324} if single else {"Cs": [5e-324], "cv": 2}
    usual = {} if single else {"Cs": [1.0], "cv": 2}
    for x, unit in ((X, 1e-310), (X.astype(np.float32), 1e-39)):
        for options, weights in ((least, WEIGHTS), (usual, unit * WEIGHTS)):
            ours = kind(l1_ratio=l1_ratio, **options).fit(x, Y, weights)
            assert not ours.coef_.any()
            shares = [WEIGHTS[name == Y].sum() / WEIGHTS.sum() for name in ours.classes_]
            np.testing.assert_allclose(ours.predict_proba(x[:1])[0], shares, rtol=1e-4)


def test_class_weights_that_leave_no_example_are_named():
    with pytest.raises(ValueError, match="class_weight must be > 0 where sample_weight is"):
        SoftmaxClassifier(class_weight=dict.fromkeys(np.unique(Y), 0)).fit(X, Y)
    weights = 1.0 * (Y == "rose")
    with pytest.raises(ValueError, match="class_weight must be > 0 where sample_weight is"):
        SoftmaxClassifier(class_weight={"rose": 0}).fit(X, Y, weights)


def test_dates_alone_are_no_numbers_either():
    """scikit-learn takes them as numbers of nanoseconds in a fit, and refuses them afterwards."""
    days = pd.date_range("2020-01-01", periods=6)
    for dates in (days, days - days[0]):
        for x in (dates.to_numpy()[:, None], dates.to_frame(name="day")):
            with pytest.raises(
                TypeError, match=r"table of numbers .* got .*(datetime|timedelta)64"
            ):
                SoftmaxClassifier().fit(x, np.arange(6) % 2)


def test_arrays_of_jax_are_those_of_numpy_under_array_api_dispatch(monkeypatch):
    """scikit-learn refuses to compare an array of one library with coefficients of another."""
    monkeypatch.setenv("SCIPY_ARRAY_API", "1")
    with sklearn.config_context(array_api_dispatch=True):
        host = X.astype(np.float32), np.unique(Y, return_inverse=True)[1], np.float32(WEIGHTS)
        x, y, w = map(jax.numpy.asarray, host)
        ours, expected = SoftmaxClassifier().fit(x, y, w), SoftmaxClassifier().fit(*host)
        np.testing.assert_array_equal(ours.predict_proba(x), expected.predict_proba(host[0]))
        assert ours.score(x, y, w) == expected.score(*host)
