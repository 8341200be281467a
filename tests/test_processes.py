"""Several processes on this machine: they agree, and the failure of one ends all."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("typer")

import worker
from spoiling import spoil, steps_in
from typer.testing import CliRunner

from softjax import cli, launch
from softjax.cli._split import Split

pytestmark = pytest.mark.x64_once


@pytest.fixture(scope="module")
def cache(tmp_path_factory, quick_flags):
    """The folder in which all processes keep their programs, which they compile quickly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", quick_flags)
        yield tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def two(tmp_path_factory, cache):
    """The parameters of two processes that nothing befell, and the seconds that they took."""
    folder = tmp_path_factory.mktemp("two")
    begin = time.monotonic()
    assert worker.wait(worker.start(folder, 2, cache=cache), worker.ALL_DONE) == [0, 0]
    return worker.result(folder), time.monotonic() - begin


def said(folder):
    """The messages of all processes, but for those of the runtime."""
    return [line for line in worker.words(folder).splitlines() if line.startswith("softjax")]


def test_an_error_in_one_process_ends_all(tmp_path, cache):
    running = worker.start(tmp_path, 2, cache=cache, fault=("error", 9, 0))
    assert worker.wait(running, worker.ALL_DONE) == [70, 70]
    assert said(tmp_path) == ["softjax: process 0 of 2: RuntimeError: the disk is gone"]


def test_a_batch_that_is_not_finite_ends_all_with_its_step_and_its_row(tmp_path, cache):
    running = worker.start(tmp_path, 2, cache=cache, fault=("nan", 9, 1))
    assert worker.wait(running, worker.ALL_DONE) == [70, 70]
    (words,) = said(tmp_path)
    assert re.search(r"the batch of step 9 is not finite in row \d+\.$", words)
    assert "8" in [path.name for path in (tmp_path / "saved").iterdir()]


def test_a_disk_that_is_full_ends_all_with_the_last_checkpoint(tmp_path, cache):
    running = worker.start(tmp_path, 2, cache=cache, fault=("full", 25, 0))
    assert worker.wait(running, worker.ALL_DONE) == [70, 70]
    (words,) = said(tmp_path)
    assert "process 0 of 2: DataError: " in words
    failed, last = re.search(
        r"of step (\d+) cannot be .* is of step (\d+)\): .*large", words
    ).groups()
    assert int(failed) == int(last) + worker.EVERY  # batches are read ahead


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, cache):
    """A run of two processes after SIGTERM to one of them, with more than one checkpoint."""
    folder = tmp_path_factory.mktemp("stopped")
    # Batches are read ahead: the step of the signal may be two chunks before that of the fault.
    running = worker.start(folder, 2, cache=cache, fault=("preempted", 25, 1))
    assert worker.wait(running, worker.ALL_DONE) == [0, 0]
    assert len(steps_in(folder / "saved")) > 1
    assert not (folder / "params.npz").exists()
    return folder


@pytest.mark.parametrize(("count", "devices"), [(1, 4), (4, 1), (3, 2)])
def test_a_run_that_was_stopped_by_sigterm_goes_on_at_any_count(
    tmp_path, cache, two, stopped, count, devices
):
    """And ends with the bits of one that was left alone, as one process and as several.

    By two processes too: see the next test.
    """
    shutil.copytree(stopped / "saved", tmp_path / "saved")
    codes = worker.wait(
        worker.start(tmp_path, count, cache=cache, devices=devices), worker.ALL_DONE
    )
    assert codes == [0] * count, worker.words(tmp_path)
    np.testing.assert_array_equal(worker.result(tmp_path), two[0])


# --- what is on the disk before they start ---


def test_all_go_on_from_the_last_checkpoint_that_is_whole(tmp_path, cache, two, stopped):
    shutil.copytree(stopped / "saved", tmp_path / "saved")
    *_, last = steps_in(tmp_path / "saved")
    spoil(tmp_path / "saved" / str(last), "cut")
    codes = worker.wait(worker.start(tmp_path, 2, cache=cache), worker.ALL_DONE)
    assert codes == [0, 0], worker.words(tmp_path)
    (words,) = said(tmp_path)
    assert f"bad-{last}: the checkpoint of step {last} is damaged and was renamed" in words
    np.testing.assert_array_equal(worker.result(tmp_path), two[0])


def test_all_end_where_no_checkpoint_is_whole(tmp_path, cache, stopped):
    shutil.copytree(stopped / "saved", tmp_path / "saved")
    steps = steps_in(tmp_path / "saved")
    for step in steps:
        spoil(tmp_path / "saved" / str(step), "flip")
    running = worker.start(tmp_path, 2, cache=cache)
    assert worker.wait_from_meeting(tmp_path, running) == [70, 70]
    *each, last = said(tmp_path)
    assert len(each) == len(steps)
    assert last.endswith(f"all checkpoints are damaged ({len(steps)} found).")


