"""Arrays from other programs: byte orders, objects, tables of several dtypes."""

from decimal import Decimal
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import softjax
from softjax import calibration, choice, information, regression
from softjax.models import Model
from softjax.regression import _arguments, inference
from softjax.tables import Column, DataError

pytestmark = pytest.mark.compiled_quickly

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(12, 3)).astype(np.float32), np.arange(12, dtype=np.int32) % 3
P = np.eye(3, dtype=np.float32)[Y]
PARAMS = regression.SoftmaxRegression(X[:3], X[3])


def data_of_a_fit(features, labels, weights, class_weights):
    data = _arguments.checked_data(features, labels, None, weights, class_weights)
    return data.labels, data.weights, data.class_weights


# Each takes features or logits [12, 3], labels [12] and probabilities [12, 3].
FUNCTIONS = {
    "softmax": lambda x, y, p: softjax.softmax(x),
    "logsumexp": lambda x, y, p: softjax.logsumexp(x, -1, p),
    "cross_entropy": lambda x, y, p: softjax.cross_entropy(x, y, where=p > -1),
    "cross_entropy, soft": lambda x, y, p: softjax.cross_entropy(x, p),
    "linear_cross_entropy": lambda x, y, p: softjax.linear_cross_entropy(x, PARAMS.kernel, y),
    "top k": lambda x, y, p: softjax.cross_entropy(x, softjax.TopKLabels(y[:, None], p[:, :1])),
    "surprisal": lambda x, y, p: information.surprisal(x, y),
    "calibration": lambda x, y, p: calibration.expected_calibration_error(p, y),
    "ranking": lambda x, y, p: choice.plackett_luce_loss(x[0], y[:3]),
    "predict": lambda x, y, p: regression.predict_proba(PARAMS, x),
    "objective": lambda x, y, p: regression.objective(PARAMS, x, y, sample_weights=p[:, 0]),
    "hessian": lambda x, y, p: regression.hessian(PARAMS, x, p),
    "fit": lambda x, y, p: regression.fit(x, y, l2=0.1).params,
    "soft labels of a fit": lambda x, y, p: data_of_a_fit(x, p, p[:, 0], p[0]),
    "bradley_terry": lambda x, y, p: choice.bradley_terry_loss(x[0, :2], x[1, :2], y[:2]),
}


def objects(x):
    return x.astype(object)


def mixed_objects(x):
    """Numbers of Python, NumPy and the standard library side by side."""
    out = objects(x)
    for i, kind in enumerate((Fraction, np.float64, np.float32)):
        if x.dtype.kind == "f":
            out.ravel()[i] = kind(float(out.ravel()[i]))
    return out


FORMS = {
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "little-endian": lambda x: x.astype(x.dtype.newbyteorder("<")),
    "objects": objects,
    "mixed objects": mixed_objects,
    "long double": lambda x: x.astype("g") if x.dtype.kind == "f" else x.astype(">i8"),
}


@pytest.fixture(scope="module")
def expected():
    return {}


@pytest.mark.x64_once
def test_what_a_mask_hides_is_missing():
    """NumPy's masked arrays: NaN in the masked rows of a loss, and refused by a fit."""
    masked = np.ma.array(X, mask=np.arange(36).reshape(12, 3) % 7 == 3)
    hidden = masked.mask.any(1)
    np.testing.assert_array_equal(np.isnan(softjax.cross_entropy(masked, Y)), hidden)
    labels = np.ma.array(Y, mask=hidden)
    for x, y, w in ((masked, Y, None), (X, labels, None), (X, Y, np.ma.array(Y, mask=hidden))):
        with pytest.raises(ValueError, match="got nan at"):
            regression.fit(x, y, l2=0.1, sample_weights=w)


@pytest.mark.x64_once
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_numbers_of_any_byte_order_and_objects_are_taken(name, form, expected):
    function = FUNCTIONS[name]
    if name not in expected:
        expected[name] = function(jnp.asarray(X), jnp.asarray(Y), jnp.asarray(P))
    x, y, p = (FORMS[form](part) for part in (X, Y, P))
    for one in ((x, Y, P), (X, y, P), (X, Y, p)):
        got = function(*one)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected[name]), strict=True):
            np.testing.assert_array_equal(a, b)


REFUSED = {
    "text": np.full((12, 3), "a"),
    "dates": np.zeros((12, 3), "M8[s]"),
    "durations": np.zeros((12, 3), "m8[s]"),
    "objects": np.full((12, 3), "a", object),
    "fields": np.zeros((12, 3), "f4,f4"),
    "arrays": np.frompyfunc(lambda value: np.ones(2), 1, 1)(X),
    "beyond any float": np.full((12, 3), 10**400, object),
}


