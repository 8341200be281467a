"""Data files: what is read from them; a fit in memory and a stream read the same."""

import re
import sys

import numpy as np
import pytest
from data_files import (
    GOOD,
    MISSING,
    TEXT,
    A,
    B,
    N,
    Y,
    csv_text,
    npy_bytes,
    npz_bytes,
    parquet_bytes,
    read,
    refused,
    written,
)

from softjax import tables
from softjax.streaming._rows import Standardised
from softjax.streaming._survey import survey
from softjax.tables import DataError

pyarrow = pytest.importorskip("pyarrow")

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once]


# --- both ways of reading ---

BAD = {
    "empty.csv": ("", "y", "it is empty"),
    "header.csv": ("x,y\n", "y", "has no rows"),
    "ragged.csv": (csv_text(TEXT) + "1\n", "y", "row 13 has 1 fields, the header 2"),
    "long.csv": (csv_text(TEXT) + "1,2,3\n", "y", "row 13 has 3 fields, the header 2"),
    "nul.csv": (csv_text(TEXT).replace("yes", "y\0s"), "y", "a byte of 0"),
    "latin.csv": (csv_text(TEXT).encode() + b"1,\xe4\n", "y", "row 13 holds the byte 0xe4, which"),
    "quote.csv": (csv_text(TEXT) + '1,"a\n', "y", "cannot be read: unexpected end of data"),
    "twice.csv": ("x,x,y\n1,2,a\n", "y", "two columns have one name, 'x'"),
    "lines.csv": ('"x\n\x1c",y\n1,a\n', "z", r"has no column 'z'; it has x\\n\\x1c, y"),
    "one-line.csv": (csv_text(['"a\nb"'] * N), "y", r"all labels are a\\nb, one class only"),
    "alone.csv": ("y\n" + "a\nb\n" * 6, "y", "no columns besides the labels"),
    "index.csv": (",y\n" + "1,a\n2,b\n" * 6, "y", "no columns besides the labels"),
    "absent.csv": (csv_text(Y), "z", "has no column 'z'; it has x, y"),
    "cell.csv": (csv_text(Y, [*A[1:], "tall"]), "y", "'x', row 12: expected a number, got 'tall'"),
    "grouped.csv": (csv_text(Y, [*A[1:], "1_0"]), "y", "'x', row 12: expected a number"),
    "script.csv": (csv_text(Y, [*A[1:], "١"]), "y", "'x', row 12: expected a number"),  # noqa: RUF001
    "hole.csv": (csv_text(Y, [*A[1:], " "]), "y", "'x', row 12: expected a finite .* empty cell"),
    "infinite.csv": (csv_text(Y, [*A[1:], "1e39"]), "y", r"row 12: expected a .* got 1e\+39"),
    "unlabelled.csv": (csv_text(["", *TEXT[1:]]), "y", "'y', row 1: the label is missing"),
    "one.csv": (csv_text(["a"] * N), "y", "all labels are a, one class only"),
    "names.csv": (csv_text([f"n{i}" for i in range(N)]), "y", "12 different labels in 12 rows"),
    "measured.csv": (csv_text(A), "y", "12 different labels in 12 rows"),
    "complex.npy": (npy_bytes(np.ones((N, 2), complex)), "1", "got dtype '<c16'"),
    "objects.npy": (npy_bytes(np.array([[1, "a"]] * N, object)), "1", r"got dtype '\|O'"),
    "fields.npy": (npy_bytes(np.zeros(N, "f8,f8")), "1", "its header is not that of"),
    "dates.npy": (npy_bytes(np.zeros((N, 2), "M8[s]")), "1", r"got dtype '<M8\[s\]'"),
    "rank.npy": (npy_bytes(np.zeros((N, 2, 2))), "1", r"rank 2, got shape \(12, 2, 2\)"),
    "vector.npy": (npy_bytes(np.zeros(N)), "0", r"rank 2, got shape \(12,\)"),
    "none.npy": (npy_bytes(np.zeros((0, 2))), "1", "has no rows"),
    "cut.npy": (npy_bytes(np.zeros((N, 2)))[:-1], "1", "shorter than its header says"),
    "more.npy": (npy_bytes(np.zeros((N, 2))) + b"0", "1", "longer than its header says"),
    "other.npy": (b"x,y\n1,2\n", "1", "does not begin as np.save"),
    "nan.npy": (npy_bytes(np.column_stack([A, Y + np.nan])), "1", "row 1: the label is missing"),
    "lengths.npz": (npz_bytes(x=A, y=Y[1:]), "y", "'y' has 11 rows, and 'x' 12"),
    "scalar.npz": (npz_bytes(x=A, y=1), "y", r"rank 1 or 2, got shape \(\)"),
    "twice.npz": (npz_bytes(a=np.ones((N, 1)), b=np.ones((N, 1))), "0", "two columns have one"),
    "cut.npz": (npz_bytes(x=A, y=Y)[:-40], "y", "cannot be read: File is not a zip file"),
    "dates.npz": (
        npz_bytes(x=Y.astype("M8[s]"), y=Y),
        "y",
        r"npz: array 'x': expected numbers or text, got dtype '<M8",
    ),
    "nulls.parquet": (
        parquet_bytes({"x": pyarrow.nulls(N), "y": Y}),
        "y",
        "'x': no row has a value",
    ),
    "hole.parquet": (parquet_bytes({"x": MISSING, "y": Y}), "y", "'x', row 1: expected a finite"),
    "unlabelled.parquet": (
        parquet_bytes({"x": A, "y": pyarrow.array([*map(int, Y[1:]), None])}, row_group_size=5),
        "y",
        "'y', row 12: the label is missing",
    ),
    "lists.parquet": (parquet_bytes({"x": [[1.0]] * N, "y": Y}), "y", "'x', row 1: expected a num"),
    "label-lists.parquet": (parquet_bytes({"x": A, "y": [[1]] * N}), "y", "'y', row 1: expected"),
    "dates.parquet": (
        parquet_bytes({"x": Y.astype("M8[s]"), "y": Y}),
        "y",
        "'x', row 1: expected a number, got '1970-01-01T00:00:0.*'. A date has to become a number",
    ),
    "durations.parquet": (
        parquet_bytes({"x": Y.astype("m8[s]"), "y": Y}),
        "y",
        "'x', row 1: expected a number, got '0 seconds'",
    ),
    "label-dates.parquet": (parquet_bytes({"x": A, "y": Y.astype("M8[s]")}), "y", "'y': expected"),
    "binary.parquet": (parquet_bytes({"x": A, "y": [b"\xff"] * N}), "y", "'y', row 1: expected a"),
    "none.parquet": (parquet_bytes({"x": A[:0], "y": Y[:0]}), "y", "has no rows"),
    "cut.parquet": (parquet_bytes({"x": A, "y": Y})[:-9], "y", "cannot be read: "),
    "empty.parquet": (b"", "y", "cannot be read: "),
    "data.txt": ("", "y", "the suffix must be one of .csv, .csv.gz, .npy, .npz"),
}

