"""Resumed runs: what is saved and refused, damaged checkpoints, and failed writes."""

import json
import os
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import optax
import pytest

from softjax import streaming
from softjax.streaming import _feeds
from softjax.tables import DataError

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("typer")

from spoiling import spoil, steps_in
from typer.testing import CliRunner

from softjax import cli
from softjax.checkpoints import DIGESTS, Checkpoints
from softjax.cli import _stream

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once]

ADAM = optax.adam(0.1)
STEPS = 22


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 3)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", np.argmax(x + rng.gumbel(size=(100, 3)), 1))
    return tmp_path


def train(files, steps=STEPS, optimizer=ADAM, saved="saved", seed=0, every=4, **options):
    """In epochs of 10 steps."""
    rows = streaming.open_rows(files / "x.npy", files / "y.npy")
    return streaming.train(
        streaming.Batches(rows, 10, seed=seed, buffer_bytes=300),
        num_classes=3,
        optimizer=optimizer,
        steps=steps,
        every=every,
        checkpoints=Checkpoints(files / saved, {"optimizer": "adam"}) if saved else None,
        **options,
    )


def without_seconds(history):
    return [{k: v for k, v in event.items() if k != "seconds"} for event in history]


def test_a_run_that_was_stopped_ends_bit_for_bit_as_one_that_was_not(files, monkeypatch):
    whole = train(files, saved=None)
    monkeypatch.setattr(_feeds, "LONGEST_CHUNK", 3)
    asked = iter([False, False, True])
    with pytest.raises(streaming.Preempted) as stopped:  # between two events
        train(files, preempted=lambda: next(asked))
    assert stopped.value.step == 6
    # What knows less of the run, or nothing, can read it.
    for known in ({}, {"optimizer": "adam"}):
        read = Checkpoints(files / "saved", known).restore()
        assert read is not None
        assert read.step == 6
        for part, other in zip(read.params, stopped.value.params, strict=True):
            np.testing.assert_array_equal(part, other)
    other = train(files, steps=0, saved="other", init=read.params)
    np.testing.assert_array_equal(other.params.kernel, read.params.kernel)
    with pytest.raises(DataError, match=r"run: optimizer was \"adam\" and is \"sgd\"\."):
        Checkpoints(files / "saved", {"optimizer": "sgd"}).restore()
    with pytest.raises(DataError, match=r"last step is 5, .* at step 6: take more steps"):
        train(files, steps=5)
    assert steps_in(files / "saved") == [4, 6]
    again = train(files)
    for part, other in zip(again.params, whole.params, strict=True):
        np.testing.assert_array_equal(part, other)
    assert again.steps == STEPS
    assert steps_in(files / "saved") == [16, 20, 22]  # the last three
    assert without_seconds(again.history) == without_seconds(whole.history)
    seconds = [event["seconds"] for event in again.history]
    assert seconds == sorted(seconds)
    # Nothing is left to do, and nothing is done.
    np.testing.assert_array_equal(train(files).params.kernel, whole.params.kernel)


@pytest.mark.parametrize("kind", ["iterable", "function"])
def test_batches_may_go_on_at_one_that_is_smaller_than_the_first(files, kind):
    x, y = np.load(files / "x.npy"), np.load(files / "y.npy")
    few = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 20, 8)]
    source = few if kind == "iterable" else lambda step: few[step % len(few)]

    def run(steps, **options):
        return streaming.train(source, num_classes=3, optimizer=ADAM, steps=steps, **options)

    run(2, checkpoints=Checkpoints(files / "saved"))
    again = run(6, checkpoints=Checkpoints(files / "saved"))
    np.testing.assert_array_equal(again.params.kernel, run(6).params.kernel)


