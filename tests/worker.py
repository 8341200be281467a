"""The processes of the tests, which are forked from a process that has imported everything."""

import contextlib
import functools
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax

from softjax import _meeting, checkpoints, datasets, launch, processes, streaming
from softjax._platforms import tracing_for
from softjax.tables._npy import NpyRows

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["worker", "orbax.checkpoint", "jax.experimental.multihost_utils"])
STEPS, EVERY = 48, 8
# Seconds that a fault may take to end all, and a run on a machine that is busy.
ALL_END, ALL_DONE = 15, 120
PATIENCE = 60


@functools.cache
def start_server():
    """Starts the process from which all are forked, with the `sys.path` of this one.

    Python 3.11 and 3.12 leave it out, and so each process would import this module again.
    """
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    multiprocessing.forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def start(folder, count, **options):
    """Starts the processes of a run; each writes its output to a file in `folder`."""
    start_server()
    address = launch.free_address()
    running = []
    for old in Path(folder).glob("met-*"):
        old.unlink()
    for index in range(count):
        arguments = (Path(folder), address if count > 1 else None, count, index)
        running.append(CONTEXT.Process(target=work, args=arguments, kwargs=options))
        running[-1].start()
    return running


def start_meeting(folder, *acts):
    """Starts processes that only meet; `acts` says what each of them does, as in `meet`."""
    start_server()
    address = launch.free_address()
    running = []
    for index, act in enumerate(acts):
        arguments = (Path(folder), address, len(acts), index, act)
        running.append(CONTEXT.Process(target=meet, args=arguments))
        running[-1].start()
    return running


def wait(running, seconds):
    """The exit codes; None for each process that had to be killed after this many seconds."""
    last = time.monotonic() + seconds
    for process in running:
        process.join(max(last - time.monotonic(), 0))
    codes = [process.exitcode for process in running]
    for process in running:
        process.kill()
        process.join()
    return codes


def wait_from_meeting(folder, running):
    """The exit codes; None for each process that runs ALL_END seconds after all had met."""
    last = time.monotonic() + ALL_DONE
    while not have_met(folder, len(running)) and time.monotonic() < last:
        if any(process.exitcode is not None for process in running):
            break  # before the last had said that it had met the others
        time.sleep(0.05)
    return wait(running, ALL_END)


def have_met(folder, count):
    """Whether all processes of the run have met."""
    return len(list(Path(folder).glob("met-*"))) == count


class Kill(NamedTuple):
    """The result of a kill: whether all had met; seconds until all ended, None if one hung."""

    met: bool
    seconds: float | None


def kill_one(folder, cache, count, chance, within):
    """Starts or resumes a run, and kills one of its processes within this many seconds.

    None if the run had ended before.
    """
    # If a process is killed before it reaches the others, nobody can know it.
    running = start(folder, count, cache=cache, patience=4)
    time.sleep(chance.uniform(0, within))
    if (folder / "params.npz").exists():
        assert wait(running, ALL_DONE) == [0] * count
        return None
    chance.choice(running).kill()
    begin = time.monotonic()
    met = have_met(folder, count)
    codes = wait(running, ALL_END)
    return Kill(met, None if None in codes else time.monotonic() - begin)


def result(folder):
    """The parameters of a finished run."""
    with np.load(folder / "params.npz") as saved:
        assert saved["step"] == STEPS
        return np.concatenate([saved["arr_0"], saved["arr_1"][None]])


def words(folder):
    return "".join(path.read_text() for path in sorted(Path(folder).glob("words-*")))


def into_words(folder, index):
    """Redirects the output of the process to its file."""
    output = os.open(folder / f"words-{index}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)


def die_waiting(folder, address, count, index):
    """Connects to process 0, or as process 0 accepts a connection, and dies before all have met."""
    place = "127.0.0.1", int(address.split(":")[1])
    if index == 0:
        connection, _ = socket.create_server(place).accept()
        connection.recv(_meeting.HELLO.size)
    else:
        connection = _meeting._connected(place, time.monotonic() + PATIENCE)
        connection.sendall(_meeting.HELLO.pack(_meeting.NAME, count, index))
    (folder / "gone").touch()
    os._exit(9)


def meet(folder, address, count, index, act):
    into_words(folder, index)
    if act == "come late":
        while not (folder / "gone").exists():
            time.sleep(0.01)
        time.sleep(0.2)
    if act == "of five":
        count = 5
    if act == "as process 2":
        index = 2
    if act == "die waiting":
        die_waiting(folder, address, count, index)
    if act == "never come":
        return
    patience = 1 if act in ("come late", "have no patience") else PATIENCE
    meeting = _meeting.Meeting(address, count, index, patience)
    if act == "die":
        os._exit(9)
    if act == "fail":
        meeting.fail(3, "the disk is gone")
    if act == "wait":  # as for the runtime of JAX, that waits for the others
        time.sleep(PATIENCE)
    meeting.leave()


def work(folder, address, count, index, cache, patience=PATIENCE, devices=1, **options):
    into_words(folder, index)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    with processes.ending_together():
        processes.start(address, count, index, patience)
        (folder / f"met-{index}").touch()
        with processes.Sigterm() as sigterm, tracing_for("cpu"):
            run(folder, index, sigterm, **options)
        processes.gather(None)
    sys.stdout.flush()
    if count > 1:
        jax.distributed.shutdown()


def write_digits(folder, count):
    """Writes the digits to files, a copy for each process, as on the disks of several machines."""
    digits = datasets.load_digits()
    for index in range(count):
        np.save(folder / f"x-{index}.npy", digits.train_features)
        np.save(folder / f"y-{index}.npy", digits.train_labels)


class Copies(NpyRows):
    """Files of which each process has its own copy, with the same fingerprint."""

    @property
    def fingerprint(self):
        return dict(zip(("x", "y"), super().fingerprint.values(), strict=True))


def run(folder, index, sigterm, fault=(None, None, None), saved="saved"):
    """Trains with Adam on the digits; `fault` is the event, its step and its process."""
    own = folder / f"x-{index}.npy"
    if own.exists():
        rows = Copies(own, str(folder / f"y-{index}.npy"))
    else:
        digits = datasets.load_digits()
        rows = streaming.ArrayRows(digits.train_features, digits.train_labels)
    what, at, who = fault

    class Faulty(streaming.Batches):
        def read(self, step, out=None):
            batch = super().read(step, out)
            if (step, index) == (at, who):
                if what == "error":
                    raise RuntimeError("the disk is gone")
                if what == "nan":
                    batch.features[2, 5] = np.nan
                if what == "full":
                    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, -1))
                if what == "cut":
                    os.truncate(own, own.stat().st_size // 2)
                if what == "preempted":
                    os.kill(os.getpid(), signal.SIGTERM)
            return batch

    with contextlib.suppress(streaming.Preempted):
        result = streaming.train(
            Faulty(rows, 128, buffer_bytes=1 << 17),
            num_classes=10,
            # It divides by the gradient, and so shows what is rounding where that is 0.
            optimizer=optax.adam(0.01),
            steps=STEPS,
            every=EVERY,
            l2=1e-4,
            checkpoints=checkpoints.Checkpoints(folder / saved, {"l2": 1e-4}),
            preempted=sigterm.came,
        )
        if index == 0:
            np.savez(folder / "params.npz", *result.params, step=result.steps)
