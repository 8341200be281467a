"""Runs with several processes: the processes find each other, exchange values and end together."""

import contextlib
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from softjax import _interrupt
from softjax._meeting import LAUNCHER, LOST, Meeting

__all__ = [
    "Sigterm",
    "end_with_launcher",
    "ending_together",
    "fail",
    "gather",
    "given_index",
    "of_first",
    "start",
]

# If the processes were found by JAX and not by an address, a lost process is noticed after at most
# HEARTBEAT seconds, unless a collective fails before.
HEARTBEAT = 10
SHUTDOWN = 10
# Seconds to wait until all processes have connected; machines may start minutes apart.
PATIENCE = 300
# Seconds to wait, after a collective has failed, for a more precise message about a lost process.
VERDICT = 2.0

_meeting: Meeting | None = None


def start(
    coordinator: str | None, count: int | None, index: int | None, patience: int = PATIENCE
) -> None:
    """Joins the processes of a run; must be called before any other use of JAX.

    Args:
        coordinator: HOST:PORT at which process 0 listens, reachable by all processes; "auto" for
            the cluster that JAX detects, such as Slurm, Open MPI or Kubernetes; None for a single
            process.
        count: the number of processes; None for the number that JAX detects.
        index: the number of this process, from 0; None for the number that JAX detects.
        patience: seconds to wait for the other processes.

    Raises:
        SystemExit: a process did not connect, or ended before all had connected; the reason has
            been printed once.
    """
    global _meeting
    if coordinator is None:
        return
    end_with_launcher()
    # `Sigterm` handles SIGTERM, and the training steps pass it on to the other processes.
    jax.config.update("jax_enable_preemption_service", False)
    address = None if coordinator == "auto" else coordinator
    loopback = address is not None and address.split(":")[0] in ("127.0.0.1", "localhost")
    if address is not None and count is not None and index is not None and count > 1:
        _meeting = Meeting(address, count, index, patience)
        _meeting.find_service()
    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            coordinator_bind_address=address if loopback else None,
            initialization_timeout=patience,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=SHUTDOWN,
        )
    except ValueError as error:
        reason = "the processes cannot be joined"
        if address is None:
            reason = "no supported cluster was detected; pass HOST:PORT"
        fail(2, f"--coordinator {coordinator}: {reason}: {error}")


def end_with_launcher() -> None:
    """Ends this process when `softjax.launch` has ended, if `softjax.launch` has started it."""
    descriptor = os.environ.get(LAUNCHER)
    if descriptor is None:
        return

    def wait() -> None:
        os.read(int(descriptor), 1)
        if _meeting is not None:
            fail(LOST, "softjax.launch has ended.")
        os._exit(LOST)

    threading.Thread(target=wait, daemon=True).start()


def given_index(arguments: Sequence[str]) -> int:
    """The number of this process from its arguments, which may be wrong, or its environment."""
    given = os.environ.get("JAX_PROCESS_ID", "0")
    for argument, after in pairwise([*arguments, ""]):
        name, _, value = argument.partition("=")
        if name == "--process-id":
            given = value or after
    return int(given) if given.isdecimal() else 0


def gather(value: Any) -> list[Any]:
    """The list of the values of all processes, in their order; every process gets this list."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.array([data.size], np.int32)))
    length = max(1 << int(sizes.max() - 1).bit_length(), 1024)  # few lengths need few programs
    padded = np.pad(data, (0, length - data.size))
    rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def of_first(function: Any) -> Any:
    """The result of `function` on process 0, for all processes; its error is raised on all."""
    value: Any = None
    error: Exception | None = None
    if jax.process_index() == 0:
        try:
            value = function()
        except Exception as raised:
            error = raised
    value, error = gather((value, error))[0]
    if error is not None:
        raise error
    return value


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """If one process fails in this context, ends all with its exit status and prints its message.

    By default JAX makes each process wait for the others at its end. A process that has failed and
    the others, which wait in a collective, would then wait for each other.
    """
    try:
        with _interrupt.ended_by(_end_interrupted):
            yield
    except SystemExit as error:
        if not _alone() and error.code not in (None, 0):
            fail(error.code if isinstance(error.code, int) else LOST)
        raise
    except BaseException as error:
        if _alone():
            raise
        if any(name in str(error) for name in ("Gloo", "NCCL", "coordination service")):
            time.sleep(VERDICT if _meeting is not None else 0)
            fail(LOST, f"lost another process: {error}")
        fail(LOST, f"{type(error).__name__}: {error}")
    finally:
        if _meeting is not None:
            _meeting.leave()


def fail(status: int, words: str = "") -> NoReturn:
    """Ends this process and all others of its run, with a message of one line."""
    words = " ".join(words.split())
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    if _meeting is not None:
        name = _meeting.name(_meeting.index)
        _meeting.fail(status % 256 or LOST, words and f"{name}: {words}")
    if words and not _alone():
        words = f"process {jax.process_index()} of {jax.process_count()}: {words}"
    if words:
        print(f"softjax: {words}", file=sys.stderr, flush=True)
    if not _alone():
        os._exit(status)
    sys.exit(status)


def _end_interrupted(words: str) -> None:
    """Ends all processes of a run after Ctrl-C in one of them, or in all at once."""
    if _alone():
        return
    if jax.process_index():  # process 0, if it was interrupted too, reports what was saved
        time.sleep(VERDICT)
    fail(_interrupt.STATUS, words)


def _alone() -> bool:
    return _meeting is None and not jax.distributed.is_initialized()


class Sigterm:
    """A context in which SIGTERM does not end the process but is recorded, so that it can save.

    Example:
        >>> from softjax.processes import Sigterm
        >>> with Sigterm() as sigterm:
        ...     sigterm.came()
        False
    """

    def __init__(self) -> None:
        self._came = False

    def __enter__(self) -> "Sigterm":
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def came(self) -> bool:
        """Whether SIGTERM has been received in this context."""
        return self._came

    def _note(self, *_: object) -> None:
        self._came = True
