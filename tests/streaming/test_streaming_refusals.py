"""What a streamed fit and the trainer refuse."""

import re

import numpy as np
import optax
import pytest
from streams import batches_of

from softjax import regression, streaming
from softjax.streaming import _passes

pytestmark = pytest.mark.compiled_quickly


def changed(x, place, value):
    x = np.array(x, np.result_type(x, type(value)))
    x[place] = value
    return x


X, Y = (
    np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32),
    np.arange(60, dtype=np.int32),
)


Y %= 3


REFUSED = {
    "complex features": (X + 1j, Y, 0.0),
    "text features": (X.astype(str), Y, 0.0),
    "dates": (X.astype("M8[s]"), Y, 0.0),
    "NaN": (changed(X, (41, 2), np.nan), Y, 0.0),
    "infinite": (changed(X, (41, 2), -np.inf), Y, 0.0),
    "beyond float32": (changed(X.astype(float), (41, 2), 1e39), Y, 0.0),
    "squares beyond float32": (changed(X, (41, 2), 1e25), Y, 0.0),
    "squares that vanish": (X * np.float32([1, 1e-25, 1]), Y, 0.0),
    "one class": (X, Y * 0 + 1, 0.0),
    "a label that is no class": (X, changed(Y, 41, 3), 0.0),
    "a negative label": (X, changed(Y, 41, -1), 0.0),
    "a label beyond int32": (X, changed(Y.astype(np.int64), 41, 2**32), 0.0),
    "text labels": (X, Y.astype(str), 0.0),
    "complex labels": (X, Y + 0j, 0.0),
    "a negative penalty": (X, Y, -1.0),
    "an infinite penalty": (X, Y, np.inf),
    "a penalty beyond float32": (X, Y, 1e39),
}


@pytest.mark.x64_once
@pytest.mark.parametrize("name", REFUSED)
def test_the_streamed_fit_refuses_what_the_fit_in_memory_refuses(name, monkeypatch):
    monkeypatch.setattr(_passes, "CHUNK_BYTES", 800)  # the row stands in the second chunk
    x, y, l2 = REFUSED[name]
    with pytest.raises((TypeError, ValueError)) as plain:
        regression.fit(x, y, num_classes=3, l2=l2)
    with pytest.raises(plain.type) as streamed:
        streaming.fit(streaming.ArrayRows(x, y), num_classes=3, l2=l2)
    first, second = (
        re.fullmatch(r"softjax\.[\w.]+: (`(\w+)` must be .*, got (.*))\.", str(e.value))
        for e in (plain, streamed)
    )
    assert first[2] == second[2]
    if not name.endswith(("labels", "label", "values", "int32")):
        assert first[1] == second[1]
    # Rows that are held out are not looked at.
    if " 41" in second[3] or "(41," in second[3]:
        rows = streaming.ArrayRows(x, y)
        assert streaming.fit(rows, num_classes=3, held_out=[41], max_steps=0).steps == 0


