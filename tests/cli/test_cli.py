"""The command line, end to end on small data."""

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("typer")

from commands import one_line, run
from rich.console import Console
from typer.main import get_command

from softjax import accuracy, cli, tables
from softjax.__main__ import main
from softjax.cli._metrics import metrics, print_metrics

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once]


def fails_with(message, *arguments):
    assert re.search(message, one_line(run(*arguments)))


def held_out_accuracy(output):
    found = re.search(r"held-out accuracy *│ *(\d\.\d+)", output)
    assert found
    return float(found[1])


@pytest.fixture
def flowers(tmp_path):
    """Two features, one constant, and three classes named by strings."""
    rng = np.random.default_rng(0)
    names = np.array(["rose", "lily", "tulip"])
    labels = np.arange(90) % 3
    centres = np.array([[0.0, 0.0], [50.0, 0.0], [0.0, 0.5]])
    x = centres[labels] + rng.normal(size=(90, 2)) * [5, 0.05]
    path = tmp_path / "flowers.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["height", "width", "constant", "kind"])
        writer.writerows([*row, 1, names[y]] for row, y in zip(x.tolist(), labels, strict=True))
    return path


@pytest.mark.usefixtures("pictures")
def test_fit_digits_writes_the_model_the_history_and_a_picture():
    result = run("fit", "digits", "--out", "run")
    assert result.exit_code == 0, result.output
    accuracy = held_out_accuracy(result.output)
    assert accuracy >= 0.95
    with np.load("run/model.npz") as model:
        assert model["kernel"].shape == (64, 10)
        assert model["classes"].tolist() == [str(k) for k in range(10)]
    history = [json.loads(line) for line in Path("run/history.jsonl").read_text().splitlines()]
    assert history[-1]["validation_accuracy"] == pytest.approx(accuracy, abs=1e-4)
    assert history[0]["objective"] == pytest.approx(np.log(10))
    assert Path("run/report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("pictures")
def test_fit_and_predict_a_csv_file_with_named_classes(flowers):
    result = run("fit", flowers, "--label-column", "kind", "--out", "run", "--epochs", 50)
    assert result.exit_code == 0, result.output
    assert "72 examples to fit, 18 held out." in result.output
    assert run("predict", "run/model.npz", flowers, "--out", "p.csv", "--proba").exit_code == 0
    header, *rows = csv.reader(Path("p.csv").read_text().splitlines())
    assert header == ["class", "p(lily)", "p(rose)", "p(tulip)"]
    true = [row["kind"] for row in csv.DictReader(flowers.read_text().splitlines())]
    assert np.mean([row[0] == kind for row, kind in zip(rows, true, strict=True)]) > 0.95
    assert np.allclose(np.array([row[1:] for row in rows], float).sum(1), 1, atol=1e-5)
    printed = run("predict", "run/model.npz", flowers).output.split()
    assert printed == ["class", *(row[0] for row in rows)]


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".parquet"])
def test_other_formats_give_the_same_data(flowers, suffix, tmp_path):
    whole = tables.dataset(flowers, "kind")
    path = tmp_path / f"flowers{suffix}"
    label = "kind"
    if suffix == ".npy":
        np.save(path, np.column_stack([whole.features, whole.labels]))
        label = "3"
    elif suffix == ".npz":
        kinds = np.array(whole.class_names)[whole.labels]
        np.savez(path, features=whole.features, kind=kinds)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        columns = dict(zip(whole.feature_names, whole.features.T, strict=True))
        columns["kind"] = np.array(whole.class_names)[whole.labels]
        parquet.write_table(pyarrow.table(columns), path)
    again = tables.dataset(path, label)
    np.testing.assert_array_equal(again.features, whole.features)
    np.testing.assert_array_equal(again.labels, whole.labels)
    if suffix != ".npy":
        assert again.class_names == whole.class_names


@pytest.mark.parametrize(
    "options", [["--optimizer", "adam", "--batch-size", "16"], ["--optimizer", "sgd"]]
)
def test_any_optimizer_of_the_command_line_learns(flowers, options):
    arguments = ("--label-column", "kind", "--out", "run", "--epochs", 60, *options)
    result = run("fit", flowers, *arguments)
    assert result.exit_code == 0, result.output
    assert held_out_accuracy(result.output) > 0.8


@pytest.mark.parametrize("solver", ["auto", "lbfgs"])
def test_a_summary_of_the_fit_whatever_the_solver(flowers, solver):
    options = ("--solver", solver, "--l2", 1e-2, "--summary")
    result = run("fit", flowers, "--label-column", "kind", *options)
    assert result.exit_code == 0, result.output
    assert "Softmax regression: 72 examples, 3 classes, 6 parameters" in result.output
    rows = re.findall(
        r"^(height|width|constant|bias)( +(-?[\d.e+-]+|nan)){6}$", result.output, re.M
    )
    assert len(rows) == 8  # three features and the bias, of two classes against the first
    assert run("fit", flowers, "--label-column", "kind", "--l1", 1, "--summary").exit_code == 2