NEVER_CATEGORIES = {"dates.parquet", "durations.parquet", "lists.parquet"}


@pytest.mark.parametrize("name", GOOD)
def test_a_stream_reads_what_a_fit_in_memory_reads(tmp_path, name):
    data, label = GOOD[name]
    found = read(written(tmp_path, name, data), label)
    count = len(found.labels)
    assert found.features.shape == (count, len(found.feature_names))
    assert set(found.labels) == set(range(len(found.class_names)))
    if name.startswith(("text", "bytes.parquet", "category")) and name != "text.npy":
        assert found.class_names == ["no", "perhaps", "yes"]
        np.testing.assert_array_equal(np.array(found.class_names)[found.labels], TEXT)


@pytest.mark.parametrize("name", BAD)
def test_a_stream_refuses_what_a_fit_in_memory_refuses(tmp_path, name):
    data, label, words = BAD[name]
    path = written(tmp_path, name, data)
    line = refused(path, label)
    assert re.search(words, line), line
    for options in ([], ["--stream"], ["--stream", "--epochs", "1"]):
        result = command_line(tmp_path, path, label, *options)
        hint = ""
        if "a finite number of float32" in line or "is missing" in line:
            also = ", --impute fills missing cells in" if "empty" in line else ""
            hint = f" --skip-nonfinite skips such rows{also}."
        elif "expected a number" in line:
            hint = " --drop x leaves it out."
            if name not in NEVER_CATEGORIES:
                code = "Where it stands for a missing value, write NA in its place."
                hint = f" --category x takes its cells as categories,{hint} {code}"
        assert result.exit_code == 2
        assert result.stderr == f"softjax: {line}{hint}\n"


