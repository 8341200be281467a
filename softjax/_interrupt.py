"""What Ctrl-C does to a command of softjax: one line, exit status 130, at any moment.

Python raises KeyboardInterrupt in the main thread, between any two of its instructions. A program
on JAX is not safe there. A compilation of seconds is not interrupted at all. In a callback of XLA
or of the garbage collector the exception is printed and dropped, and the fit goes on. And an
exception that unwinds through a tracing keeps objects of jaxlib alive until the interpreter ends,
which then often ends in a segmentation fault (exit status 139).

Here a thread waits for the signal and ends the process at once, without unwinding anything. Files
are whole all the same: `softjax._files` writes each of them under another name first, and holds
the signal back meanwhile.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NoReturn

STATUS = 128 + signal.SIGINT

# What is told of an interrupt: the innermost of these says what was reached.
_reports: list[Callable[[], str]] = []
_words = ["interrupted; nothing was written."]
# Given the line first: they end all processes of a run, and return where there is but one.
_ends: list[Callable[[str], None]] = []
# Held while a file is being written.
_writing = threading.RLock()
# Where the work itself stops after its current step: it only has to know.
_postponed: list[threading.Event] = []


def install() -> None:
    """Lets a thread end this process on SIGINT; called again, it changes nothing.

    A process that was started with SIGINT ignored, as by `nohup`, goes on ignoring it.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # The interpreter writes the number of a signal to the pipe only where Python handles it.
    signal.signal(signal.SIGINT, _ignore)
    threading.Thread(target=_listen, args=(reading,), daemon=True).start()
    if hasattr(signal, "pthread_sigmask"):  # `softjax.launch` starts its processes with it blocked
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def uninstall() -> None:
    """Gives SIGINT back to the program, which has set a handler of its own."""
    signal.set_wakeup_fd(-1)


def finish() -> None:
    """Ignores SIGINT from here on: the work is done, and its exit status is known."""
    if signal.getsignal(signal.SIGINT) is _ignore:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def reported_by(report: Callable[[], str]) -> Iterator[None]:
    """Meanwhile an interrupt is told in the words of `report`, which may save what was reached."""
    _reports.append(report)
    try:
        yield
    finally:
        _reports.remove(report)


@contextlib.contextmanager
def ended_by(end: Callable[[str], None]) -> Iterator[None]:
    """Meanwhile an interrupt calls `end` with the line; where it returns, this process ends."""
    _ends.append(end)
    try:
        yield
    finally:
        _ends.remove(end)


@contextlib.contextmanager
def postponed() -> Iterator[threading.Event]:
    """Meanwhile the first interrupt only sets this event, and the second ends the process."""
    event = threading.Event()
    _postponed.append(event)
    try:
        yield event
    finally:
        _postponed.remove(event)


def held_back() -> contextlib.AbstractContextManager:
    """Meanwhile an interrupt waits."""
    return _writing


def tell(words: str) -> None:
    """From here on an interrupt is told in these words, where no report is at hand."""
    _words[:] = [words]


def _ignore(*_: object) -> None:
    """The thread has heard it."""


def _listen(reading: int) -> None:
    while True:
        for number in os.read(reading, 64):
            if number == signal.SIGINT:
                _interrupted()


def _interrupted() -> None:
    waiting = [event for event in _postponed if not event.is_set()]
    if waiting:
        for event in waiting:
            event.set()
        return
    with _writing:
        (words,) = _words
        if _reports:
            try:
                words = _reports[-1]()
            except Exception as error:  # what was reached cannot be saved: say that
                words = f"interrupted; nothing was saved: {' '.join(str(error).split())}"
        for end in reversed(_ends):
            end(words)
        _say_and_exit(words)


def _say_and_exit(words: str) -> NoReturn:
    # Of several processes the first speaks. Neither the buffers of Python nor its locks are used,
    # for the main thread may hold them.
    if os.environ.get("JAX_PROCESS_ID", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"softjax: {words}\n".encode())
    os._exit(STATUS)


def _is_command() -> bool:
    """Whether this process was started as `softjax`, or as `python -m softjax[.launch]`."""
    name = sys.argv[0] if getattr(sys, "argv", None) else ""
    if name == "-m":  # so while Python looks for the module
        modules = [after for flag, after in pairwise(sys.orig_argv) if flag == "-m"]
        return modules[:1] in (["softjax"], ["softjax.launch"])
    return os.path.basename(name) in ("softjax", "softjax.exe")


# The first import of the package, so that no moment of the others, seconds long, is without it.
if _is_command():
    install()
