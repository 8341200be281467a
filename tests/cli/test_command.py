"""Errors on the command line: Ctrl-C, files, models, options."""

import io
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

pytest.importorskip("typer")

from typer.testing import CliRunner

import softjax
from softjax import _files, _interrupt, cli, models, plots, regression, tables
from softjax.cli import _fit, _memory, _predict, _stream
from softjax.cli._split import Split

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """A folder of one's own, without pictures, which take longer than the rest."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


@pytest.fixture
def data():
    """60 rows with 2 features and 3 classes."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 2)), np.arange(60) % 3
    x[:, 0] += y
    lines = [f"{a!r},{b!r},{'uvw'[k]}" for (a, b), k in zip(x.tolist(), y.tolist(), strict=True)]
    Path("data.csv").write_text("\n".join(["a,b,y", *lines]))
    return "data.csv"


@pytest.fixture
def model():
    """A model with 2 features and 3 classes, whose names are not ASCII."""
    kernel = np.array([[1.0, 0.0, -1.0], [0.5, -0.5, 0.0]])
    model = models.Model(kernel, np.zeros(3), ["été", "日本", "x"], ["a", "b"])
    return model.save(Path("m.npz"))


def run(*arguments, **options):
    return CliRunner(**options).invoke(cli.app, [str(argument) for argument in arguments])


def one_line(result, status=2):
    """The line that a command which failed has said."""
    assert result.exit_code == status, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("softjax: ")
    return line


def files():
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


# --- Ctrl-C ---


def start(*command):
    # The tests may have been started with SIGINT ignored, which a process hands on to its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGINT, before)


def interrupted(process):
    """The only line that it says, at exit status 130."""
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    (line,) = said.splitlines()
    return line


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts threads in /proc")
@pytest.mark.parametrize("module", ["softjax", "softjax.launch"])
def test_ctrl_c_while_the_package_is_imported(module):
    process = start("-m", module, "fit", "digits")
    status = Path(f"/proc/{process.pid}/status")
    while "Threads:\t1\n" in status.read_text():  # the listener is the first thread of all
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    assert interrupted(process) == "softjax: interrupted; nothing was written."
    assert files() == []


# Interrupts itself after a step, and waits for the end.
AFTER_A_STEP = """if True:
    import os, signal, sys, time
    sys.argv = ["softjax", *sys.argv[1:]]
    from softjax.__main__ import main
    from softjax.cli._app import FitProgress
    show, times = FitProgress.show, []
    def interrupt(self, event):
        show(self, event)
        if event.step >= 2 and not times:
            times.append(1)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep({pause})
    FitProgress.show = interrupt
    main()
"""


def test_ctrl_c_saves_the_parameters_that_were_reached(data, monkeypatch, quick_flags):
    monkeypatch.setenv("XLA_FLAGS", quick_flags)
    process = start(
        "-c", AFTER_A_STEP.format(pause=60), "fit", data, "--label-column", "y", "--solver", "lbfgs"
    )
    path = Path("softjax-out/unfinished.npz")
    step = re.fullmatch(
        rf"softjax: interrupted after step (\d+); its parameters are in {path}\.",
        interrupted(process),
    )
    assert step
    assert int(step[1]) >= 2
    assert files() == ["data.csv", str(path)]
    assert run("predict", path, data).exit_code == 0


def test_ctrl_c_with_checkpoints_stops_after_a_step_that_is_saved(data, monkeypatch, quick_flags):
    pytest.importorskip("orbax.checkpoint")
    monkeypatch.setenv("XLA_FLAGS", quick_flags)
    options = ("--label-column", "y", "--batch-size", "8", "--checkpoint", "saved", "--every", "2")
    line = interrupted(start("-c", AFTER_A_STEP.format(pause=0), "fit", data, *options))
    pattern = r"softjax: interrupted after step (\d+): the same command resumes from saved; "
    pattern += r"the parameters are in softjax-out/unfinished\.npz\."
    (step,) = re.fullmatch(pattern, line).groups()
    assert step in os.listdir("saved")
    assert softjax.load_model("softjax-out/unfinished.npz").is_finite


class Ended(BaseException):
    """In place of the end of the process."""


def test_what_an_interrupt_says_and_whom_it_waits_for(monkeypatch, capfd):
    def end(status):
        raise Ended(status)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(_interrupt, "_words", ["interrupted; nothing was written."])
    monkeypatch.delenv("JAX_PROCESS_ID", raising=False)
    with pytest.raises(Ended, match="130"):
        _interrupt._interrupted()
    with (
        _interrupt.reported_by(lambda: "outer"),
        _interrupt.reported_by(lambda: 1 / 0),
        pytest.raises(Ended),
    ):
        _interrupt._interrupted()
    with _interrupt.postponed() as asked:
        _interrupt._interrupted()  # the first one
        assert asked.is_set()
        with pytest.raises(Ended):
            _interrupt._interrupted()
    said = capfd.readouterr().err.splitlines()
    assert said == [
        "softjax: interrupted; nothing was written.",
        "softjax: interrupted; nothing was saved: division by zero",
        "softjax: interrupted; nothing was written.",
    ]


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


