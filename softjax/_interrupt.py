"""Ctrl-C ends a softjax command at any moment, with one line and exit status 130.

By default Python raises KeyboardInterrupt in the main thread, between any two of its instructions.
Programs that use JAX are not safe against this. A compilation, which can take seconds, is not
interrupted at all. In a callback of XLA or of the garbage collector, the exception is printed and
dropped, and the fit continues. An exception that unwinds through a trace keeps objects of jaxlib
alive until the interpreter ends, which then often crashes with a segmentation fault (exit status
139).

Here a thread waits for the signal instead and ends the process at once, without unwinding the
stack. Files are complete nevertheless: `softjax._files` writes each file under another name first
and delays the signal while it writes.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any, NoReturn

STATUS = 128 + signal.SIGINT

# The last of these functions returns the line that reports an interrupt.
_reports: list[Callable[[], str]] = []
# This line reports an interrupt if there is no such function.
_words = ["interrupted; nothing was written."]
# These functions get the line and end all processes of a run; with one process they return.
_ends: list[Callable[[str], None]] = []
# The lock is held while a file is being written.
_writing = threading.RLock()
# These events tell running work to stop after its current step.
_postponed: list[threading.Event] = []


def install() -> None:
    """Starts a thread that ends this process on SIGINT; a second call has no effect.

    A process that was started with SIGINT ignored, for example by `nohup`, continues to ignore it.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # The interpreter writes a signal number to the pipe only if Python has a handler for it.
    signal.signal(signal.SIGINT, _ignore)
    threading.Thread(target=_listen, args=(reading,), daemon=True).start()
    # `softjax.launch` starts its processes with SIGINT blocked.
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def uninstall() -> None:
    """Stops handling SIGINT here, because the program has set its own handler."""
    signal.set_wakeup_fd(-1)


def finish() -> None:
    """Ignores SIGINT from now on: the work is done, and its exit status is known."""
    if signal.getsignal(signal.SIGINT) is _ignore:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def reported_by(report: Callable[[], str]) -> AbstractContextManager:
    """In this context `report` returns the line for an interrupt; it may save the work so far."""
    return _listed(_reports, report)


def ended_by(end: Callable[[str], None]) -> AbstractContextManager:
    """In this context an interrupt calls `end` with the line; if it returns, this process ends."""
    return _listed(_ends, end)


def postponed() -> AbstractContextManager[threading.Event]:
    """In this context the first interrupt only sets this event; the second ends the process."""
    return _listed(_postponed, threading.Event())


@contextlib.contextmanager
def _listed(entries: list[Any], entry: Any) -> Iterator[Any]:
    entries.append(entry)
    try:
        yield entry
    finally:
        entries.remove(entry)


def held_back() -> AbstractContextManager:
    """In this context an interrupt waits."""
    return _writing


def tell(words: str) -> None:
    """Sets the line that reports an interrupt if there is no report function."""
    _words[:] = [words]


def _ignore(*_: object) -> None:
    """Does nothing: the thread handles the signal."""


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
            except Exception as error:  # the work so far cannot be saved
                words = f"interrupted; nothing was saved: {' '.join(str(error).split())}"
        for end in reversed(_ends):
            end(words)
        _say_and_exit(words)


def _say_and_exit(words: str) -> NoReturn:
    # Of several processes, only process 0 prints. `os.write` needs no buffers or locks of Python,
    # which the main thread may hold.
    if os.environ.get("JAX_PROCESS_ID", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"softjax: {words}\n".encode())
    os._exit(STATUS)


def _is_command() -> bool:
    """Whether this process was started as `softjax`, or as `python -m softjax[.launch]`."""
    name = sys.argv[0] if getattr(sys, "argv", None) else ""
    if name == "-m":  # Python has not found the module yet
        modules = [after for flag, after in pairwise(sys.orig_argv) if flag == "-m"]
        return modules[:1] in (["softjax"], ["softjax.launch"])
    return os.path.basename(name) in ("softjax", "softjax.exe")


# The package imports this module first, so that Ctrl-C also works during the other imports, which
# take seconds.
if _is_command():
    install()
