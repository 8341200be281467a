"""Errors on the command line: Ctrl-C, files, models, options."""

import io
import itertools
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("typer")

from commands import one_line, run

import softjax
from softjax import _files, cli, models, plots, regression, tables
from softjax.cli import _fit, _predict, _summary

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once]


def files():
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


# --- files are whole, and in UTF-8 ---


def test_predictions_are_utf_8_whatever_the_locale(data, model):
    expected = run("predict", model, data, "--proba").stdout_bytes.decode()
    header, *rows = expected.splitlines()
    assert header == "class,p(été),p(日本),p(x)"
    assert len(rows) == 60
    for charset in ("ascii", "latin-1"):
        printed = run("predict", model, data, "--proba", charset=charset)
        assert printed.stdout_bytes.decode() == expected
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "softjax", "predict", str(model), data, "--proba"]
    done = subprocess.run(
        [*command, "--out", "p.csv"], env=os.environ | environment, capture_output=True, check=True
    )
    assert done.stderr == b""
    assert Path("p.csv").read_bytes().decode() == expected


def test_a_file_is_whole_or_as_it_was(data, model):
    def failing(path):
        with _files.whole(path) as draft:
            draft.write_bytes(b"half")
            raise ValueError("half")

    Path("old").write_bytes(b"old")
    Path("old").chmod(0o640)
    Path("link").symlink_to("old")
    before = files()
    for name in ("old", "link", "new"):
        with pytest.raises(ValueError, match="half"):
            failing(Path(name))
    assert files() == before
    with _files.whole(Path("link")) as draft:
        draft.write_bytes(b"new")
    assert Path("link").is_symlink()
    assert Path("old").read_bytes() == b"new"
    assert Path("old").stat().st_mode & 0o777 == 0o640
    Path("p.csv").write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        failed = run("predict", model, data, "--proba", "--out", "p.csv")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert one_line(failed) == "softjax: p.csv: File too large."
    assert Path("p.csv").read_bytes() == b"old"
    assert files() == [*before, "p.csv"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("fit", "data.csv", "--label-column", "y", "--out", "data.csv"),
        ("fit", "data.csv", "--label-column", "y", "--out", "data.csv/run"),
        ("fit", "data.csv", "--label-column", "y", "--out", "taken"),
        ("fit", "data.csv", "--label-column", "y", "--out", "/proc/run"),
        ("fit", "data.csv", "--label-column", "y", "--stream", "--out", "data.csv"),
        ("fit", "data.csv", "--label-column", "y", "--stream", "--out", "taken"),
        ("fit", "data.csv", "--label-column", "y", "--checkpoint", "data.csv"),
        ("predict", "m.npz", "data.csv", "--out", "taken"),
        ("predict", "m.npz", "data.csv", "--out", "absent/p.csv"),
        ("predict", "m.npz", "data.csv", "--out", "/proc/p.csv"),
    ],
)
@pytest.mark.usefixtures("data", "model")
def test_a_place_that_cannot_be_written_is_refused_before_the_work(monkeypatch, arguments):
    Path("taken/history.jsonl").mkdir(parents=True)
    for name in ("dataset", "features", "open_file"):
        monkeypatch.setattr(tables, name, lambda *_: pytest.fail("the data was read"))
    place = arguments[arguments.index("--out") + 1 if "--out" in arguments else -1]
    assert place in one_line(run(*arguments))


def test_a_command_does_not_write_over_what_it_reads(data, model):
    """By whatever name: the file itself, a link to it, or the file of a model in the folder."""
    Path("link.csv").symlink_to(data)
    Path("run").mkdir()
    table = np.random.default_rng(0).normal(size=(60, 2))
    np.savez("run/model.npz", x=table[:, 0], z=table[:, 1], y=np.arange(60) % 2)
    before = {path: path.read_bytes() for path in (Path(data), model, Path("run/model.npz"))}
    for command in (
        ("predict", model, data, "--out", "./data.csv"),
        ("predict", model, data, "--out", "link.csv"),
        ("predict", model, data, "--out", model),
        ("fit", "run/model.npz", "--label-column", "y", "--out", "run"),
        ("fit", "run/model.npz", "--label-column", "y", "--out", "run", "--stream"),
    ):
        assert "the command reads this file" in one_line(run(*command))
        assert before == {path: path.read_bytes() for path in before}


def test_an_error_offers_only_what_helps(data, model):
    fit = ("fit", "bad.csv", "--label-column", "y")
    for cell, helps in (("", True), ("1e60", False)):
        lines = Path(data).read_text().splitlines()
        Path("bad.csv").write_text("\n".join([lines[0], f"{cell},1,u", *lines[1:]]))
        for options in ((), ("--impute",)):
            if not (helps and options):
                filling = "--impute fills" in one_line(run(*fit, *options))
                assert filling == helps
        assert ("fitted with --impute" in one_line(run("predict", model, "bad.csv"))) == helps
    assert "Did you mean digits?" in one_line(run("fit", "digitss"))
    assert "Did you mean" not in one_line(run("fit", "dta.csv", "--label-column", "y"))
    line = one_line(run(*fit, "--out", "bad.csv"))
    assert line == "softjax: bad.csv: is a file; --out must name a folder."
    assert "weight > 0" in one_line(
        run("fit", data, "--label-column", "y", "--class-weight", "u=0")
    )