# --- models ---


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
        {"kernel": np.full((2, 3), np.nan)},
        {"columns": [tables.Column("a"), tables.Column("c")]},
        {"columns": [tables.Column("a"), tables.Column("b", ("x", "x"))]},
    ],
)
def test_a_model_that_could_not_be_loaded_is_not_saved(change):
    good = models.Model(GOOD["kernel"], GOOD["bias"], list("xyz"), ["a", "b"])
    with pytest.raises(ValueError, match=r"softjax\.models\.Model: `"):
        good._replace(**change).save("m.npz")
    assert not Path("m.npz").exists()


def test_what_is_no_table_is_refused():
    """A row of a frame, a dictionary of numbers, columns of unequal lengths, and no path."""
    model = models.Model(GOOD["kernel"], GOOD["bias"], list("xyz"), ["a", "b"])
    frame = pd.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0]})
    assert model.predict(frame.iloc[[0]]) == ["y"]
    with pytest.raises(TypeError, match=r"got Series; .* `frame.iloc\[\[i\]\]`"):
        model.predict(frame.iloc[0])
    for columns in ({"a": 1.0, "b": 2.0}, {"a": [1.0, 2.0], "b": [1.0]}):
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
        (["--solver", "firth", "--summary"], "--summary goes"),
        (["--solver", "newton", "--epochs", "3"], "need --solver optax"),
        (["--solver", "optax", "--max-steps", "3"], "takes --epochs"),
        (["--optimizer", "lbfgs", "--batch-size", "3"], "--batch-size and"),
        (["--optimizer", "adam", "--learning-rate", "0"], "above 0"),
        (["--learning-rate", "nan"], "above 0"),
        (["--patience", "3"], "no effect"),
        (["--processes", "1"], "no effect"),
        (["--every", "3"], "--every needs --stream"),
        (["--odds-ratios"], "--odds-ratios needs --summary"),
        (["--stream", "--optimizer", "lbfgs"], "adam or sgd"),
        (["--stream", "--max-steps", "3", "--epochs", "3"], "go with"),
        (["--stream", "--solver", "firth"], "lbfgs or"),
        (["--stream", "--patience", "3"], "no effect"),
        (["--checkpoint", "saved", "--impute"], ": --checkpoint takes neither --impute nor"),
        (["--checkpoint", "saved", "--l1", "1"], ": --checkpoint takes --solver lbfgs or optax"),
        (["--stream", "--odds-ratios"], "none of --l1, --summary and --odds-ratios"),
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


def test_why_there_is_no_summary_is_said_in_the_words_of_the_command():
    """The reasons were those of the Python function, with its arguments."""
    rows = [(k, 2 * k, "no" if k < 9 else "yes", "no" if k % 3 else "yes") for k in range(20)]
    lines = [",".join(map(str, row)) for row in [("a", "b", "apart", "mixed"), *rows]]
    Path("hard.csv").write_text("\n".join(lines))
    for label, other, words in (
        ("apart", "mixed", "standard errors need the optimum, and the fit has not converged."),
        ("mixed", "apart", "leave some out by --drop, or take a larger --l2."),
    ):
        command = ("fit", "hard.csv", "--label-column", label, "--drop", other, "--l2", 0)
        stdout = run(*command, "--summary", "--test-fraction", 0).stdout
        (line,) = [line for line in stdout.splitlines() if line.startswith("No summary")]
        assert line.endswith(words)
        assert "`" not in line


# --- the rows that are held out ---