def command_line(folder, path, label, *options):
    """The result of `softjax fit`: its exit status and what it prints."""
    typer = pytest.importorskip("typer.testing")
    from softjax.cli import app

    command = ["fit", str(path), "--label-column", label, *options, "--out", str(folder / "out")]
    return typer.CliRunner().invoke(app, command)


def test_rows_that_are_not_complete_are_left_out(tmp_path):
    rows = "".join(f"{i / 7},{'ab'[i % 2]}\n" for i in range(40))
    whole = written(tmp_path, "whole.csv", f"x,y\n{rows}")
    holes = written(tmp_path, "holes.csv", f"x,y\n,a\n{rows}nan,b\n1,\ninf,a\n1e39,b\n")
    line = refused(holes)
    assert "column 'x', row 1: expected a finite number" in line
    assert "; 4 other rows are not complete either" in line
    seen, other = survey(tables.open_file(holes, "y")), survey(tables.open_file(whole, "y"))
    assert seen.bad.tolist() == [0, 41, 42, 43, 44]
    skipped, read_whole = tables.dataset(holes, "y", True), tables.dataset(whole, "y")
    assert skipped.rows.tolist() == list(range(1, 41))
    np.testing.assert_array_equal(skipped.features, read_whole.features)
    np.testing.assert_array_equal(skipped.labels, read_whole.labels)
    assert skipped[2:4] == read_whole[2:4]
    assert seen.classes == other.classes
    for name in ("mean", "scale", "counts"):
        np.testing.assert_allclose(getattr(seen, name), getattr(other, name), rtol=1e-8)


def test_a_stream_ends_at_the_model_of_a_fit_in_memory(tmp_path, monkeypatch):
    """Of the same rows: those that are held out and those that are skipped are the same."""
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)  # a picture takes long
    rng = np.random.default_rng(4)
    unit = rng.normal(size=(90, 2))
    x = unit * [1e-3, 1e5] + [5, 0]
    scores = unit @ np.eye(2, 3) + rng.gumbel(size=(90, 3))
    y = np.array(["01", "1", "x"])[np.argmax(scores, 1)]
    x[[3, 50], [0, 1]] = np.nan
    columns = {"p": x[:, 0], "q": x[:, 1], "y": y, "__index_level_0__": np.arange(90)}
    path = written(tmp_path, "x.parquet", parquet_bytes(columns, row_group_size=40))
    models = []
    for options in ([], ["--stream"]):
        options = ["--skip-nonfinite", "--l2", "0.01", *options]
        result = command_line(tmp_path, path, "y", *options)
        assert (result.exit_code, result.stderr) == (0, "")
        assert "2 rows skipped: not complete, or not finite" in result.stdout
        numbers = re.search(r"(\d+) examples to fit, (\d+) held out", result.stdout)
        assert sum(map(int, numbers.groups())) == 88
        with np.load(tmp_path / "out" / "model.npz") as model:
            models.append({name: model[name] for name in ("kernel", "bias", "classes", "features")})
    plain, stream = models
    assert plain["classes"].tolist() == stream["classes"].tolist() == ["01", "1", "x"]
    assert plain["features"].tolist() == stream["features"].tolist() == ["p", "q"]
    # The scales are those of the rows to fit in memory, and of all rows in a stream.
    np.testing.assert_allclose(plain["kernel"], stream["kernel"], rtol=0.02)


