"""Run softjax in several processes on this machine: `python -m softjax.launch -n 2 -- fit ...`.

Every process runs `softjax` with the arguments after `--`. If any process fails, the others are
ended, and one line says which process failed and how. Ctrl-C and SIGTERM are passed on to all.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from softjax import _interrupt
from softjax._meeting import LAUNCHER

__all__ = ["end", "free_address", "main", "start", "wait"]

# Seconds in which a process may end by itself after another has ended.
PATIENCE = 5.0
PAUSE = 0.05


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the processes; returns the exit status of the first failure, 128 + n after signal n."""
    parser = argparse.ArgumentParser(prog="python -m softjax.launch", description=__doc__)
    parser.add_argument("-n", type=int, required=True, metavar="N", help="number of processes")
    parser.add_argument(
        "arguments",
        nargs="+",
        metavar="-- ARGUMENT",
        help="arguments of softjax, after --: -- fit data.npy ...",
    )
    options = parser.parse_args(arguments)
    if options.n < 1:
        parser.error("-n must be 1 or more")
    running: list[subprocess.Popen[bytes]] = []
    interrupted = False

    def pass_on(number: int, frame: object) -> None:
        nonlocal interrupted
        interrupted = interrupted or number == signal.SIGINT
        for process in running:
            if process.poll() is None:
                process.send_signal(number)

    before = [signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)]
    _interrupt.uninstall()
    try:
        running += start([sys.executable, "-m", "softjax", *options.arguments], options.n)
        if interrupted:  # while the processes were started
            pass_on(signal.SIGINT, None)
        return wait(running)
    finally:
        end(running, 0)
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)
        _interrupt.finish()


def start(command: Sequence[str], count: int) -> list[subprocess.Popen[bytes]]:
    """Starts a command `count` times, as the processes of one run.

    Each process is in its own process group. Ctrl-C on a terminal then reaches only the launcher,
    which passes it on once. The processes start with SIGINT blocked, and unblock it when their
    handler is ready.
    """
    shared = {"JAX_COORDINATOR_ADDRESS": free_address(), "JAX_NUM_PROCESSES": str(count)}
    # softjax prints the reason for the end of a run once; the runtime would print it again in every
    # process. JAX has set level 1, unless the user has set another one.
    level = os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1")
    shared["TF_CPP_MIN_LOG_LEVEL"] = "3" if level == "1" else level
    # Each process gets one GPU, if there are GPUs.
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    # Nothing is ever written to this pipe. The processes read its end when this process ends.
    reading, _ = os.pipe()
    shared[LAUNCHER] = str(reading)
    running = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    for index in range(count):
        own = {"JAX_PROCESS_ID": str(index), "CUDA_VISIBLE_DEVICES": devices[index % len(devices)]}
        environment = os.environ | shared | own
        running.append(
            subprocess.Popen(command, env=environment, pass_fds=[reading], process_group=0)
        )
    os.close(reading)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return running


def free_address() -> str:
    """A HOST:PORT of this machine at which no process listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def wait(running: Sequence[subprocess.Popen[bytes]]) -> int:
    """Waits until all processes have ended, or until one fails; then it ends the others."""
    while True:
        codes = [process.poll() for process in running]
        failed = [(index, code) for index, code in enumerate(codes) if code]
        if failed:
            break
        if None not in codes:
            return 0
        time.sleep(PAUSE)
    # JAX aborts processes that have lost another one, so a process with another end is the cause.
    index, code = min(failed, key=lambda entry: (entry[1] == -signal.SIGABRT, entry[1]))
    end(running, PATIENCE)
    if code == _interrupt.STATUS:  # process 0 has printed the message
        return code
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    others = "" if len(running) == 1 else "; the others were ended"
    print(f"softjax.launch: process {index} {how}{others}.", file=sys.stderr)
    return 128 - code if code < 0 else code


def end(running: Sequence[subprocess.Popen[bytes]], patience: float) -> None:
    """Kills the processes that do not end by themselves within `patience` seconds."""
    last = time.monotonic() + patience
    while time.monotonic() < last and any(process.poll() is None for process in running):
        time.sleep(PAUSE)
    for process in running:
        if process.poll() is None:
            process.kill()
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
