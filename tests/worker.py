"""What the processes of the tests run. They are forked from one that has imported everything."""

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax

from softjax import checkpoints, datasets, launch, processes, streaming

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["worker", "orbax.checkpoint", "jax.experimental.multihost_utils"])
STEPS, EVERY = 48, 8
# Seconds that a fault may take to end all, and a run on a machine that is busy.
ALL_END, ALL_DONE = 15, 120


def start(folder, count, **options):
    """The processes of a run, each with its words in a file of `folder`."""
    address = launch.free_address()
    running = []
    for old in Path(folder).glob("met-*"):
        old.unlink()
    for index in range(count):
        arguments = (Path(folder), address if count > 1 else None, count, index)
        running.append(CONTEXT.Process(target=work, args=arguments, kwargs=options))
        running[-1].start()
    return running


def wait(running, seconds):
    """Their exit codes; None for one that had to be killed after so many seconds."""
    last = time.monotonic() + seconds
    for process in running:
        process.join(max(last - time.monotonic(), 0))
    codes = [process.exitcode for process in running]
    for process in running:
        process.kill()
        process.join()
    return codes


def have_met(folder, count):
    """Whether the processes of the run know of each other."""
    return len(list(Path(folder).glob("met-*"))) == count


class Kills(NamedTuple):
    """What came of kills: how many met nobody, how many a run in progress; the slowest end."""

    unmet: int
    amid: int
    slowest: float
    results: list
    hung: int


def kill_at_random(folder, cache, kills, count, seconds, seed=0):
    """Starts a run again and again, and kills one of its processes within so many seconds.

    A run that came to its end all the same is begun anew; the last is left alone.
    """
    chance, unmet, amid, slowest, results, hung = random.Random(seed), 0, 0, 0.0, [], 0
    for _ in range(kills):
        running = start(folder, count, cache=cache)
        time.sleep(chance.uniform(0, seconds))
        chance.choice(running).kill()
        begin = time.monotonic()
        # Before they have met nobody can know of it, but for who started them.
        met = have_met(folder, count)
        codes = wait(running, ALL_END if met else 0)
        if met:
            slowest = max(slowest, time.monotonic() - begin)
            hung += None in codes
        else:
            unmet += 1
        if (folder / "params.npz").exists():
            results.append(result(folder))
            shutil.rmtree(folder)
            folder.mkdir()
        else:
            amid += met and (folder / "saved").exists()
    assert wait(start(folder, count, cache=cache), ALL_DONE) == [0] * count
    return Kills(unmet, amid, slowest, [*results, result(folder)], hung)


def result(folder):
    """The parameters of a run that has ended."""
    with np.load(folder / "params.npz") as saved:
        assert saved["step"] == STEPS
        return np.concatenate([saved["arr_0"], saved["arr_1"][None]])


def words(folder):
    return "".join(path.read_text() for path in sorted(Path(folder).glob("words-*")))


def work(folder, address, count, index, cache, **options):
    output = os.open(folder / f"words-{index}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    with processes.ending_together():
        processes.start(address, count, index)
        (folder / f"met-{index}").touch()
        with processes.Sigterm() as sigterm:
            run(folder, index, sigterm, **options)
        processes.gather(None)
    sys.stdout.flush()
    if count > 1:
        jax.distributed.shutdown()


def run(folder, index, sigterm, fault=(None, None, None)):
    """SGD on the digits; `fault` is what happens, at which step, to which process."""
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
                if what == "preempted":
                    os.kill(os.getpid(), signal.SIGTERM)
            return batch

    with contextlib.suppress(streaming.Preempted):
        result = streaming.train(
            Faulty(rows, 128, buffer_bytes=1 << 17),
            num_classes=10,
            # Not Adam, which divides by the gradient and so by what is rounding where it is 0.
            optimizer=optax.sgd(0.5, momentum=0.9),
            steps=STEPS,
            every=EVERY,
            l2=1e-4,
            checkpoints=checkpoints.Checkpoints(folder / "saved", {"l2": 1e-4}),
            preempted=sigterm.came,
        )
        if index == 0:
            np.savez(folder / "params.npz", *result.params, step=result.steps)