def test_labels_may_be_in_a_file_of_their_own(tmp_path):
    path = written(tmp_path, "x.npy", npy_bytes(np.column_stack([A, B])))
    label = written(tmp_path, "y.npy", npy_bytes(TEXT.astype(str)))
    data = read(path, str(label))
    assert (data.feature_names, data.class_names) == (["0", "1"], ["no", "perhaps", "yes"])
    label.write_bytes(npy_bytes(TEXT[1:].astype(str)))
    with pytest.raises(DataError, match=r"expected shape \(12,\), a label for each row"):
        tables.dataset(path, str(label))


def test_columns_of_any_scale_are_standardised_before_they_are_rounded(tmp_path):
    rng = np.random.default_rng(1)
    unit = rng.normal(size=(200, 5))
    x = unit * [1e-42, 1e-30, 1, 1e-3, 1e37] + [0, 1e-25, 1e9, 1e12, -1e38]
    x[:, 3] = 1e12 / 3  # constant
    y = np.array(["b", "a"])[np.arange(200) % 2]
    path = written(
        tmp_path, "x.parquet", parquet_bytes(dict(zip("pqrsty", [*x.T, y], strict=True)))
    )
    rows = tables.open_file(path, "y")
    seen = survey(rows, False)
    fitted = Standardised(rows, seen.mean, seen.scale, seen.classes).read(0, 200)[0]
    unit = (x - x.mean(0)) / np.where(np.ptp(x, 0) > 0, x.std(0), 1)
    np.testing.assert_allclose(fitted, np.where(np.ptp(x, 0) > 0, unit, 0), atol=1e-4)


# --- names of classes ---


@pytest.mark.parametrize(
    "labels",
    [
        ["01", "02"],
        ["007", "7", "8"],
        ["1_0", "10", "2"],
        ["+1", "-1"],
        ["1.0", "1"],
        ["1e3", "1000", "1000.0"],
        ["0.5", ".5"],
        ["nan", "NaN"],
        ["true", "True"],
        ["x" * 40, "x" * 41],
        ["१", "1"],
        ["a", "A", "á"],
        [str(2**70), str(2**70 + 1)],
    ],
)
def test_text_that_differs_is_a_class_of_its_own(tmp_path, labels):
    given = [labels[i % len(labels)] for i in range(N)]
    for name, data in (
        ("labels.csv", csv_text(given)),
        ("labels.npz", npz_bytes(x=A, y=np.array(given))),
        ("labels.parquet", parquet_bytes({"x": A, "y": given}, row_group_size=5)),
    ):
        found = read(written(tmp_path, name, data))
        assert sorted(found.class_names) == sorted(labels)
        assert [found.class_names[code] for code in found.labels] == given


