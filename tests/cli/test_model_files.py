"""The files of models: what is damaged or does not fit together is refused in one line."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("typer")
from commands import one_line, run

import softjax
from softjax import models, tables

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once]


def test_a_record_and_a_list_of_records_are_tables():
    columns = (tables.Column("a", None, 0.5), tables.Column("b", ("u", "v"), "u"))
    model = models.Model(np.eye(2), np.zeros(2), ["x", "y"], ["a", "b=v"], columns)
    rows = [{"a": 2, "b": "v"}, {"b": "u", "a": 1.5, "c": []}, {"a": None, "b": "v"}, {"b": "v"}]
    expected = [[2, 1], [1.5, 0], [0.5, 1], [0.5, 1]]
    np.testing.assert_array_equal(model.encode(rows), expected)
    for row, features in zip(rows[:3], expected, strict=False):
        np.testing.assert_array_equal(model.encode(row), [features])
    assert model.predict(rows[0]) == model.predict(rows[:1]) == ["x"]
    for row in ({"a": 1}, [{"a": 1}]):
        with pytest.raises(tables.DataError, match="lacks 1 of the model's 2 columns: b"):
            model.encode(row)
    for wrong in ([], [{"a": 1, "b": "v"}, 3], [[1, "v"]]):
        with pytest.raises(TypeError, match="must be a path, a table with named columns or a list"):
            model.encode(wrong)


def test_a_model_that_is_spoiled_is_one_line_or_a_model(model):
    """Bytes changed, cut and added at random: what is read predicts, or is refused in one line."""
    good, rng = model.read_bytes(), np.random.default_rng(0)
    path = Path("bad.npz")
    refused = []
    for k in range(300):
        bytes_ = bytearray(good)
        if k % 3 == 0:
            bytes_ = bytes_[: rng.integers(len(good))]
        elif k % 3 == 1:
            for place in rng.integers(len(good), size=rng.integers(1, 4)):
                bytes_[place] = rng.integers(256)
        else:
            place = rng.integers(len(good))
            bytes_[place:place] = rng.bytes(rng.integers(1, 40))
        path.write_bytes(bytes_)
        try:
            found = models.load_model(path)
        except tables.DataError as error:
            refused.append(str(error))
        else:
            assert found.is_finite
            assert found.kernel.shape == (len(found.features), len(found.classes))
            assert found.bias.shape == (len(found.classes),)
    assert len(refused) > 150  # else nothing was spoiled
    for message in refused:
        assert message.startswith("bad.npz: is not a model that `softjax fit` wrote: ")
        assert len(message.splitlines()) == 1


GOOD = {
    "kernel": np.eye(2, 3),
    "bias": np.zeros(3),
    "classes": np.array(list("xyz")),
    "features": np.array(["a", "b"]),
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kernel": np.ones((4, 3))}, "`features` must be text of shape (4,), got <U1 of shape"),
        ({"kernel": np.ones(3)}, "`kernel` must be of shape [features, classes]"),
        (
            {"kernel": np.ones((2, 3), complex)},
            "`kernel`: expected numbers or text, got dtype",
        ),
        ({"kernel": np.full((2, 3), "q")}, "`kernel` must be numbers of shape (2, 3), got <U1"),
        ({"kernel": np.full((2, 3), np.nan)}, "must be finite, got NaN or infinity"),
        ({"kernel": np.full((2, 3), None)}, "`kernel`: expected numbers or text, got dtype '|O'"),
        ({"kernel": np.ones((2, 1)), "bias": np.ones(1)}, "with 1 feature and 2 classes or more"),
        ({"bias": np.array([0, np.inf, 0])}, "must be finite, got NaN or infinity"),
        ({"bias": np.zeros((3, 1))}, "`bias` must be numbers of shape (3,)"),
        ({"classes": np.array(["x"])}, "`classes` must be text of shape (3,)"),
        ({"classes": np.array(list("xyzabcde"))}, "`classes` must be text of shape (3,)"),
        ({"classes": np.array(list("xxz"))}, "`classes` must be distinct, got one name twice"),
        ({"features": np.arange(2)}, "`features` must be text of shape (2,), got int64"),
        ({"features": np.array(["a", "\ud800"])}, "`features` must be text, got"),
    ],
)
def test_a_model_whose_arrays_do_not_fit_is_refused(data, change, words):
    np.savez("bad.npz", **{**GOOD, **change})
    line = one_line(run("predict", "bad.npz", data))
    assert line.startswith("softjax: bad.npz: is not a model that `softjax fit` wrote: ")
    assert words in line


@pytest.mark.parametrize(
    "change",
    [
        {"features": ["a"]},
        {"classes": ["x", "y"]},
        {"classes": [0, 1, 2]},
        {"features": ["a", "a"]},
        {"bias": np.zeros(2)},
        {"kernel": np.zeros((3, 3))},
        {"kernel": np.zeros(3)},
        {"columns": [tables.Column("a"), tables.Column("c")]},
        {"columns": [tables.Column("a"), tables.Column("b", ("x", "x"))]},
    ],
)
def test_a_model_whose_fields_do_not_fit_is_refused_when_it_is_made(change):
    with pytest.raises(ValueError, match=r"softjax\.models\.Model: `"):
        models.Model(**{**GOOD, **change})


def test_a_model_that_is_not_finite_is_not_saved():
    wrong = models.Model(**{**GOOD, "kernel": np.full((2, 3), np.nan)})
    assert not wrong.is_finite
    with pytest.raises(
        ValueError, match=r"softjax\.models\.Model: `kernel` and `bias` must be fin"
    ):
        wrong.save("m.npz")
    assert not Path("m.npz").exists()


def test_what_is_no_table_is_refused():
    """A row of a frame, columns of unequal lengths, and no path."""
    model = models.Model(GOOD["kernel"], GOOD["bias"], list("xyz"), ["a", "b"])
    frame = pd.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0]})
    assert model.predict(frame.iloc[[0]]) == ["y"]
    with pytest.raises(TypeError, match=r"got Series; .* `frame.iloc\[\[i\]\]`"):
        model.predict(frame.iloc[0])
    for columns in ({"a": [1.0, 2.0], "b": 2.0}, {"a": [1.0, 2.0], "b": [1.0]}):
        with pytest.raises(tables.DataError, match=r"data: column '[ab]': expected shape"):
            model.predict(columns)
    with pytest.raises(TypeError, match="load_model: `path` must be a path, got int"):
        softjax.load_model(3)


def test_what_is_no_model_at_all_is_refused(data):
    np.savez("bad.npz", **{name: GOOD[name] for name in ("kernel", "bias", "classes")})
    assert "it has no array `features`" in one_line(run("predict", "bad.npz", data))
    for content in (b"", b"text", Path(data).read_bytes()):
        Path("bad.npz").write_bytes(content)
        assert "is not a model" in one_line(run("predict", "bad.npz", data))
    assert "there is no such file" in one_line(run("predict", "absent.npz", data))
    line = one_line(run("predict", ".", data))
    assert line.startswith("softjax: .: Is a directory; softjax.checkpoints.Checkpoints(folder)")
    Path("model.npz").touch()
    with pytest.raises(tables.DataError, match=r"a model is a file in it, model\.npz"):
        softjax.load_model(".")
    big = models.Model(np.full((2, 2), 1e300), np.zeros(2), ["x", "y"], ["a", "b"])
    big.save(Path("big.npz"))
    Path("far.csv").write_text("a,b\n1,2\n3e38,1\n")
    assert "row 2: the model's logits overflow float64" in one_line(
        run("predict", "big.npz", "far.csv")
    )
