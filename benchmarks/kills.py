"""Random kills of a run of several processes: `python -m benchmarks.kills [--kills 200]`.

The run is started, one of its processes is killed at a random moment, and it is started again,
until so many have been killed; then it may end. Its parameters must be those of a run that was
left alone, bit for bit.
"""

import argparse
import importlib
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

worker = importlib.import_module("worker")

ALL_END, ALL_DONE = 15, 300


def main() -> int:
    """Kills, and prints what came of it; the exit status is 1 where a bit has changed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = folder / "cache"
        for run in ("whole", "killed"):
            (folder / run).mkdir()
        begin = time.monotonic()
        count = options.processes
        codes = worker.wait(worker.start(folder / "whole", count, cache=cache), ALL_DONE)
        seconds = time.monotonic() - begin
        chance, slowest, unmet, finished = random.Random(options.seed), 0.0, 0, 0
        for _ in range(options.kills):
            running = worker.start(folder / "killed", count, cache=cache)
            time.sleep(chance.uniform(0, seconds))
            chance.choice(running).kill()
            killed = time.monotonic()
            met = worker.have_met(folder / "killed", count)
            ended = worker.wait(running, ALL_END if met else 0)
            unmet += not met
            finished += (folder / "killed" / "params.npz").exists()
            if met:
                slowest = max(slowest, time.monotonic() - killed)
                codes += [code is None for code in ended]
        codes += worker.wait(worker.start(folder / "killed", count, cache=cache), ALL_DONE)
        whole, again = (np.load(folder / run / "params.npz") for run in ("whole", "killed"))
        same = all(np.array_equal(whole[part], again[part]) for part in whole.files)
    print(
        f"{options.kills} kills, {unmet} before the processes had met, {finished} after the run "
        f"was done; the others ended within {slowest:.1f} s; the same bits: {same}."
    )
    return int(not same or any(codes))


if __name__ == "__main__":
    sys.exit(main())
