"""Ctrl-C ends a command at any moment, with one line."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("typer")
from commands import run

import softjax
from softjax import _interrupt

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once]


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
    assert os.listdir() == []


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
    assert sorted(os.listdir()) == ["data.csv", "softjax-out"]
    assert os.listdir("softjax-out") == ["unfinished.npz"]
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