@pytest.mark.x64_once
def test_training_refuses_weights_features_and_starts_that_a_fit_refuses():
    optimizer, ones = optax.sgd(0.1), np.ones(60, np.float32)

    def train(x=X, y=Y, w=ones, **options):
        options = {"num_classes": 3, "optimizer": optimizer, "steps": 3} | options
        return streaming.train(lambda step: (x, y, w), **options)

    bad_start = regression.SoftmaxRegression(np.full((3, 3), np.nan, np.float32), ones[:3])
    refused = {
        "`weights` must be >= 0, got -1.0 at (7,)": {"w": changed(ones, 7, -1.0)},
        "`weights` must be an array of real numbers, got dtype complex64": {"w": ones + 0j},
        "`features` must be an array of real numbers, got dtype complex64": {"x": X + 0j},
        "`features` must be an array of real numbers, got dtype object": {
            "x": X.astype(str).astype(object)
        },
        "`labels` must be class indices, got dtype complex": {"y": Y + 0j},
        "`class_weights` must be finite and >= 0, got -1.0 at (1,)": {"class_weights": [1, -1, 1]},
        "`class_weights` must be finite and >= 0, got nan at (0,)": {"class_weights": [np.nan] * 3},
        "`class_weights` must be > 0 somewhere": {"class_weights": [0, 0, 0]},
        "`class_weights` must be of shape (3,)": {"class_weights": [1, 1]},
        "`init.kernel` must be finite in float32, got nan at (0, 0)": {"init": bad_start},
        "`validation` must be of 3 features, got 2 features": {"validation": (X[:, 1:], Y)},
        "`validation` must be finite in float32, got nan at (4, 1)": {
            "validation": (changed(X, (4, 1), np.nan), Y)
        },
        "`validation` must be in [0, 3), got 3 at (5,)": {"validation": (X, changed(Y, 5, 3))},
        "`validation` must be of shape (60,), got shape (59,)": {"validation": (X, Y[1:])},
        "`validation` must be an array of real numbers, got dtype complex": {
            "validation": (X + 0j, Y)
        },
        "`l2` must be finite in float32, got 1e+39": {"l2": 1e39},
        "`l2` must be a finite number >= 0": {"l2": -1.0},
        "batch 0 must be of at most 60 rows": {"w": ones[:, None]},
        "the features of batch 0 must be of shape (examples, features), got shape (0, 3)": {
            "x": X[:0],
            "y": Y[:0],
            "w": ones[:0],
        },
        "features of batch 0 must be of shape (examples, features), got shape (60,)": {
            "x": X[:, 0]
        },
        "features (60, any) for features (60, 3), got shape (59, 3)": {
            "transform": lambda x: x[1:]
        },
        "features (60, any) for features (60, 3), got NoneType": {"transform": lambda x: None},
    }
    for words, options in refused.items():
        with pytest.raises((TypeError, ValueError), match=re.escape(words)):
            train(**options)
    with pytest.raises((TypeError, ValueError), match="each of as many features as in the first"):
        streaming.train([(X, Y), (X[:, :1], Y)], num_classes=3, optimizer=optimizer, steps=3)
    wide = streaming.ArrayRows(X, Y, offset=np.zeros((60, 4), np.float32))
    options = {"num_classes": 3, "optimizer": optimizer, "epochs": 1}
    for run in (
        lambda: streaming.train(streaming.Batches(wide, 60), **options),
        lambda: streaming.fit(wide, num_classes=3),
    ):
        with pytest.raises(ValueError, match=r"`offset` must be of shape .* 3\), got shape .* 4\)"):
            run()
    with pytest.raises(ValueError, match=r"`transform` .*\(60, 3\) for .* got shape \(60, 2\)"):
        streaming.fit(streaming.ArrayRows(X, Y), num_classes=3, transform=lambda x: x[:, :2])
    soft = changed(np.full((60, 3), 1 / 3, np.float32), (7, 1), -1 / 3)
    for source in (lambda step: (X, soft), streaming.Batches(streaming.ArrayRows(X, soft), 60)):
        with pytest.raises(streaming.NonFiniteError, match="not finite in row 7"):
            streaming.train(source, num_classes=3, optimizer=optimizer, steps=1)
    for place in ({"process_index": 2}, {"process_index": -1}):
        with pytest.raises(ValueError, match=r"`process_index` must be in \[0, 2\)"):
            batches_of(X, Y, process_count=2, **place)
    for x, y in ((X + 0j, Y), (X, Y + 0j)):
        with pytest.raises(
            TypeError, match=r"softjax.streaming.Batches: `(features|labels)` must be"
        ):
            batches_of(x, y).read(0)
    # Numbers in other dtypes are numbers.
    plain = streaming.train(lambda step: (X, Y), num_classes=3, optimizer=optimizer, steps=3)
    for x, y in ((X.astype(">f4"), Y.astype(">i8")), (X.astype(object), Y.astype(object))):
        other = train(x, y, ones.astype(">f8"), validation=(x, y))
        np.testing.assert_array_equal(plain.params.kernel, other.params.kernel)
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X, columns=list("abc")).assign(b=X[:, 1] > 0)
    rows = streaming.ArrayRows(frame, pandas.Series(Y).astype("Int64"))
    expected = np.column_stack([X[:, 0], X[:, 1] > 0, X[:, 2]])[5:9]
    np.testing.assert_array_equal(rows.read(5, 9)[0], expected)
    np.testing.assert_array_equal(rows.read(5, 9)[1], Y[5:9])
    with pytest.raises(TypeError, match="got column 'b' of dtype"):
        streaming.ArrayRows(frame.assign(b="x"), Y).read(0, 1)