@pytest.mark.x64_once
@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("name", ["softmax", "predict", "objective", "hessian", "fit"])
def test_what_is_no_number_is_refused_with_its_dtype(name, kind):
    x = REFUSED[kind]
    with pytest.raises(TypeError, match=r"must be an array of real numbers, got .*dtype") as error:
        FUNCTIONS[name](x, Y, P)
    assert str(x.dtype) in str(error.value)


@pytest.mark.x64_once
def test_labels_that_are_no_numbers_are_refused_with_their_dtype():
    for labels in (
        np.full(12, "a"),
        np.full(12, "a", object),
        Y.astype("M8[s]"),
        Y.astype("m8[s]"),
    ):
        for name in ("cross_entropy", "surprisal", "linear_cross_entropy", "objective", "fit"):
            with pytest.raises(TypeError, match=r"`labels` must be .*, got dtype") as error:
                FUNCTIONS[name](X, labels, P)
            assert str(labels.dtype) in str(error.value)


# --- tables ---

FRAMES = {
    "floats": lambda f: f,
    "with integers and truth values": lambda f: f.assign(
        b=f.b > 0, c=(10 * f.c).round().astype(int)
    ),
    "nullable": lambda f: f.astype("Float64"),
    "nullable integers": lambda f: (10 * f).round().astype("Int64"),
    "nullable truth values": lambda f: f.assign(b=(f.b > 0).astype("boolean")),
    "pyarrow": lambda f: f.astype("float64[pyarrow]"),
    "categories": lambda f: f.assign(b=(10 * f.b).round().astype("category")),
    "objects": lambda f: f.astype(object),
    "decimals": lambda f: f.assign(b=[Decimal(repr(v)) for v in f.b.tolist()]),
    "sparse": lambda f: f.assign(b=f.b.where(f.b > 0, 0.0).astype("Sparse[float64]")),
    "one name twice": lambda f: f.set_axis(["a", "b", "b"], axis=1).assign(a=f.a > 0),
    "big-endian": lambda f: f.astype(">f8"),
}


@pytest.mark.x64_once
@pytest.mark.parametrize("kind", FRAMES)
def test_frames_of_any_numbers_are_taken(kind):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = FRAMES[kind](pandas.DataFrame(X.astype(float), columns=list("abc")))
    columns = [np.asarray(frame.iloc[:, i]).astype(float) for i in range(3)]
    x = np.column_stack(columns).astype(np.float32)
    kernel = regression.fit(frame, pandas.Series(Y), l2=0.1).params.kernel
    np.testing.assert_array_equal(kernel, regression.fit(x, Y, l2=0.1).params.kernel)
    found = regression.predict_proba(PARAMS, frame)
    np.testing.assert_array_equal(found, regression.predict_proba(PARAMS, x))
    np.testing.assert_array_equal(softjax.softmax(frame), softjax.softmax(x))
    labels = pandas.Series(Y).astype(
        {"nullable": "Int64", "pyarrow": "int64[pyarrow]"}.get(kind, int)
    )
    np.testing.assert_array_equal(softjax.cross_entropy(frame, labels), softjax.cross_entropy(x, Y))


class Frame:
    """A table of another library: names, columns by name, and an array of all of them."""

    def __init__(self, **columns):
        self.held, self.columns = columns, list(columns)

    def __getitem__(self, name):
        return self.held[name]

    def __array__(self, dtype=None, copy=None):
        columns = [column.astype(object) for column in self.held.values()]
        return np.stack(columns, -1).astype(dtype or object)


@pytest.mark.x64_once
def test_tables_of_other_libraries_are_taken_by_columns():
    expected = np.column_stack([X[:, 0], Y])
    found = softjax.softmax(Frame(a=X[:, 0].astype(">f8"), b=Y))
    np.testing.assert_array_equal(found, softjax.softmax(expected))
    with pytest.raises(TypeError, match="got column 'b' of dtype <U1"):
        softjax.softmax(Frame(a=X[:, 0], b=np.full(12, "x")))


