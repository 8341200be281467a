"""Many processes: how they find each other, agree, and end together."""

import contextlib
import os
import pickle
import signal
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# A process that is gone is noticed after HEARTBEAT seconds at the latest, where no collective
# notices it before.
HEARTBEAT = 10
SHUTDOWN = 10
# Before all have met nobody knows who is missing: machines may start minutes apart.
PATIENCE = 300
FAILED = 70


def start(
    coordinator: str | None, count: int | None, index: int | None, patience: int = PATIENCE
) -> None:
    """Joins the processes of a run; must come before anything else of JAX.

    Args:
        coordinator: HOST:PORT, reachable by all, at which process 0 listens; "auto" for what JAX
            detects, as under Slurm, Open MPI and Kubernetes; None for one process alone.
        count: the number of processes; None for what JAX detects.
        index: of this one, from 0; None for what JAX detects.
        patience: seconds to wait for the others.

    Raises:
        RuntimeError: the others did not come.
    """
    if coordinator is None:
        return
    # `Sigterm` is what hears it, and the steps themselves carry it to the others.
    jax.config.update("jax_enable_preemption_service", False)
    address = None if coordinator == "auto" else coordinator
    loopback = address is not None and address.split(":")[0] in ("127.0.0.1", "localhost")
    jax.distributed.initialize(
        address,
        count,
        index,
        coordinator_bind_address=address if loopback else None,
        initialization_timeout=patience,
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=SHUTDOWN,
    )


def gather(value: Any) -> list[Any]:
    """What every process gives, in the order of the processes: the same list on each of them."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.array([data.size], np.int32)))
    length = max(1 << int(sizes.max() - 1).bit_length(), 1024)  # few lengths, few programs
    padded = np.pad(data, (0, length - data.size))
    rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def of_first(function: Any) -> Any:
    """What `function` gives on process 0; where it raises there, it raises everywhere."""
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
    """Ends this process at once where it fails, so that the others notice and end too.

    A process that waits for the others at its end, as JAX makes it, would wait for the very ones
    that wait for it.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        code = error.code if isinstance(error, SystemExit) else FAILED
        if not isinstance(error, SystemExit):
            who = f"process {jax.process_index()} of {jax.process_count()}"
            print(f"softjax: {who}: {_in_words(error)}", file=sys.stderr)
        if code not in (None, 0):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else FAILED)
        raise


class Sigterm:
    """Whether SIGTERM came, in place of its ending the process: a warning to save what there is.

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
        """Whether SIGTERM came since."""
        return self._came

    def _note(self, *_: object) -> None:
        self._came = True


def _in_words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if any(name in text for name in ("Gloo", "NCCL", "coordination service")):
        return f"lost another process, which has ended ({text[:200]})"
    return f"{type(error).__name__}: {text}"