def test_a_class_weight_is_no_number_of_examples_in_a_summary(flowers):
    """Equal weights of all classes and a penalty as many times larger give the same table."""
    tables = []
    for weight, l2 in ((1, 1e-2), (20, 0.2)):
        weights = [
            o for kind in ("rose", "lily", "tulip") for o in ("--class-weight", f"{kind}={weight}")
        ]
        options = ("--l2", l2, "--summary", *weights)
        result = run("fit", flowers, "--label-column", "kind", *options)
        assert result.exit_code == 0, result.output
        assert "Covariance: robust, of a fit with class weights" in result.output
        numbers = re.findall(r"^(?:height|width) +(\S+) +(\S+)", result.output, re.M)
        tables.append(np.array(numbers, float))
    assert tables[0].shape == (4, 2)
    np.testing.assert_allclose(tables[0], tables[1], rtol=2e-3)


def test_of_several_penalties_the_best_in_cross_validation_is_taken(flowers):
    options = ("--label-column", "kind", "--max-steps", 50)
    result = run("fit", flowers, *options, "--l2", 10, "--l2", 1e-3, "--folds", 3, "--out", "grid")
    assert result.exit_code == 0, result.output
    rows = re.findall(r"^ *(0\.001|10) +(\d\.\d+)(?: +\d\.\d+){3} +(chosen)?", result.output, re.M)
    assert "accuracy of 'lily' alone: 0.3333" in result.output
    assert [(l2, chosen) for l2, _, chosen in rows] == [("0.001", "chosen"), ("10", "")]
    assert float(rows[0][1]) < float(rows[1][1])
    many = ("--l2", 1, "--l2", 2, "--folds", 73)
    fails_with("72 examples to fit are too few for 73 folds", "fit", flowers, *options, *many)
    assert run("fit", flowers, *options, "--l2", 1e-3, "--out", "one").exit_code == 0
    with np.load("grid/model.npz") as grid, np.load("one/model.npz") as one:
        np.testing.assert_array_equal(grid["kernel"], one["kernel"])


def test_the_same_seed_gives_the_same_model(flowers):
    for name in ("a", "b"):
        run("fit", flowers, "--label-column", "kind", "--out", name, "--seed", 3)
    with np.load("a/model.npz") as a, np.load("b/model.npz") as b:
        np.testing.assert_array_equal(a["kernel"], b["kernel"])


def test_an_error_of_the_command_is_one_line_and_exits_with_2():
    command = [sys.executable, "-m", "softjax", "fit", "absent.csv", "--label-column", "y"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "softjax: absent.csv: there is no such file.\n"


def test_output_that_cannot_be_written(flowers):
    Path("file").touch()
    fails_with("file: is a file; --out must name a folder", "fit", "digits", "--out", "file")
    fails_with("Not a directory", "fit", "digits", "--out", "file/run")
    run("fit", flowers, "--label-column", "kind", "--out", "run", "--epochs", 1)
    fails_with("No such file", "predict", "run/model.npz", flowers, "--out", "absent/p.csv")


@pytest.mark.parametrize(
    "options",
    [
        ["--l2", "nan"],
        ["--l2", "-1"],
        ["--batch-size", "8"],
        ["--folds", "5"],
        ["--l2", "1", "--l2", "2", "--solver", "firth"],
        ["--l2", "1", "--l2", "2", "--stream"],
    ],
)
def test_options_that_make_no_sense_are_refused(options):
    fails_with("fit --help lists the options", "fit", "digits", *options)
    assert not Path("softjax-out").exists()


def test_an_option_of_one_value_is_not_given_twice():
    application: Any = get_command(cli.app)
    options = [
        (name, parameter.opts[-1])
        for name, command in application.commands.items()
        for parameter in command.params
        if parameter.param_type_name == "option" and not parameter.multiple | parameter.is_flag
    ]
    assert len(options) > 20
    for name, option in options:
        line = one_line(run(name, option, "1", f"{option}=2"))
        assert f"'{option}'" in line, (name, option)
        assert "takes one value, and is given twice" in line
    fails_with("class 'a' has one weight", "fit", "x", *("--class-weight", "a=1") * 2)


def test_of_many_processes_the_first_says_what_is_wrong_with_the_options(monkeypatch):
    together = ["--coordinator", "127.0.0.1:1", "--processes", 2]
    run_1 = [*together, "--process-id", 1]
    for options in (["--epochs", 0], ["--solver", "newton"], ["--optimizer", "lbfgs"]):
        monkeypatch.setattr(sys, "argv", ["softjax", *map(str, run_1)])
        result = run("fit", "digits", *run_1, *options)
        assert (result.exit_code, result.stderr) == (2, "")
        monkeypatch.setattr(sys, "argv", ["softjax", *map(str, together)])
        result = run("fit", "digits", *together, *options)
        assert result.exit_code == 2
        assert "fit --help lists the options" in result.stderr
    fails_with("process-id must be below", "fit", "digits", *together, "--process-id", 2)


@pytest.mark.parametrize("address", ["host", ":1", "host:port", "host:99999"])
def test_a_coordinator_that_is_no_address_is_refused(address):
    together = ["--processes", 2, "--process-id", 0]
    fails_with("must be HOST:PORT or auto", "fit", "digits", "--coordinator", address, *together)
    fails_with("needs --processes and", "fit", "digits", "--coordinator", "127.0.0.1:1")


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("tall", "column 'height', row 2: expected a number, got 'tall'"),
        ("", "column 'height', row 2: expected a finite number of float32, got nan or an empty"),
        ("nan", "column 'height', row 2: expected a finite number of float32, got nan"),
        ("-inf", "column 'height', row 2: expected a finite number of float32, got -inf"),
    ],
)
def test_a_bad_cell_is_named(tmp_path, cell, message):
    path = tmp_path / "data.csv"
    path.write_text(f"height,kind\n1.5,a\n{cell},b\n2,a\n")
    fails_with(message, "fit", path, "--label-column", "kind")


