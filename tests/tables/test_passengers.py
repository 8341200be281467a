"""A table with categories and missing cells, from the command line."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer")
import pandas as pd
from commands import one_line, run

import softjax
from softjax import datasets
from softjax.datasets import _passengers
from softjax.tables import DataError

pytestmark = [
    pytest.mark.compiled_quickly,
    pytest.mark.x64_once,
    pytest.mark.usefixtures("own_folder"),
]

MODES = ((), ("--stream",))


def test_passengers_from_the_command_line():
    """The bundled table: a fit with categories and missing cells, and all that it writes."""
    assert datasets.PASSENGERS.read_text() == _passengers.passengers()
    command = ("fit", "passengers", "--label-column", "survived", "--drop", "id", "--out", "run")
    assert "(of 800 rows, age 153, harbour 17)" in one_line(run(*command))
    result = run(*command, "--impute", "--summary", "--l2", 1e-3, "--l2", 1e-1, "--folds", 3)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert "deck (middle, upper; against lower), sex (male; against female)" in result.stdout
    assert "Missing cells of 170 rows are imputed" in result.stdout
    assert sorted(path.name for path in Path("run").iterdir()) == [
        "cross_validation.csv",
        "history.jsonl",
        "metrics.json",
        "model.npz",
        "summary.txt",
    ]
    curve = list(csv.DictReader(Path("run/cross_validation.csv").read_text().splitlines()))
    assert [(row["l2"], row["chosen"]) for row in curve] == [("0.001", "1"), ("0.1", "0")]
    for row in curve:
        accuracy, f1, majority = (
            float(row[name]) for name in ("accuracy", "macro_f1", "majority_accuracy")
        )
        assert majority < accuracy
        assert 0 < f1 <= accuracy
        if row["chosen"] == "1":
            assert majority < f1
    summary = Path("run/summary.txt").read_text()
    assert re.search(r"^sex=male +-2\.\d+", summary, re.MULTILINE)
    assert "of a number or truth value, and for a category against its reference." in summary

    model = softjax.load_model("run/model.npz")
    fills = {column.name: column.fill for column in model.columns}
    assert (fills["deck"], fills["sex"], fills["harbour"]) == ("lower", "male", "Queensport")
    assert fills["family"] == 0.0
    frame = pd.read_csv(datasets.PASSENGERS)
    predicted = model.predict(frame)
    assert predicted == model.predict(str(datasets.PASSENGERS))
    command = ("predict", "run/model.npz", datasets.PASSENGERS, "--label-column", "survived")
    scored = run(*command)
    assert scored.stdout.split() == ["class", *predicted]
    assert "accuracy of 'no' alone" in scored.stderr
    assert "precision" in scored.stderr
    Path("other.csv").write_text(datasets.PASSENGERS.read_text().replace(",yes", ",maybe"))
    line = one_line(run("predict", "run/model.npz", "other.csv", "--label-column", "survived"))
    assert line.endswith("has the label 'maybe'; the classes are no, yes.")
    Path("other.csv").write_text(datasets.PASSENGERS.read_text().replace(",yes", ",YES "))
    line = one_line(run("predict", "run/model.npz", "other.csv", "--label-column", "survived"))
    assert line.endswith("the classes are no, yes. 'yes' differs from it in case or blanks only.")
    with pytest.raises(DataError, match=r"got 'Saintmary'\. 'Saint Mary' differs from it in case"):
        model.encode(frame[:1].assign(harbour="Saintmary"))
    assert np.mean(np.array(predicted) == frame["survived"]) > 0.75
    p = model.predict_proba(frame.astype({"sex": "category"}))
    np.testing.assert_allclose(p.sum(1), 1)
    assert [model.classes[k] for k in p.argmax(1)] == predicted

    found = json.loads(Path("run/metrics.json").read_text())
    assert found["examples"] == sum(c["examples"] for c in found["classes"].values()) == 160
    assert found["majority_class"] == "no"
    assert found["accuracy"] > found["majority_accuracy"] == pytest.approx(105 / 160)
    recall = sum(c["recall"] * c["examples"] for c in found["classes"].values()) / 160
    assert recall == pytest.approx(found["accuracy"])
    assert f"{found['macro_f1']:.4f}" in result.stdout

    text = datasets.PASSENGERS.read_text()
    Path("new.csv").write_text(text.replace("upper", "Upper"))
    line = one_line(run("predict", "run/model.npz", "new.csv"))
    assert re.search("'deck', row 6: expected one of .* lower, middle, upper, got 'Upper'", line)
    frame.drop(columns=["sex", "age"]).to_csv("new.csv", index=False)
    assert "lacks 2 of the model's 6 columns: sex, age" in one_line(
        run("predict", "run/model.npz", "new.csv")
    )
    with pytest.raises(DataError, match="lacks 1 of the model's 6 columns: fare"):
        model.predict(frame.drop(columns="fare"))


def test_a_stream_imputes_and_weights_the_passengers_as_a_fit_in_memory():
    command = ("fit", "passengers", "--label-column", "survived", "--drop", "id", "--impute")
    options = ("--class-weight", "yes=2", "--l2", 1e-3, "--summary")
    memory, stream = (run(*command, *options, *more, "--out", f"run{more}") for more in MODES)
    imputed = "Missing cells of 170 rows are imputed"
    for result in (memory, stream):
        assert result.exit_code == 0, result.output
        assert imputed in result.stdout
    memory, stream = (softjax.load_model(f"run{more}/model.npz") for more in MODES)
    assert memory.columns == stream.columns
    np.testing.assert_allclose(memory.kernel, stream.kernel, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(memory.bias, stream.bias, rtol=1e-3, atol=1e-4)
    memory, stream = (Path(f"run{more}/summary.txt").read_text().splitlines() for more in MODES)
    assert memory[2:8] == stream[2:8]  # below the likelihoods and above the coefficients
    tables = [[line.split()[-6:-4] for line in lines[8:-1]] for lines in (memory, stream)]
    np.testing.assert_allclose(*np.array(tables, float), rtol=2e-3)


def test_the_script_writes_the_table(tmp_path):
    command = [sys.executable, _passengers.__file__, str(tmp_path / "p.csv")]
    subprocess.run(command, check=True)
    assert (tmp_path / "p.csv").read_bytes() == datasets.PASSENGERS.read_bytes()