# --- fits ---


@pytest.mark.parametrize("solver", [str(solver) for solver in cli._app.Solver])
def test_every_solver_runs_with_the_options_of_the_command_line(data, solver):
    """--solver firth was a traceback by the default of --l2."""
    result = run("fit", data, "--label-column", "y", "--solver", solver)
    assert result.exit_code == 0, result.output
    assert models.load_model(Path("softjax-out/model.npz")).classes == ["u", "v", "w"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--solver", "firth", "--l2", "1e-4"], "penalty of its own"),
        (["--solver", "firth", "--l1", "1"], "--l1 needs"),
        (["--solver", "firth", "--summary"], "--l2 with another solver has a summary"),
        (["--l1", "1", "--summary"], "would be too small; --l2 alone has a summary"),
        (["--solver", "newton", "--epochs", "3"], "need --solver optax"),
        (["--solver", "optax", "--max-steps", "3"], "takes --epochs"),
        (["--optimizer", "lbfgs", "--batch-size", "3"], "--batch-size and"),
        (["--optimizer", "adam", "--learning-rate", "0"], "above 0"),
        (["--learning-rate", "nan"], "above 0"),
        (["--learning-rate", "1e300"], "above 0"),
        (["--seed", str(2**63)], "'--seed': must be at most 9.22337e+18"),
        (["--l2", "1e300"], "must be a finite number of float32"),
        (["--l1", "1e39"], "must be a finite number of float32"),
        (["--class-weight", "v=1e300"], "a weight > 0 that float32 can hold"),
        (["--class-weight", "v=1e-300"], "a weight > 0 that float32 can hold"),
        (["--patience", "3"], "no effect"),
        (["--processes", "1"], "no effect"),
        (["--every", "3"], "--every needs --stream"),
        (["--odds-ratios"], "--odds-ratios needs --summary"),
        (["--stream", "--optimizer", "lbfgs"], "adam or sgd"),
        (["--stream", "--max-steps", "3", "--epochs", "3"], "go with"),
        (["--stream", "--solver", "firth"], "lbfgs or"),
        (["--stream", "--patience", "3"], "no effect"),
        (["--checkpoint", "saved", "--l1", "1"], ": --checkpoint takes --solver lbfgs or optax"),
        (["--stream", "--odds-ratios"], "--odds-ratios needs --summary"),
        (["--solver", "sgd"], "'--solver': 'sgd' is not one of 'auto', "),
        (["--l2", "abc"], "'--l2': expected a number, got 'abc'. "),
        (["--max-steps", "1.5"], "'--max-steps': expected a whole number, got '1.5'. "),
        (["--folds", "1"], "'--folds': must be at least 2, got 1. "),
        (["--test-fraction", "2"], "'--test-fraction': must be at most 0.99, got 2"),
    ],
)
def test_options_that_contradict_or_change_nothing_are_refused(options, words):
    line = one_line(run("fit", "data.csv", *options))
    assert words in line
    assert line.endswith("fit --help lists the options.")
    assert files() == []
    assert "Did you mean 'fit'? " in one_line(run("fti"))


def test_options_without_an_effect_on_the_digits_are_refused():
    for option, value in (("--test-fraction", 0.3), ("--label-column", "y"), ("--seed", 1)):
        result = run("fit", "digits", option, value)
        assert result.exit_code == 2
        assert "no effect" in result.stderr
    assert "no effect" in run("fit", "digits", "--stream", "--skip-nonfinite").stderr


def test_a_fit_that_is_not_finite_has_no_model(data, monkeypatch):
    fit = regression.fit

    def spoiled(kernel, objective, status):
        def spoil(*arguments, **options):
            result = fit(*arguments, **options)
            params = result.params._replace(kernel=kernel + result.params.kernel)
            return result._replace(params=params, objective=objective, status=status)

        return spoil

    non_finite = regression._result.Status.NON_FINITE
    for kernel, objective, status, saved in (
        (0.0, np.nan, 1, True),
        (0.0, 1.0, non_finite, True),
        (np.inf, 1.0, 1, False),
    ):
        monkeypatch.setattr(regression, "fit", spoiled(kernel, objective, status))
        line = one_line(run("fit", data, "--label-column", "y", "--max-steps", 2), status=1)
        assert "the fit is no longer finite after" in line
        assert "no model was written" in line
        assert ("unfinished.npz" in line) == saved
        assert not Path("softjax-out/model.npz").exists()