def test_another_run_is_refused_with_the_difference(files):
    train(files, steps=4)
    with pytest.raises(
        DataError, match=r"another run: batches\.seed was 0 and is 1\. Another folder"
    ):
        train(files, seed=1)
    with pytest.raises(DataError, match=r"another run: the optimizer differs: init\..* was"):
        train(files, optimizer=optax.sgd(0.1, momentum=0.9))
    path = files / "y.npy"
    y = np.load(path)
    with path.open("r+b") as file:  # in place, one label
        file.seek(-8, 2)
        file.write(int((y[-1] + 1) % 3).to_bytes(8, "little"))
    with pytest.raises(DataError, match=r"batches\.data\.y\.npy\.changed_ns was \d+ and is"):
        train(files)
    np.save(path, y[:90])
    np.save(files / "x.npy", np.load(files / "x.npy")[:90])
    with pytest.raises(DataError, match=r"batches\.rows was 100 and is 90"):
        train(files)


def test_the_last_checkpoint_that_is_whole_is_used(files, capfd):
    whole = train(files, saved=None)
    train(files, steps=18)
    assert steps_in(files / "saved") == [12, 16, 18]
    spoil(files / "saved" / "18", "cut")
    spoil(files / "saved" / "16", "flip")
    resumed = train(files)
    np.testing.assert_array_equal(resumed.params.kernel, whole.params.kernel)
    said = capfd.readouterr().err
    for step in (18, 16):
        assert f"bad-{step}: the checkpoint of step {step} is damaged" in said
        assert (files / "saved" / f"bad-{step}").is_dir()
    assert "step 12" not in said
    for step in steps_in(files / "saved"):
        spoil(files / "saved" / str(step), "empty")
    with pytest.raises(DataError, match=r"all checkpoints are damaged \(3 found\)"):
        train(files)


@pytest.mark.parametrize(
    "change",
    [
        {"step": 1},
        {"step": "2"},
        {"history": None},
        {"history": [1.0]},
        {"history": [{"objective": "low"}]},
        {"configuration": []},
        {"more": 1},
    ],
)
def test_a_record_that_no_run_writes_is_put_aside(tmp_path, capfd, change):
    """Its digests may be missing: a process that dies as it saves has not written them."""
    saving = Checkpoints(tmp_path, {"seed": 1})
    for step in (1, 2):
        saving.save(step, {"kernel": np.ones(2)}, [{"objective": 1.0}])
    (tmp_path / "2" / DIGESTS).unlink()
    record = tmp_path / "2" / "record" / "metadata"
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    restored = Checkpoints(tmp_path, {"seed": 1}).restore()
    assert restored is not None
    assert restored.step == 1
    assert "the checkpoint of step 2 is damaged and was renamed" in capfd.readouterr().err


def test_what_is_left_of_a_save_that_was_cut_short_is_not_read(files):
    whole = train(files, saved=None)
    train(files, steps=8)
    half = files / "saved" / "12.orbax-checkpoint-tmp-1"
    half.mkdir()
    (half / "state").write_bytes(b"half")
    np.testing.assert_array_equal(train(files).params.kernel, whole.params.kernel)


