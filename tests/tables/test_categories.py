"""Realistic tables: categories, missing cells, separators, encodings, identifiers."""

import gzip
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer")

import pandas as pd
from commands import one_line, run

import softjax
from softjax import models, tables
from softjax.cli import _stream
from softjax.tables import Column, DataError, Reading
from softjax.tables._columns import refuse_identifiers

pytestmark = [
    pytest.mark.compiled_quickly,
    pytest.mark.x64_once,
    pytest.mark.usefixtures("own_folder"),
]

RNG = np.random.default_rng(3)
N = 60
SIZES = np.array(["small", "große", "mid, or so"])[RNG.integers(3, size=N)]
FRAME = pd.DataFrame(
    {
        "size": SIZES,
        "weight": RNG.normal(size=N).round(3),
        "new": RNG.integers(2, size=N).astype(bool),
        "kind": np.where(RNG.normal(size=N) + (SIZES == "small") > 0, "a", "b"),
    }
)
EXPECTED = np.column_stack(
    [SIZES == "mid, or so", SIZES == "small", FRAME["weight"], FRAME["new"]]
).astype(float)


WRITERS = {
    "x.csv": lambda path: FRAME.to_csv(path, index=False),
    "semicolon.csv": lambda path: FRAME.to_csv(path, index=False, sep=";"),
    "pipe.csv": lambda path: FRAME.to_csv(path, index=False, sep="|"),
    "x.tsv": lambda path: FRAME.to_csv(path, index=False, sep="\t"),
    "x.csv.gz": lambda path: FRAME.to_csv(path, index=False),
    "x.tsv.gz": lambda path: FRAME.to_csv(path, index=False, sep="\t"),
    "excel.csv": lambda path: FRAME.to_csv(path, index=False, sep="\t", encoding="utf-16"),
    "bom.csv": lambda path: FRAME.to_csv(path, index=False, encoding="utf-8-sig"),
    "x.parquet": lambda path: FRAME.to_parquet(path, row_group_size=25),
    "category.parquet": lambda path: FRAME.astype({"size": "category"}).to_parquet(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_table_of_any_form_is_read_alike(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path)
    data = tables.dataset(path, "kind")
    assert data.feature_names == ["size=mid, or so", "size=small", "weight", "new"]
    assert data.columns[0] == Column("size", ("große", "mid, or so", "small"))
    np.testing.assert_array_equal(data.features, EXPECTED)
    assert np.array(data.class_names)[data.labels].tolist() == FRAME["kind"].tolist()
    rows = tables.open_file(path, "kind")
    part, _ = rows.read(20, 33)
    np.testing.assert_allclose(part, EXPECTED[20:33], rtol=1e-6)
    assert rows.coded.tolist() == [True, True, False, False]


def test_texts_with_empty_cells_are_categories_in_every_format():
    frame = pd.DataFrame({"z": ["u", "", "v"] * 4, "empty": [""] * 12, "y": [0, 1] * 6})
    frame.to_csv("x.csv", index=False)
    frame.to_parquet("x.parquet")
    np.savez("x.npz", **{name: frame[name].to_numpy(frame[name].map(type)[0]) for name in frame})
    for path in map(Path, ("x.csv", "x.parquet", "x.npz")):
        rows = tables.open_file(path, "y")
        features, _ = rows.read(0, 12)
        assert rows.names == ["z=v", "empty"], path
        np.testing.assert_array_equal(features[:, 0], [0, np.nan, 1] * 4)
        assert np.isnan(features[:, 1]).all()
        with pytest.raises(DataError, match=r"column 'empty': no row has a value\. --drop empty"):
            tables.dataset(path, "y", keep_missing=True)


def test_a_declared_category_is_one_whatever_its_values(tmp_path):
    """Also across row groups, with a missing cell, and in the rows that are read."""
    codes = ["10115", "20095", "10115", "80331"] * 4
    columns: dict = {
        "text": codes,
        "whole": [int(code) for code in codes],
        "truth": [True, False] * 8,
        "float": [float(code) / 2 for code in codes],
    }
    frame = pd.DataFrame(columns).astype("category")
    frame.loc[3, "whole"] = None
    path = tmp_path / "x.parquet"
    frame.assign(plain=codes, y=[0, 1] * 8).to_parquet(path, row_group_size=5)
    data = tables.dataset(path, "y", keep_missing=True)
    assert {column.name: column.levels for column in data.columns} == {
        "text": ("10115", "20095", "80331"),
        "whole": ("10115", "20095", "80331"),
        "truth": ("False", "True"),
        "float": ("5057.5", "10047.5", "40165.5"),
        "plain": None,
    }
    places = np.array([0, 1, 0, 2] * 4)
    one_hot = places[:, None] == [1, 2]
    np.testing.assert_array_equal(data.features[:, :2], one_hot)
    np.testing.assert_array_equal(data.features[4:, 2:4], one_hot[4:])
    assert np.isnan(data.features[3, 2:4]).all()
    np.testing.assert_array_equal(data.features[:, 5:7], one_hot)


def test_encodings_and_separators_that_are_given(tmp_path):
    path = tmp_path / "x.csv"
    FRAME.to_csv(path, index=False, sep=" ", encoding="cp1252")
    with pytest.raises(DataError, match=r"row \d+ holds the byte 0xdf, which is no text in UTF-8"):
        tables.dataset(path, "kind", reading=Reading(separator=" "))
    row = 1 + int(np.argmax(SIZES == "große"))
    line = one_line(run("fit", path, "--label-column", "kind", "--separator", "space"))
    assert f"row {row} holds the byte 0xdf" in line
    assert "--encoding says" in line
    options = ("--separator", "space", "--encoding", "cp1252")
    assert run("fit", path, "--label-column", "kind", *options).exit_code == 0
    printed = run("predict", "softjax-out/model.npz", path, *options)
    assert len(printed.stdout.splitlines()) == N + 1
    for option in (["--encoding", "none"], ["--encoding", "base64"], ["--separator", "ab"]):
        assert "must be" in one_line(run("fit", path, *option))
    FRAME.to_parquet("x.parquet")
    line = one_line(run("fit", "x.parquet", "--label-column", "kind", *options))
    assert "--separator, --encoding and --decimal are for .csv and .tsv files" in line


REFUSED = {
    "identifier": ("id,y\n" + "".join(f"{7 * i + 3},{'ab'[i % 2]}\n" for i in range(20)),
        "'id': has 20 different numbers in as many rows; .* --drop id leaves it out"),
    "text": ("name,y\n" + "".join(f"n{i},{'ab'[i % 2]}\n" for i in range(20)),
        "'name': has 20 different texts in 20 rows; .* --drop name leaves it out"),
    "texts": ("name,x,city,y\n" + "".join(f"n{i},{i / 7},c{i},{'ab'[i % 2]}\n" for i in range(20)),
        "'name': has 20 .*; column 'city': has 20 .* --drop name --drop city leaves them out"),
    "commas": ("name,x,z,y\n" + "".join(f'n{i},"{i},5","0,{i % 3}",a\n' for i in range(20)),
        "'x' looks like .* commas, such as '0,5'; column 'z' looks .* Also column 'name': has 20"),
    "thousands": ("p,y\n" + "".join(f'"{i},234.5",a\n' for i in range(20)),
        "'p' looks like .* of thousands, such as '0,234.5'. Remove separators"),
    "percent": ("p,y\n" + "".join(f"{i}.30%,a\n" for i in range(20)),
        "'p': has 20 .* looks like numbers with % or [$], such as '0.30%': remove .* --drop p"),
    "dollars": ("p,y\n" + "".join(f'"-${i},234.50",a\n' for i in range(20)), "numbers with % or"),
    "dates": ("d,y\n" + "".join(f"2024-01-{i + 10} 8:00,a\n" for i in range(20)),
        "'d': has 20 .* looks like dates, such as '2024-01-10 8:00': a date has to become a num"),
    "empty": ("z,y\n" + "u,a\nv,b\n,a\n" * 4, "'z', row 3: the cell is empty or NA; 3 other"),
    "text first": ("x,y\ntall,a\n" + "1.5,b\n2,a\n" * 6,
        "'x', row 1: expected a number, got 'tall'. --category x takes its cells"),
    "text last": ("x,y\n" + "1.5,b\n2,a\n" * 6 + "tall,a\n",
        "'x', row 13: expected a number, got 'tall'. --category x takes its cells"),
    "code": ("x,y\n" + "1.5,b\n2,a\n" * 6 + "Refused,a\n",
        "'Refused'. .* leaves it out. Where it stands for a missing value, write NA in its place."),
    "point": ("x,y\n" + "1.5,b\n2,a\n" * 6 + ".,a\n",
        "'.'. SAS and Stata write it for a missing value: write NA in its place. --drop x leaves"),
    "missing": ("x,z,y\n" + "1.5,NA,b\n,u,a\n?,u,a\n2,v,b\n" * 2,
        r"row 1: .*; 5 other rows are not complete either \(of 8 rows, x 4, z 2\)\. --skip-"),
    "constant": ("z,y\n" + "u,a\nu,b\n" * 6, "has no column that varies besides the labels"),
    "names": ("z,z=v,y\n" + "u,1,a\nv,2,b\n" * 6, "two features have one name, 'z=v'"),
}  # fmt: skip

IDENTIFIERS = {
    "id", "PassengerId", "customer_nr", "Kundennummer", "order_no", "order number", "api.key",
    "itemCode", "row number", "No",
}  # fmt: skip


def test_constant_columns_are_named():
    columns = [Column("a"), Column("b"), Column("c", ("u", "v", "w")), Column("d", ("u",))]
    rows = np.array([[1.0, np.nan, 0, 0], [1, 3, 0, 1], [1, 3, 0, 0]])
    line = tables.constant_columns(columns, rows)
    assert line == "Columns 'a', 'b', 'd': all values are equal; they tell nothing."
    rows[2, :2] = 7
    assert tables.constant_columns(columns[1:3], rows[:, 1:]) is None
    assert tables.constant_columns(columns[:1], rows[:2]).startswith("Column 'a'")


def test_a_name_that_ends_with_a_word_for_identifiers_refuses_distinct_whole_numbers():
    """Words that only end with the letters are measurements, which a line of the output names."""
    x = 7.0 * np.arange(20)[:, None] + 3
    for name in (*IDENTIFIERS, "paid", "casino", "decode", "monkey", "numbers"):
        columns = [Column(name)]
        if name in IDENTIFIERS:
            with pytest.raises(DataError, match="If it is a measurement, rename the column"):
                refuse_identifiers(Path("x.csv"), columns, x)
        else:
            refuse_identifiers(Path("x.csv"), columns, x)
        assert f"{name!r}: all its whole" in (tables.like_identifiers(columns, x) or "")
        assert tables.like_identifiers(columns, x // 14) is None
        assert tables.like_identifiers(columns, x / 2) is None
        assert tables.like_identifiers(columns, x * 1e30) is None
        assert tables.like_identifiers(columns, x[:9]) is None


def test_a_stream_names_columns_like_identifiers_by_its_first_rows(monkeypatch):
    """Those of a `.npy` file have no names by which they could be refused."""
    numbers = np.arange(60)
    np.save("x.npy", np.stack([2**53 + numbers, numbers % 7, numbers % 2], 1))
    command = ("fit", "x.npy", "--label-column", "2", "--stream", "--max-steps", 1)
    line = "Column '0': all its whole numbers{} differ or are beyond 2^53"
    assert line.format("") in run(*command).stdout
    monkeypatch.setattr(_stream, "FIRST_BYTES", 320)
    assert line.format(" of the first 20 rows") in run(*command).stdout


def test_decimal_commas_are_refused_or_read():
    """The fit with --decimal is that of the file with points; no column of commas is categories."""
    points, commas = Path("points.csv"), Path("commas.csv")
    ages = np.random.default_rng(0).normal(40, 9, 60).round(1)
    ward = np.where(ages > 40, "a,1", "b,2x")
    frame = pd.DataFrame({"age": ages, "ward": ward, "y": np.arange(60) % 2})
    frame.to_csv(points, index=False)
    frame.to_csv(commas, index=False, sep=";", decimal=",")
    command = ("fit", commas, "--label-column", "y")
    line = one_line(run(*command))
    assert "column 'age' looks like numbers with decimal commas, such as" in line
    assert "--decimal , reads them" in line
    read = tables.dataset(commas, "y", reading=Reading(decimal=","))
    whole = tables.dataset(points, "y")
    np.testing.assert_array_equal(read.features, whole.features)
    assert read.columns == whole.columns
    assert run(*command, "--decimal", ",").exit_code == 0
    predicted = [
        run("predict", "softjax-out/model.npz", path, *options).stdout
        for path, options in ((points, ()), (commas, ("--decimal", ",")))
    ]
    assert len(set(predicted)) == 1
    line = one_line(run("predict", "softjax-out/model.npz", commas))
    assert "--decimal , reads decimal commas" in line
    assert "must be , or ." in one_line(run(*command, "--decimal", ";"))
    line = one_line(run("fit", points, "--label-column", "y", "--decimal", ","))
    assert "expected a number with a decimal comma, got" in line
    text = np.array([str(age).replace(".", ",") for age in ages.tolist()])
    frame.assign(age=text).to_parquet("x.parquet")
    np.savez("x.npz", age=text, y=frame["y"])
    for path in (Path("x.parquet"), Path("x.npz")):
        with pytest.raises(DataError, match="'age' looks like numbers with decimal commas"):
            tables.dataset(path, "y")
    mixed = Path("mixed.csv")
    mixed.write_text("x;y\n" + "47;a\n47,5;b\n" * 6)
    words = r"row 2: expected a number, got '47,5'\. --decimal , reads"
    with pytest.raises(DataError, match=words):
        tables.dataset(mixed, "y")
    mixed.write_text("x;y\n" + "47,5;a\n1.047,5;b\n" * 6)
    with pytest.raises(DataError, match=r"got '1\.047,5'\. Remove separators of thousands"):
        tables.dataset(mixed, "y", reading=Reading(decimal=","))
    mixed.write_text("x;y\n" + "1.047,5;a\n1.048,5;b\n" * 6)
    with pytest.raises(DataError, match=r"of thousands, such as .* Remove separators"):
        tables.dataset(mixed, "y", reading=Reading(decimal=","))


@pytest.mark.parametrize("name", REFUSED)
def test_columns_that_are_no_features_are_refused_with_a_hint(name):
    text, words = REFUSED[name]
    Path("x.csv").write_text(text)
    assert re.search(words, one_line(run("fit", "x.csv", "--label-column", "y")))


def test_the_options_of_a_hint_can_be_pasted_into_a_shell():
    names = ["the name", "it's", "$x"]
    frame = FRAME.assign(**{name: [f"{name} {k}" for k in range(N)] for name in names})
    frame.to_csv("x.csv", index=False)
    command = ("fit", "x.csv", "--label-column", "kind")
    hint = re.search(r"(--drop .*) leaves them out", one_line(run(*command)))
    assert hint is not None
    assert run(*command, *shlex.split(hint[1])).exit_code == 0
    FRAME.assign(**{"a date": [*["1 May"] * 7, *range(7, N)]}).to_csv("x.csv", index=False)
    assert "--drop 'a date' leaves it out" in one_line(run(*command))


@pytest.mark.parametrize(
    ("labels", "doubt"),
    [
        (1 + RNG.permutation(80), "80 different labels in 80 rows"),
        (RNG.integers(1, 81, 300), r"different whole numbers, from \d+ to \d+, in 300 rows"),
        (np.floor(np.exp(RNG.normal(3, 1, 300))), r"different whole numbers, from \d+\.0 to"),
        (np.abs(RNG.normal(size=300)).round(1), "numbers that are not whole are measurements"),
        ([f"name {i // 2}" for i in range(300)], None),
        ([f"name {i}" for i in range(150)] * 2, None),
        (np.arange(1000) % 100, None),
        (np.arange(300) % 150, None),
        (RNG.poisson(4, 300), None),
    ],
    ids=[
        "ages",
        "ages again",
        "counts",
        "amounts",
        "pairs",
        "names",
        "indices",
        "rare indices",
        "few counts",
    ],
)
def test_amounts_and_counts_are_no_classes_unless_one_says_so(labels, doubt):
    """Whole numbers of which each occurs a few times; class indices and rare names are classes."""
    path = Path("x.csv")
    pd.DataFrame({"x": RNG.normal(size=len(labels)), "y": labels}).to_csv(path, index=False)
    if doubt is not None:
        with pytest.raises(DataError, match=f"{doubt}.* --any-classes takes"):
            tables.dataset(path, "y")
    found = tables.dataset(path, "y", reading=Reading(any_classes=doubt is not None))
    assert len(found.class_names) == len(set(np.asarray(labels).tolist()))


@pytest.mark.parametrize("options", [[], ["--stream"]], ids=["in memory", "stream"])
def test_whole_numbers_as_classes_are_told(options):
    rows = RNG.integers(0, 25, 200)
    pd.DataFrame({"x": rows + RNG.normal(size=200), "y": 2 * rows}).to_csv("x.csv", index=False)
    command = ("fit", "x.csv", "--label-column", "y", "--l2", 0.1, *options)
    assert "--any-classes takes these labels as classes" in one_line(run(*command))
    result = run(*command, "--any-classes")
    assert result.exit_code == 0, result.output
    assert "The labels are 25 numbers, 0 to 48: taken as classes without an order" in result.stdout


def test_columns_that_are_dropped_or_taken_as_categories():
    codes = [str(10 * (i % 3)) for i in range(30)]
    rows = "".join(f"{i},{c},{'ab'[c == '10' or i % 4 == 0]}\n" for i, c in enumerate(codes))
    Path("x.csv").write_text(f"id,code,y\n{rows}")
    reading = Reading(drop=("id",), categories=("code",))
    data = tables.dataset(Path("x.csv"), "y", reading=reading)
    assert data.feature_names == ["code=10", "code=20"]  # in the order of numbers
    pd.read_csv("x.csv").to_parquet("x.parquet")
    again = tables.dataset(Path("x.parquet"), "y", reading=reading)
    np.testing.assert_array_equal(again.features, data.features)
    assert again.columns == data.columns
    command = ("fit", "x.csv", "--label-column", "y", "--category", "code")
    for streamed in ((), ("--stream",)):
        assert "'id': has 30 different numbers" in one_line(run(*command, *streamed))
    assert "has no column 'di'; it has id, code, y" in one_line(run(*command, "--drop", "di"))
    line = one_line(run(*command, "--drop", "id,code"))
    assert "has no column 'id,code'; it has id, code, y. Repeat --drop for each column." in line
    line = one_line(run(*command, "--drop", "id", "--category", "id,code"))
    assert "--category id,code: has no such feature. Repeat --category" in line
    assert "cannot be dropped" in one_line(run(*command, "--drop", "y"))
    result = run(*command, "--drop", "id")
    assert "Categories, one-hot encoded: code (10, 20; against 0)." in result.stdout
    np.save("x.npy", np.ones((4, 2)))
    line = one_line(run("fit", "x.npy", "--label-column", "1", "--category", "0"))
    assert "--category takes columns of" in line


def test_a_stream_encodes_categories_as_a_fit_in_memory():
    FRAME.to_parquet("x.parquet", row_group_size=25)
    found = []
    for options in ([], ["--stream"]):
        result = run("fit", "x.parquet", "--label-column", "kind", "--l2", 0.1, *options)
        assert result.exit_code == 0, result.output
        assert "one-hot encoded: size (mid, or so, small; against große)" in result.stdout
        found.append(softjax.load_model("softjax-out/model.npz"))
    plain, stream = found
    assert plain.columns == stream.columns
    np.testing.assert_allclose(plain.kernel, stream.kernel, atol=0.05)


def test_class_weights():
    FRAME.to_csv("x.csv", index=False)
    command = ("fit", "x.csv", "--label-column", "kind", "--class-weight")
    biases = []
    for weight in ("a=1", "a=0.2", "balanced"):
        result = run(*command, weight, "--summary")
        assert result.exit_code == 0, result.output
        biases.append(np.diff(softjax.load_model("softjax-out/model.npz").bias)[0])
    assert biases[1] > biases[0] + 1  # against class a
    assert "no class 'c'; it has a, b" in one_line(run(*command, "c=2"))
    assert "must be balanced, or CLASS=WEIGHT" in one_line(run(*command, "a=-1"))


def test_the_version_the_completion_and_usage_in_one_line():
    assert run("--version").stdout == f"softjax {softjax.__version__}\n"
    shown = run("--help").stdout
    assert "--install-completion" in shown
    line = one_line(run("fit", "x.csv", "--folds", 3))
    assert line.endswith(
        "--folds needs --l2 given more than once. root fit --help lists the options."
    )
    assert "No such option" in one_line(run("fit", "x.csv", "--label", "y"))
    assert "No such command" in one_line(run("fitt"))


GOOD = {"name": "c", "levels": ["u", "v"], "fill": "u"}


@pytest.mark.parametrize(
    "column",
    [
        "text",
        json.dumps({**GOOD, "levels": ["u"]}),
        json.dumps({**GOOD, "levels": ["v", "v"]}),
        json.dumps({**GOOD, "fill": "w"}),
        json.dumps({**GOOD, "levels": None, "name": "c=v"}),
        json.dumps({"name": "c"}),
        json.dumps([GOOD]),
    ],
)
def test_a_model_whose_columns_do_not_fit_is_refused(column):
    columns = [Column("c", ("u", "v"), "u")]
    model = models.Model(np.ones((1, 2)), np.zeros(2), ["x", "y"], ["c=v"], columns)
    good = model.save(Path("m.npz"))
    assert softjax.load_model(good).predict({"c": ["v", None]}) == ["x", "x"]
    with np.load(good) as arrays:
        changed = {**arrays, "columns": np.array([column])}
    np.savez("bad.npz", **changed)
    with pytest.raises(DataError, match="is not a model that `softjax fit` wrote: `columns`"):
        softjax.load_model("bad.npz")


@pytest.mark.parametrize("options", [(), ("--impute",), ("--skip-nonfinite",)])
def test_a_column_without_values_is_to_be_dropped(options):
    """Neither a fill nor a skipped row helps; fits in memory and streamed fits say the same."""
    Path("x.csv").write_text("a,the b,c,y\n" + "1,,NA,u\n2,, ,v\n,,,u\n" * 4)
    command = ("fit", "x.csv", "--label-column", "y", *options)
    expected = "columns 'the b', 'c': no row has a value. --drop 'the b' --drop c leaves them out."
    for streamed in ((), ("--stream",)):
        assert one_line(run(*command, *streamed)) == f"softjax: x.csv: {expected}"


def test_reading_tells_how_far_it_is(tmp_path):
    lines = "x,y\n" + "1,a\n2,b\n" * 20_000
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "x.csv").write_text(lines)
    for name in ("x.csv", "x.csv.gz"):
        seen: list[tuple[int, int]] = []

        def tell(*told, seen=seen):
            seen.append(told)

        tables.open_file(tmp_path / name, "y", reading=Reading(progress=tell))
        done, total = zip(*seen, strict=True)
        assert len(seen) >= 4
        assert sorted(done) == list(done)
        assert set(total) == {(tmp_path / name).stat().st_size}
        assert done[-1] <= total[0]