def test_other_bad_data_is_refused(tmp_path, flowers):
    path = tmp_path / "data.csv"
    path.write_text("height,kind\n1.5,a\n2,a\n")
    fails_with("'kind': all labels are a, one class only", "fit", path, "--label-column", "kind")
    fails_with("--label-column must name", "fit", path)
    for options in ((), ("--stream",)):
        fails_with("absent.csv: there is no such file", "fit", "absent.csv", *options)
    fails_with("no column 'colour'; it has height, kind", "fit", path, "--label-column", "colour")
    path.write_text("height,kind\n1.5,a\n2,\n")
    fails_with("row 2: the label is missing", "fit", path, "--label-column", "kind")
    path.write_text("height,kind\n1.5\n")
    fails_with("row 1 has 1 fields, the header 2", "fit", path, "--label-column", "kind")
    path.write_text("")
    fails_with("it is empty", "fit", path, "--label-column", "kind")
    path.write_text("height,kind\n")
    fails_with("no rows", "fit", path, "--label-column", "kind")
    path.write_text("kind\na\nb\n")
    fails_with("no columns besides the labels", "fit", path, "--label-column", "kind")
    path.write_text("height,kind\n1.5,a\n2,b\n")
    fails_with("2 rows cannot be split", "fit", path, "--label-column", "kind")
    path.rename(tmp_path / "data.txt")
    fails_with("the suffix must be one of", "fit", tmp_path / "data.txt", "--label-column", "kind")
    np.save("three.npy", np.zeros((2, 2, 2)))
    fails_with("rank 2, got shape", "fit", "three.npy", "--label-column", "0")
    fails_with("there is no such file", "predict", "model.npz", flowers)
    np.savez("model.npz", kernel=np.zeros((1, 2)))
    fails_with("is not a model that `softjax fit` wrote", "predict", "model.npz", flowers)


def test_predict_needs_the_features_of_the_model(flowers, tmp_path):
    run("fit", flowers, "--label-column", "kind", "--out", "run", "--epochs", 5)
    path = tmp_path / "fewer.csv"
    path.write_text("height,width\n1,2\n")
    fails_with("lacks 1 of the model's 3 columns: constant", "predict", "run/model.npz", path)


def test_check_prints_the_table_and_fails_outside_a_goal(monkeypatch):
    def rows(ratio):
        ok = ratio <= 1
        row = accuracy.Row("softmax", "float32", "ulp", 1.0, 2.0, "jax.nn", "5 + gap", ratio, ok)
        return lambda quick, progress: [row]

    monkeypatch.setattr(accuracy, "measure", rows(0.5))
    result = run("check", "--quick")
    assert result.exit_code == 0
    assert "meets 1 of 1 goals" in result.output
    monkeypatch.setattr(accuracy, "measure", rows(1.5))
    assert run("check").exit_code == 1


def test_without_typer_the_command_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)  # as if it were not installed
    for name in [name for name in sys.modules if name.startswith("softjax.cli")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match=r"pip install 'softjax-regression\[cli\]'"):
        main()


def test_without_matplotlib_the_fit_says_which_extra_gives_the_picture(flowers):
    result = run("fit", flowers, "--label-column", "kind")
    assert result.exit_code == 0
    assert "pip install 'softjax-regression[plot]'" in result.output
    assert not Path("softjax-out/report.png").exists()


def test_the_model_of_a_file_is_for_its_raw_features(flowers):
    """The standardisation of the fit is folded into kernel and bias."""
    run("fit", flowers, "--label-column", "kind", "--out", "run")
    whole = tables.dataset(flowers, "kind")
    with np.load("run/model.npz") as model:
        hits = np.argmax(whole.features @ model["kernel"] + model["bias"], -1) == whole.labels
    assert np.mean(hits) > 0.95


def test_names_with_brackets_are_printed_as_they_are():
    """Rich reads [red] as a style, and fails on [/b], the end of a style that has not begun."""
    out, names = io.StringIO(), ["[/b]", "[red]"]
    found = metrics(np.arange(2), np.eye(2), names, 0, 0.5)
    print_metrics(Console(file=out, width=100), found, "2 rows of [dim].csv")
    for name in (*names, "2 rows of [dim].csv"):
        assert f"{name} " in out.getvalue()