def test_a_disk_that_is_full_is_said_and_loses_nothing(files):
    train(files, steps=8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with pytest.raises(DataError, match=r"cannot be written.*File too large"):
            train(files, steps=16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    whole = train(files, saved=None)
    np.testing.assert_array_equal(train(files).params.kernel, whole.params.kernel)


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_done(files):
    (files / "file").touch()
    with pytest.raises(OSError, match="Not a directory"):
        train(files, saved="file/saved")
    with pytest.raises(OSError, match="softjax"):
        Checkpoints("/proc/softjax")


# --- the command line ---


@pytest.fixture
def _no_pictures(monkeypatch, files):
    """They take longer than all the rest."""
    monkeypatch.chdir(files)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


def softjax(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.mark.usefixtures("_no_pictures")
def test_the_same_command_goes_on():
    command = ["fit", "x.npy", "--label-column", "y.npy", "--batch-size", 16]
    command += ["--test-fraction", 0.1]
    saving = [*command, "--checkpoint", "saved", "--every", 4]
    for arguments in (
        [*command, "--stream", "--epochs", 4, "--out", "whole"],
        [*saving, "--epochs", 2, "--out", "run"],
        [*saving, "--epochs", 4, "--out", "run"],
    ):
        result = softjax(*arguments)
        assert result.exit_code == 0, result.output
    assert "90 examples to fit, 10 held out." in result.output
    with np.load("whole/model.npz") as whole, np.load("run/model.npz") as run:
        for name in ("kernel", "bias", "classes", "features"):
            np.testing.assert_array_equal(whole[name], run[name])
    history = [json.loads(line) for line in Path("run/history.jsonl").read_text().splitlines()]
    assert [event["step"] for event in history] == [4, 8, 12, 14, 16, 20, 24, 28]
    assert softjax(*saving, "--seed", 1).exit_code == 2
    refused = softjax(*saving, "--learning-rate", 0.5)
    assert refused.exit_code == 2
    assert "belongs to another run: learning_rate was 0.01 and is 0.5." in refused.stderr
    assert "Another folder for the checkpoints starts a new run" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    words = "epoch 1 ends at step 7, and the checkpoint is at step 28: take more epochs."
    assert words in softjax(*saving, "--epochs", 1).stderr


@pytest.mark.usefixtures("_no_pictures")
@pytest.mark.parametrize(
    ("saving", "status", "words"),
    [
        (["--checkpoint", "saved"], 0, "the same command resumes from saved"),
        ([], 143, "nothing was saved"),
    ],
)
def test_sigterm_in_the_pass_before_the_first_step(monkeypatch, saving, status, words):
    def survey(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return streaming._survey.survey(*arguments)

    monkeypatch.setattr(_stream, "survey", survey)
    stopped = softjax("fit", "x.npy", "--label-column", "y.npy", "--stream", "--epochs", 1, *saving)
    assert stopped.exit_code == status
    assert stopped.stderr == f"softjax: stopped by SIGTERM before the first step: {words}.\n"
    assert not list(Path("saved").glob("*"))


@pytest.mark.usefixtures("_no_pictures")
def test_streams_on_the_command_line():
    command = ["fit", "x.npy", "--label-column", "y.npy", "--stream"]
    exact = softjax(*command, "--out", "exact")
    assert exact.exit_code == 0, exact.output
    assert "converged" in exact.output
    x = np.load("x.npy")
    x[[5, 60], 1] = np.nan
    np.save("x.npy", x)
    bad = softjax(*command)
    assert bad.exit_code == 2
    expected = "column '1', row 6: expected a finite number of float32, got nan or an empty"
    assert f"{expected} cell; 1 other row is not complete" in bad.stderr
    assert "--skip-nonfinite skips such rows, --impute fills missing cells in." in bad.stderr
    skipped = softjax(*command, "--skip-nonfinite", "--epochs", 2)
    assert skipped.exit_code == 0, skipped.output
    far = x.astype(float) + 1e9  # where float32 holds every 64th number
    np.save("x.npy", far)
    assert softjax(*command, "--skip-nonfinite", "--out", "far").exit_code == 0
    with np.load("far/model.npz") as model:
        top = np.argmax((far - 1e9) @ model["kernel"], 1)
        assert np.mean(top == np.load("y.npy")) > 0.5
    np.save("x.npy", x)
    exact = softjax(*command, "--skip-nonfinite")
    assert "converged" in exact.output
    both = np.column_stack([np.load("y.npy"), np.ones(100)])
    np.save("both.npy", both)
    softjax("fit", "both.npy", "--label-column", "0", "--stream", "--out", "both")
    with np.load("both/model.npz") as model:
        assert model["features"].tolist() == ["1"]
    np.save("labels.npy", both[:, :1])
    alone = softjax("fit", "labels.npy", "--label-column", "0", "--stream")
    assert "no columns besides the labels" in alone.stderr
    for options in (["--l1", 1], ["--optimizer", "lbfgs"], ["--solver", "newton"]):
        assert softjax(*command, *options).exit_code == 2
    assert softjax("fit", "digits", "--every", 3).exit_code == 2
