"""Tables as spreadsheets, editors, pandas and other programs write them."""

import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer")

import pandas as pd
from commands import one_line, run

from softjax import models, tables
from softjax.tables import Column, DataError, Reading

pytestmark = [
    pytest.mark.compiled_quickly,
    pytest.mark.x64_once,
    pytest.mark.usefixtures("own_folder"),
]


PLAIN_TEXT = "a,b,y\n" + "".join(f"{i / 2},{'uv'[i % 2]},{'pq'[i % 3 > 0]}\n" for i in range(12))
FORMS_OF_ONE_TABLE = {
    "a line that tells Excel the separator": "sep=;\n" + PLAIN_TEXT.replace(",", ";"),
    "separators at the ends": PLAIN_TEXT.replace("\n", ",,,\n"),
    "lines of spaces": PLAIN_TEXT.replace("\n", "\n  \n\t\n"),
    "quotes after spaces": re.sub(r"[^,\n]+", r'"\g<0>"', PLAIN_TEXT).replace(",", ",  "),
    "spaces that do not break a line": re.sub(r"(\d),", "\\1\u00a0,", PLAIN_TEXT),
    "a mark of the byte order": "\ufeff" + PLAIN_TEXT,
    "aligned": PLAIN_TEXT.replace(",", "   "),
}


@pytest.mark.parametrize("form", FORMS_OF_ONE_TABLE)
def test_a_table_of_other_programs_is_read_as_the_plain_one(form):
    Path("plain.csv").write_text(PLAIN_TEXT)
    Path("x.csv").write_text(FORMS_OF_ONE_TABLE[form], encoding="utf-16-le")
    plain = tables.dataset(Path("plain.csv"), "y")
    reading = Reading(separator=" " if form == "aligned" else None, encoding="utf-16-le")
    read = tables.dataset(Path("x.csv"), "y", reading=reading)
    np.testing.assert_array_equal(read.features, plain.features)
    np.testing.assert_array_equal(read.labels, plain.labels)
    assert read.feature_names == plain.feature_names == ["a", "b=v"]
    assert read.class_names == plain.class_names == ["p", "q"]


@pytest.mark.parametrize("mark", [" ", "\u00a0", "\u202f", "'", "\u2019"])
def test_separators_of_thousands_are_not_categories(mark):
    cells = [f"{1 + i % 3}{mark}000" for i in range(12)]
    frame = pd.DataFrame({"x": cells, "y": ["p", "q"] * 6})
    frame.to_csv("x.csv", index=False)
    frame.to_parquet("x.parquet")
    for path in (Path("x.csv"), Path("x.parquet")):
        with pytest.raises(DataError, match="'x' looks like numbers with separators of thousands"):
            tables.dataset(path, "y")


def test_columns_that_are_not_used_may_share_a_name():
    """As columns without a name do, which spreadsheets write at the end of a row."""
    model = models.Model(np.array([[-1.0, 1.0]]), np.zeros(2), ["low", "high"], ["x"])
    frame = pd.DataFrame([[-1.0, 3, 4], [1, 3, 4]], columns=["x", "other", "other"])
    frame.to_csv("unused.csv", index=False)
    assert model.predict(frame) == model.predict("unused.csv") == ["low", "high"]
    used = frame[["x", "x"]]
    used.to_csv("used.csv", index=False)
    for data in (used, "used.csv"):
        with pytest.raises(DataError, match="two columns have one name, 'x'"):
            model.predict(data)
    Path("x.csv").write_text(PLAIN_TEXT.replace("a,b,y", "a,a,y"))
    command = ("fit", "x.csv", "--label-column", "y")
    assert "two columns have one name, 'a'" in one_line(run(*command))


def test_a_whole_number_is_one_category_in_any_form():
    """pandas writes 1 as 1.0 if another cell of the column is empty."""
    for levels in (("0", "1", "2"), ("0.0", "1.0", "2.0")):
        column = Column("code", levels, "0")
        for cells in (["1", "2.0", "0"], [1, 2.0, np.int64(0)]):
            pd.DataFrame({"code": cells}).to_csv("x.csv", index=False)
            for found in (
                tables.features(Path("x.csv"), [column]),
                tables.features_of({"code": cells}, [column]),
            ):
                np.testing.assert_array_equal(found, [[1, 0], [0, 1], [0, 0]])
        for cell in ("01", "1.5", "1.00", "v1"):
            with pytest.raises(DataError, match="expected one of the categories of the model"):
                tables.features_of({"code": [cell]}, [column])


def test_a_category_of_a_model_is_not_missing():
    """An earlier version may have fitted a text that is a missing cell today."""
    column = Column("z", ("None", "n/a", "u"))
    for cells in (["n/a", "u", None], ["n/a ", "u", ""], ["n/a", "u", np.nan]):
        with pytest.raises(DataError, match="column 'z', row 3: the cell is empty or NA"):
            tables.features_of({"z": np.array(cells, object)}, [column])
        found = tables.features_of({"z": np.array([*cells[:2], "None"], object)}, [column])
        np.testing.assert_array_equal(found, [[1, 0], [0, 1], [0, 0]])


def test_whole_numbers_that_float64_rounds_are_identifiers():
    """They look equal: a column of them was called constant, or was a feature."""
    frame = pd.DataFrame({"user_id": 2**60 + np.arange(20), "x": range(20), "y": [0, 1] * 10})
    for path, write in (("x.csv", frame.to_csv), ("x.parquet", frame.to_parquet)):
        write(path, index=False)
        with pytest.raises(DataError, match=r"'user_id': has whole numbers beyond 2\^53"):
            tables.dataset(Path(path), "y")
        named = frame.rename(columns={"user_id": "account"})
        getattr(named, write.__name__)(path, index=False)
        data = tables.dataset(Path(path), "y")
        line = tables.like_identifiers(data.columns[:1], data.features[:, :1])
        assert line is not None
        assert "or are beyond 2^53, where float64 rounds them" in line
        assert tables.constant_columns(data.columns, data.features) is None


def test_texts_of_parquet_of_any_type():
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for kind in (arrow.string_view(), arrow.binary(), arrow.large_binary(), arrow.binary(1)):
        encode = str if kind == arrow.string_view() else str.encode
        cells = arrow.array([encode(cell) for cell in "uvw" * 6], kind)
        parquet.write_table(arrow.table({"z": cells, "y": [0, 1] * 9}), "x.parquet")
        assert tables.dataset(Path("x.parquet"), "y").feature_names == ["z=v", "z=w"], kind
    pixels = arrow.array([b"\xff\x00", b"\x80"] * 9)
    parquet.write_table(arrow.table({"z": pixels, "y": [0, 1] * 9}), "x.parquet")
    line = one_line(run("fit", "x.parquet", "--label-column", "y"))
    assert "expected a number, got b'" in line
    assert "--drop z leaves it out" in line