@pytest.mark.x64_once
def test_tables_of_polars_and_arrow_are_those_of_pandas():
    """Polars and Arrow name, type and hold their columns in their own ways."""
    pandas, polars = pytest.importorskip("pandas"), pytest.importorskip("polars")
    arrow = pytest.importorskip("pyarrow")
    frame = pandas.DataFrame(X, columns=list("abc")).assign(b=X[:, 1] > 0, c=Y)
    frame["d"] = [Decimal(i) for i in range(12)]

    def of(*columns: Column) -> Model:
        names = [name for column in columns for name in column.features]
        return Model(np.ones((len(names), 2)), np.arange(2.0), ["x", "y"], names, columns)

    model = of(*map(Column, "abcd"), Column("e", ("0", "1"), "0"))
    params = regression.fit(frame, Y, l2=0.1).params
    whole = frame.assign(e=pandas.Series([1, None] * 6, dtype="Int64"))
    spaced = model.encode(whole.rename(columns={"a": " a"}))
    np.testing.assert_array_equal(spaced, model.encode(whole))
    numbered = of(Column("0")).encode(pandas.DataFrame(Y))
    np.testing.assert_array_equal(numbered[:, 0], Y)
    either = of(Column("t", None, 0.5), Column("e", ("0", "1"), "0"))
    truths = pandas.Series([True, None], dtype="boolean")
    for t in (truths, truths.to_list(), [True, None], np.ma.array([1.0, 2.0], mask=[0, 1])):
        found = either.encode({"t": t, "e": [pandas.NA, 1]})
        np.testing.assert_array_equal(found, [[1, 0], [0.5, 1]])
    for values, got in (
        (Y.astype("M8[ns]"), "'1970.* A date has to become a number"),
        (Y.astype("m8[ns]"), "'0 nanoseconds'"),
        (Y[:, None], r"an array of shape \(12, 1\)"),
    ):
        with pytest.raises(DataError, match=f"column '0'.* got {got}"):
            of(Column("0")).encode({"0": values})
    dated = frame.assign(when=pandas.to_datetime(Y))
    for convert in (polars.from_pandas, arrow.Table.from_pandas):
        np.testing.assert_array_equal(softjax.softmax(convert(frame)), softjax.softmax(frame))
        other = regression.inference.summary(params, convert(frame), Y, l2=0.1)
        assert str(other) == str(regression.inference.summary(params, frame, Y, l2=0.1))
        np.testing.assert_array_equal(model.encode(convert(whole)), model.encode(whole))
        with pytest.raises(TypeError, match=r"got column 'when' of dtype (Date|timestamp)"):
            softjax.softmax(convert(dated))


@pytest.mark.x64_once
def test_an_index_in_another_order_is_refused_wherever_rows_are_matched():
    """An index of other values, or of the same values in the same order, is not."""
    pandas = pytest.importorskip("pandas")
    features, labels = pandas.DataFrame(X, columns=list("abc")), pandas.Series(Y)
    arguments = {
        "labels": labels,
        "sample_weights": labels + 1.0,
        "offset": pandas.DataFrame(0 * P),
    }
    statistic = partial(regression.gradient, PARAMS)
    clustered = {"clusters": labels}
    calls = [(regression.fit, arguments), (regression.cross_validate, arguments)]
    calls += [(statistic, arguments), (partial(inference.covariance, PARAMS, labels=Y), clustered)]
    calls += [(partial(inference.summary, PARAMS, labels=Y), clustered)]
    for call, taken in calls:
        for name, value in taken.items():
            with pytest.raises(
                ValueError, match=rf"`{name}` must be in the order .* {name}\.loc\["
            ):
                call(features, **{"labels": Y} | {name: value[::-1]})
    for index in (features.index, features.index[::-1] + 1, features.index * 0):
        np.testing.assert_array_equal(
            statistic(features, labels.set_axis(index)).kernel, statistic(features, Y).kernel
        )


@pytest.mark.x64_once
def test_a_column_that_is_no_number_is_refused_by_its_name():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X, columns=list("abc"))
    for values in (
        ["x"] * 12,
        pandas.to_datetime(Y),
        X[:, 0] * 1j,
        [[1]] * 12,
        pandas.Categorical(["x"] * 12),
    ):
        for call in (lambda f: regression.fit(f, Y), softjax.softmax):
            with pytest.raises(TypeError, match=r"got column 'b' of dtype"):
                call(frame.assign(b=values))
    for values in ([None, *X[1:, 0]], pandas.array([None, *Y[1:].tolist()], "Int64")):
        with pytest.raises(
            ValueError, match=r"`features` must be finite in float32, got nan at \(0, 1\)"
        ):
            regression.fit(frame.assign(b=values), Y)