@pytest.mark.parametrize("saved", ["file/saved", "/proc/softjax"])
def test_all_end_where_the_folder_cannot_be_written(tmp_path, cache, saved):
    (tmp_path / "file").touch()
    running = worker.start(tmp_path, 2, cache=cache, saved=saved)
    assert worker.wait_from_meeting(tmp_path, running) == [70, 70]
    (words,) = said(tmp_path)
    assert re.search(rf"Error: .*{saved}'$", words), words


def change(path, how):
    if how == "shorter":
        np.save(path, np.load(path)[:-7])
    if how == "cut":
        os.truncate(path, path.stat().st_size - 8)
    if how == "changed":
        np.save(path, np.load(path)[::-1])


@pytest.mark.parametrize(
    ("how", "who", "words"),
    [
        ("changed", (0, 1), r"process \d of 2: .*belongs to another run: batches\.data\.x"),
        ("changed", (1,), r"different batches: data\.x\.sample is \d+ of process 0 and \d+ of"),
        ("cut", (0,), r"process 0 of 2: .*x-0\.npy: is shorter than its header says"),
        ("shorter", (1,), r"process 1 of 2: .*y-1.npy: expected shape \(1430,\), .* got"),
    ],
)
def test_data_that_changed_since_are_refused(tmp_path, cache, on_files, how, who, words):
    """In the file that all read, or in the copy of one of them."""
    shutil.copytree(on_files, tmp_path, dirs_exist_ok=True)
    (tmp_path / "params.npz").unlink(missing_ok=True)
    for old in tmp_path.glob("words-*"):
        old.unlink()
    for index in who:
        change(tmp_path / f"x-{index}.npy", how)
    running = worker.start(tmp_path, 2, cache=cache)
    assert worker.wait_from_meeting(tmp_path, running) == [70, 70]
    (found,) = said(tmp_path)
    assert re.search(words, found), found


@pytest.fixture(scope="module")
def on_files(tmp_path_factory, cache):
    """A run of two processes on files of their own, stopped by SIGTERM."""
    folder = tmp_path_factory.mktemp("files")
    worker.write_digits(folder, 2)
    running = worker.start(folder, 2, cache=cache, fault=("preempted", 9, 0))
    assert worker.wait(running, worker.ALL_DONE) == [0, 0]
    return folder


def test_a_file_that_is_cut_during_a_run_ends_all_with_its_name(tmp_path, cache):
    worker.write_digits(tmp_path, 2)
    running = worker.start(tmp_path, 2, cache=cache, fault=("cut", 2, 1))
    assert worker.wait_from_meeting(tmp_path, running) == [70, 70]
    (words,) = said(tmp_path)
    assert re.search(r"process 1 of 2: .*x-1\.npy: ends before row \d+: it was cut\.$", words)


def test_kills_end_all_and_change_no_bit(tmp_path, cache, two):
    """At any moment, of any process; `python -m benchmarks run kills` does two hundred."""
    expected, seconds = two
    chance = random.Random(0)
    for _ in range(4):
        kill = worker.kill_one(tmp_path, cache, 2, chance, seconds / 2)
        assert kill is None or kill.seconds is not None, worker.words(tmp_path)
    assert worker.wait(worker.start(tmp_path, 2, cache=cache), worker.ALL_DONE) == [0, 0]
    np.testing.assert_array_equal(worker.result(tmp_path), expected)


# --- the meeting ---


@pytest.mark.parametrize(
    ("acts", "codes", "words"),
    [
        (("leave",) * 3, [0, 0, 0], []),
        # A death at any time, and one that comes when it has happened.
        (
            ("leave", "die waiting", "come late"),
            [70, 9, 70],
            ["process 1 of 3 ended before all"],
        ),
        (
            ("die waiting", "leave", "come late"),
            [9, 70, 70],
            ["lost process 0 of 3.", "process 2 of 3: cannot connect to process 0 at 127.0.0.1:"],
        ),
        (("wait", "die", "wait"), [70, 9, 70], ["lost process 1 of 3."]),
        (("die", "wait", "wait"), [9, 70, 70], ["lost process 0 of 3."]),
        (("wait", "wait", "fail"), [3, 3, 3], ["the disk is gone"]),
        (("fail", "wait", "wait"), [3, 3, 3], ["the disk is gone"]),
        (("fail", "fail", "fail"), [3, 3, 3], ["the disk is gone"]),
        # What is wrong with how they were started.
        (
            ("leave", "of five", "leave"),
            [70, 70, 70],
            ["process 1 of 5 connected to process 0 of 3."],
        ),
        (("leave", "as process 2", "leave"), [70, 70, 70], ["two processes were started as"]),
        (
            ("have no patience", "leave", "never come"),
            [70, 70, 0],
            ["these of the 3 processes did not connect: [2]."],
        ),
    ],
)
def test_all_end_with_one_message(tmp_path, acts, codes, words):
    assert worker.wait(worker.start_meeting(tmp_path, *acts), worker.ALL_END) == codes
    assert len(said(tmp_path)) == len(words)
    assert all(map(str.__contains__, said(tmp_path), words))