@pytest.mark.parametrize("options", [(), ("--stream",), ("--stream", "--epochs", 2)])
def test_a_fit_to_all_rows_has_no_metrics(data, options, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.figure")  # a picture has two panels
    command = ("fit", data, "--label-column", "y", "--l2", 1e-2)
    run(*command)
    result = run(*command, "--test-fraction", 0, *options)
    assert result.exit_code == 0, result.output
    assert "60 examples to fit, none held out, so that no metrics are reported" in result.stdout
    assert "accuracy" not in result.stdout
    out = Path("softjax-out")
    assert sorted(os.listdir(out)) == ["history.jsonl", "model.npz", "report.png"]
    assert "validation" not in (out / "history.jsonl").read_text()
    if "--epochs" not in options:
        table = np.genfromtxt(data, str, delimiter=",", skip_header=1)
        x, y = table[:, :2].astype(float), np.unique(table[:, 2], return_inverse=True)[1]
        kernel = models.load_model(out / "model.npz").kernel * x.std(0)[:, None]
        expected = regression.fit((x - x.mean(0)) / x.std(0), y, l2=1e-2).params.kernel
        np.testing.assert_allclose(kernel, expected, atol=1e-4)


def draw(codes, fraction, seed=0, most=None, runs=1):
    split = Split(len(codes), fraction, seed, most)
    for rows in np.array_split(np.arange(len(codes)), runs):
        split.see(rows, [str(k) for k in range(codes.max() + 1)], codes[rows])
    return split.held_out()


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.99])
def test_every_class_keeps_its_share_of_the_rows_held_out(fraction):
    rng = np.random.default_rng(0)
    for case in range(60):
        counts = rng.integers(1, [3, 40, 400][case % 3], size=rng.integers(2, 30))
        codes = rng.permutation(np.repeat(np.arange(len(counts)), counts))
        rows = draw(codes, fraction, seed=case)
        assert np.array_equal(rows, np.unique(rows))
        drawn = np.bincount(codes[rows], minlength=len(counts))
        assert (drawn <= counts - 1).all()  # a row of each class is left to fit
        most = np.minimum(np.ceil(fraction * counts), counts - 1)
        total = min(round(fraction * len(codes)), most.sum())
        assert abs(len(rows) - total) <= 1
        share = counts * round(fraction * len(codes)) / len(codes)
        assert (drawn >= np.minimum(np.floor(share), counts - 1)).all()
        assert (drawn <= np.ceil(share)).all()


def test_the_rows_held_out_depend_on_the_seed_and_on_nothing_else():
    rng = np.random.default_rng(0)
    codes = rng.integers(7, size=5000)
    rows = draw(codes, 0.2)
    for runs in (3, 50):
        assert np.array_equal(draw(codes, 0.2, runs=runs), rows)
    other = (codes + 3) % 7  # the classes by other names
    assert np.array_equal(draw(other, 0.2), rows)
    assert len(np.intersect1d(draw(codes, 0.2, seed=1), rows)) < 400  # 200 by chance
    few = draw(codes, 0.2, most=100)
    assert len(few) == 100
    assert np.isin(few, rows).all()
    # Nothing of the order of the rows is left: every tenth of them has a tenth of those held out.
    tenths = np.bincount(rows // 500, minlength=10)
    assert (abs(tenths - 100) < 40).all()
    large = rng.integers(3, size=400_000)
    few = draw(large, 0.2, most=1000)
    assert np.bincount(large[few]).tolist() == draw_shares(large, 1000)


def draw_shares(codes, total):
    counts = np.bincount(codes) * total / len(codes)
    rest = np.argsort(np.floor(counts) - counts)[: round(total - np.floor(counts).sum())]
    shares = np.floor(counts)
    shares[rest] += 1
    return shares.astype(int).tolist()


def test_a_stream_holds_out_the_rows_that_a_fit_in_memory_holds_out(data, monkeypatch):
    seen = []

    class Seen(Split):
        def held_out(self):
            seen.append(super().held_out())
            return seen[-1]

    for module in (_memory, _stream):
        monkeypatch.setattr(module, "Split", Seen)
    for options in ([], ["--stream"]):
        result = run("fit", data, "--label-column", "y", "--max-steps", 1, "--seed", 3, *options)
        assert result.exit_code == 0, result.output
    memory, stream = seen
    assert np.array_equal(memory, stream)
    assert np.bincount(memory % 3).tolist() == [4, 4, 4]


def test_a_stream_fits_the_model_of_a_fit_in_memory(data):
    """Rows that are held out count neither in the mean and the scale nor in the majority."""
    rng = np.random.default_rng(1)
    codes = np.repeat([0, 1], [33, 27])  # 26 and 22 rows to fit
    held_out = draw(codes, 0.2)
    x = rng.normal(size=(60, 3))
    x[:, 2] = 7
    x[held_out] = [
        [1e3, -1e20, 8]
    ]  # a number far from the others; a feature that is constant elsewhere
    table = np.column_stack([x, codes])
    np.save("x.npy", table)
    found = []
    for options in ((), ("--stream",)):
        result = run("fit", "x.npy", "--label-column", "3", "--l2", 0.01, *options)
        assert result.exit_code == 0, result.output
        found.append(models.load_model("softjax-out/model.npz"))
    memory, stream = found
    np.testing.assert_allclose(stream.kernel, memory.kernel, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(stream.bias, memory.bias, rtol=1e-3, atol=1e-4)


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