LABELED = {
    "fit": lambda y: regression.fit(X, y, l2=0.1).params.kernel,
    "fit_many": lambda y: regression.fit_many(X, y, l2=np.array([0.1, 1])).params.kernel,
    "train": lambda y: regression.train(X, y, optimizer=optax.sgd(0.1), epochs=1).params.kernel,
    "validation": lambda y: regression.fit(X, Y, validation=(X, y)).history[-1]["validation_loss"],
    "objective": lambda y: regression.objective(PARAMS, X, y),
    "hessian": lambda y: regression.hvp(PARAMS, PARAMS, X, y).kernel,
    "log_likelihood": lambda y: regression.inference.log_likelihood(PARAMS, X, y),
}
WHOLE = {
    "floats": lambda y: y.astype(np.float64),
    "half": lambda y: y.astype(np.float16),
    "on the device": lambda y: jnp.asarray(y, jnp.bfloat16),
    "a list": lambda y: y.astype(float).tolist(),
    "nullable": lambda y: pytest.importorskip("pandas").Series(y, dtype="Float64"),
    "truth values": lambda y: y > 0,
    "truth values in a list": lambda y: (y > 0).tolist(),
}


@pytest.mark.x64_once
@pytest.mark.parametrize("form", WHOLE)
@pytest.mark.parametrize("name", LABELED)
def test_numbers_that_are_whole_are_class_indices_wherever_a_model_takes_labels(name, form):
    """Streams took them, and fits in memory refused them. A loss refuses them by their shape."""
    function, y = LABELED[name], np.minimum(Y, 1) if "truth" in form else Y
    np.testing.assert_array_equal(function(WHOLE[form](y)), function(y))
    for bad in (0.5, -1.0, np.nan, 2.0**31):
        labels = np.where(np.arange(len(Y)) == 3, bad, Y)
        with pytest.raises((ValueError, TypeError), match=r"labels|validation"):
            function(labels)


@pytest.mark.x64_once
def test_labels_that_are_missing_are_refused():
    pandas = pytest.importorskip("pandas")
    labels = pandas.Series(Y).astype("Int64").mask(Y == 2)
    for missing in (
        labels,
        labels.to_numpy(object),
        np.where(Y == 2, np.nan, Y),
        labels.astype(object),
    ):
        with pytest.raises(
            ValueError, match=r"`labels` must be without missing values, got nan at \(2,\)"
        ):
            regression.fit(X, missing)


@pytest.mark.x64_once(True)
def test_clusters_that_are_missing_are_refused_and_any_others_are_taken():
    pandas = pytest.importorskip("pandas")
    x, y, params = np.ones((60, 0)), np.arange(60) % 2, regression.init(0, 2)  # at the optimum
    ids = np.arange(60) // 5
    expected = inference.covariance(params, x, y, clusters=ids)
    text = np.array([f"c{i}" for i in ids])
    mixed = np.where(ids % 2, ids.astype(object), text.astype(object))
    dates = ids.astype("M8[D]")
    for clusters in (
        text,
        mixed,
        dates,
        ids * 0.5,
        pandas.Series(ids).astype("category"),
        text.astype("S"),
    ):
        found = inference.covariance(params, x, y, clusters=clusters)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)
    one = np.arange(60) == 7
    for missing in (
        np.where(one, np.nan, ids),
        np.where(one, None, mixed),
        np.where(one, "", text),
        np.where(one, "", mixed),
        np.where(one, np.datetime64("NaT", "D"), dates),
        pandas.Series(ids).astype("Int64").mask(one),
        pandas.Series(ids).astype("Int64").mask(one).astype(object),
        pandas.Series(text).mask(one),
    ):
        with pytest.raises(
            ValueError, match=r"`clusters` must be without missing values, got .* at \(7,\)"
        ):
            inference.covariance(params, x, y, clusters=missing)
    with pytest.raises(ValueError, match="at least two different clusters, got 1"):
        inference.covariance(params, x, y, clusters=np.zeros(60))


@pytest.mark.x64_once
def test_integers_beyond_int64_and_arrays_of_jax_among_objects():
    large = np.array([2**70, 1.5], object)
    np.testing.assert_array_equal(softjax.softmax(large), softjax.softmax(large.astype(float)))
    with pytest.raises(ValueError, match=r"`labels` must be .*, got float"):
        regression.fit(X, np.full(12, 2**70, object))

    of_jax = np.empty(2, object)
    of_jax[:] = [jnp.ones(3), 1.0]
    with pytest.raises(TypeError, match="got dtype object"):
        softjax.softmax(of_jax)


@pytest.mark.x64_once
def test_a_frame_without_columns_has_no_features():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(index=range(12))
    np.testing.assert_array_equal(softjax.softmax(frame), np.empty((12, 0)))