def test_spaces_around_names_and_labels_do_not_count(tmp_path):
    """ "a, b" in a file made a column " b", and "u" beside " u" two classes."""
    labels = [" u", "u ", "v", " v"]
    given = [labels[i % 4] for i in range(N)]
    for name, data in (
        ("labels.csv", "x, y\n" + "".join(f"{a}, {y}\n" for a, y in zip(A, given, strict=True))),
        ("labels.npz", npz_bytes(x=A, y=np.array(given))),
        ("labels.parquet", parquet_bytes({"x": A, "y": given}, row_group_size=5)),
    ):
        found = read(written(tmp_path, name, data))
        assert found.class_names == ["u", "v"]
        assert [found.class_names[code] for code in found.labels] == [y.strip() for y in given]
    blank = written(tmp_path, "blank.csv", csv_text([" ", *given[1:]]))
    assert "'y', row 1: the label is missing" in refused(blank)


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        (["10", "9", "-1"], ["-1", "9", "10"]),
        (["10.0", "9.5", "-1.0"], ["-1.0", "9.5", "10.0"]),
        (["10", "9", "x"], ["10", "9", "x"]),
        (["10", "09"], ["09", "10"]),
    ],
)
def test_classes_are_in_the_order_of_numbers_or_of_text(tmp_path, labels, order):
    given = [labels[i % len(labels)] for i in range(N)]
    assert read(written(tmp_path, "y.csv", csv_text(given))).class_names == order
    zeros = np.where(np.arange(N) % 2, 0.0, -0.0)
    path = written(tmp_path, "y.npz", npz_bytes(x=A, y=np.where(Y == 1, 10.0, zeros)))
    assert read(path).class_names == ["0.0", "10.0"]


@pytest.mark.parametrize("kind", ["csv", "npz", "parquet"])
def test_identifiers_and_measurements_are_no_labels(tmp_path, kind):
    n = 300
    x, measured = np.random.default_rng(3).normal(size=(2, n))
    measured[0] = 0.25
    columns = {
        "identifier": np.arange(n),
        "pairs but one": np.arange(n) // 2 + (np.arange(n) == 0) * n,
        "names": np.array([f"n{i:03}" for i in range(n)]),
        "measurement": measured,
        "rounded": measured.round(1),
        "halves": np.floor(np.abs(measured) * 2) / 2,
        "pairs": np.arange(n) // 2,
    }
    for name, y in columns.items():
        texts = y.tolist() if kind == "parquet" else y
        data = {
            "csv": lambda y=y: csv_text(y, x),
            "npz": lambda y=y: npz_bytes(x=x, y=y),
            "parquet": lambda y=texts: parquet_bytes({"x": x, "y": y}),
        }[kind]()
        path = written(tmp_path, f"y.{kind}", data)
        if name in ("halves", "pairs"):
            found = tables.dataset(path, "y")
            assert len(found.class_names) == len(np.unique(y))
            continue
        with pytest.raises(DataError, match=r"column 'y': has .* different .*Choose a column of"):
            tables.dataset(path, "y")


# --- columns that are no features ---


@pytest.mark.parametrize("index", [None, "row", "y", ["row", "part"], "range"])
def test_an_index_of_pandas_is_no_feature(tmp_path, index):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": A, "b": B, "y": TEXT, "row": np.arange(N) ^ 5, "part": Y})
    if index == "range":
        frame = frame[["a", "b", "y"]]
    elif index is None:
        frame = frame[["a", "b", "y"]][np.arange(N) != 0]  # an index without a name
    else:
        frame = frame[["a", "b", *{"y", *np.atleast_1d(index)}]].set_index(index)
    path = tmp_path / "x.parquet"
    frame.to_parquet(path)
    data = read(path)
    assert data.feature_names == ["a", "b"]
    # A column that is named is read, as the feature of another model.
    if index == "row":
        assert tables.features(path, ["row", "a"])[:, 0].tolist() == (np.arange(N) ^ 5).tolist()


@pytest.mark.parametrize("name", ["", "Unnamed: 0", "__index_level_0__"])
def test_a_column_of_row_numbers_is_no_feature(tmp_path, name):
    rows = "".join(f"{i},{a},{t}\n" for i, (a, t) in enumerate(zip(A, TEXT, strict=True)))
    assert read(written(tmp_path, "x.csv", f"{name},a,y\n{rows}")).feature_names == ["a"]
    columns = {name: np.arange(N), "a": A, "y": TEXT}
    assert read(written(tmp_path, "x.parquet", parquet_bytes(columns))).feature_names == ["a"]