def test_a_folder_holds_the_files_of_one_fit(data, monkeypatch):
    out = Path("softjax-out")
    command = ("fit", data, "--label-column", "y", "--l2", 1e-3)
    run(*command, "--l2", 1e-1, "--folds", 2, "--summary")
    assert {"cross_validation.csv", "summary.txt"} <= set(os.listdir(out))
    for name in ("unfinished.npz", "report.png", "notes.txt"):
        (out / name).touch()
    assert run(*command).exit_code == 0
    assert sorted(os.listdir(out)) == ["history.jsonl", "metrics.json", "model.npz", "notes.txt"]
    run("fit", data, "--label-column", "z")
    assert len(os.listdir(out)) == 4  # nothing was written
    fit = regression.fit
    monkeypatch.setattr(regression, "fit", lambda *a, **o: fit(*a, **o)._replace(objective=np.nan))
    assert "no model was written" in one_line(run(*command), status=1)
    assert sorted(os.listdir(out)) == ["notes.txt", "unfinished.npz"]


def test_a_fit_without_an_optimum_says_so_in_one_line(data):
    result = run("fit", data, "--label-column", "y", "--max-steps", 1)
    assert "stopped at its limit of steps, which --max-steps sets" in one_line(result, status=0)
    assert "step limit after 1 step " in result.stdout
    result = run("fit", data, "--label-column", "y")
    assert result.stderr == ""
    assert "converged after" in result.stdout
    Path("apart.csv").write_text(
        "a,y\n" + "".join(f"{k},{'no' if k < 9 else 'yes'}\n" for k in range(20))
    )
    for l2, words in ((0, "the features separate the classes"), (1e-3, None)):
        result = run("fit", "apart.csv", "--label-column", "y", "--l2", l2)
        assert result.exit_code == 0
        assert (words in result.stderr) if words else result.stderr == ""


def test_why_there_is_no_summary_is_said_in_the_words_of_the_command(monkeypatch):
    """The reasons were those of the Python function, with its arguments."""
    rows = [(k, 2 * k, "no" if k < 9 else "yes", "no" if k % 3 else "yes") for k in range(20)]
    lines = [",".join(map(str, row)) for row in [("a", "b", "apart", "mixed"), *rows]]
    Path("hard.csv").write_text("\n".join(lines))
    cases = [
        ("apart", "mixed", "standard errors need the optimum, and the fit has not converged."),
        ("mixed", "apart", "leave some out by --drop, or take a larger --l2."),
    ]
    for (label, other, words), stream in itertools.product(cases, ((), ("--stream",))):
        command = ("fit", "hard.csv", "--label-column", label, "--drop", other, "--l2", 0, *stream)
        assert words in no_summary(*command)
    monkeypatch.setattr(_summary, "MATRICES", 10**14)
    assert "covariance of 6 coefficients needs 28800000.0 GB" in no_summary(*command)


def no_summary(*command):
    stdout = run(*command, "--summary", "--test-fraction", 0).stdout
    (line,) = [line for line in stdout.splitlines() if line.startswith("No summary")]
    assert "`" not in line
    return line


# --- extras and help ---


def test_plots_are_there_without_an_import_and_name_their_extra(monkeypatch):
    labels, p = jnp.array([0, 1]), jnp.array([[0.9, 0.1], [0.4, 0.6]])
    assert softjax.plots is plots
    with pytest.raises(
        ModuleNotFoundError, match=r"softjax\.plots\.reliability needs matplotlib"
    ) as e:
        softjax.plots.reliability(io.BytesIO(), labels, p)
    for words in ("pip install '.[plot]' in a checkout", "pip install 'softjax-regression[plot]'"):
        assert words in str(e.value)
    monkeypatch.undo()
    file = io.BytesIO()
    softjax.plots.reliability(file, labels, p)
    assert file.getvalue().startswith(b"\x89PNG")


def test_a_picture_shows_any_name(monkeypatch):
    """Formulas that are none, and scripts that the font lacks: the one raised, the other warned."""
    monkeypatch.undo()
    labels, p = np.array([0, 1, 0]), np.array([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3]])
    event = {"epoch": 1, "objective": 1.0, "validation_loss": 1.0, "validation_accuracy": 0.5}
    names = ["$^$", "日本"]
    for shape in (None, (2, 1)):
        file = io.BytesIO()
        plots.report(file, [event], np.eye(2), names, names, labels, p, shape)
        assert file.getvalue().startswith(b"\x89PNG")


def test_check_without_mpmath_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpmath", None)
    assert "pip install '.[cli]' in a checkout" in one_line(run("check", "--quick"))


def test_every_option_says_what_it_is_in_a_sentence():
    for command in cli.app.registered_commands:
        context = run(command.callback.__name__, "--help", env={"COLUMNS": "200"})
        assert context.exit_code == 0
        assert "Example: softjax" in context.output
    for function in (_fit.fit, _predict.predict, _predict.check):
        for name, annotation in function.__annotations__.items():
            for info in getattr(annotation, "__metadata__", ()):
                assert re.match(r"[A-Z]|auto|HOST", info.help), name
                assert info.help.endswith("."), name
                assert not re.match("(Of|That|Who|Where) ", info.help), name