# --- the launcher ---


def test_the_command_line_by_two_processes(tmp_path, monkeypatch, quick_flags):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XLA_FLAGS", quick_flags)
    (tmp_path / "matplotlib.py").write_text("raise ModuleNotFoundError")  # a picture takes long
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 3)) + 5
    labels = np.argmax(x + rng.gumbel(size=x.shape), 1)
    np.save("data.npy", np.column_stack([x, labels]).astype(np.float32))
    fit = ["fit", "data.npy", "--label-column", "3", "--stream", "--out"]
    command = [sys.executable, "-m", "softjax.launch", "-n", "2", "--", *fit, "two"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("240 examples to fit, 60 held out, by 2 processes.") == 1
    with np.load("two/model.npz") as two:
        kernel, bias, classes = two["kernel"], two["bias"], two["classes"]
    assert classes.tolist() == ["0.0", "1.0", "2.0"]
    # At the optimum of the standardised rows that are not held out the gradient vanishes.
    split = Split(300, 0.2, seed=0)
    split.see(np.arange(300), ["0.0", "1.0", "2.0"], labels)
    held_out = split.held_out()
    mean, scale = x.mean(0), x.std(0)
    z, y = (np.delete(part, held_out, 0) for part in ((x - mean) / scale, labels))
    kernel, bias = kernel * scale[:, None], bias + mean @ kernel
    p = np.exp(z @ kernel + bias)
    residual = p / p.sum(1, keepdims=True) - np.eye(3)[y]
    np.testing.assert_allclose(z.T @ residual / len(y) + 1e-4 * kernel, 0, atol=1e-5)
    np.testing.assert_allclose(residual.mean(0), 0, atol=1e-5)


def test_a_launcher_that_is_killed_ends_all():
    waiting = "from softjax import processes; processes.end_with_launcher()"
    waiting += "; import time; print('here', flush=True); time.sleep(60)"
    program = "import sys, time; from softjax import launch"
    program += f"; launch.start([sys.executable, '-c', {waiting!r}], 2); time.sleep(60)"
    launcher = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert [launcher.stdout.readline() for _ in range(2)] == [b"here\n"] * 2
    launcher.kill()
    rest, _ = launcher.communicate(timeout=worker.ALL_END)  # to the end of all that can write
    assert (rest, launcher.returncode) == (b"", -signal.SIGKILL)


def test_what_is_wrong_with_the_command_is_said_once(monkeypatch):
    """By process 0, wherever it is wrong; and so by two processes."""
    for wrong in (["--bad-option"], ["fit", "--bad-option"], ["bad-command"]):
        for index in range(2):
            monkeypatch.setenv("JAX_PROCESS_ID", str(index))
            done = CliRunner().invoke(cli.app, wrong)
            assert done.exit_code == 2
            assert done.stdout == ""
            said = done.stderr.count("No such"), done.stderr.count("lists the options")
            assert said == (1 - index, 1 - index)
    command = [sys.executable, "-m", "softjax.launch", "-n", "2", "--", "fit", "--bad-option"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("No such") == done.stderr.count("lists the options") == 1


def test_the_launcher_ends_all_when_one_is_killed(capfd):
    sleeping = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    monkey = pytest.MonkeyPatch()
    monkey.setattr(launch, "PATIENCE", 0.1)
    running = launch.start(sleeping, 3)
    running[1].send_signal(signal.SIGKILL)
    assert launch.wait(running) == 128 + signal.SIGKILL
    monkey.undo()
    assert all(process.returncode == -signal.SIGKILL for process in running)
    said = "softjax.launch: process 1 was ended by SIGKILL; the others were ended.\n"
    assert capfd.readouterr().err == said
    failing = [sys.executable, "-S", "-c", "import os; os._exit(int(os.environ['JAX_PROCESS_ID']))"]
    assert launch.wait(launch.start(failing, 2)) == 1
    assert capfd.readouterr().err.startswith("softjax.launch: process 1 ended with status 1")
    assert launch.wait(launch.start(failing, 1)) == 0
