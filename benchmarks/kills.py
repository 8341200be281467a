"""Random kills of a run of several processes: `python -m benchmarks.kills [--kills 200]`.

For every kill the run is begun, one of its processes is killed at a random moment, and it is
resumed to its end. Its parameters must then be those of a run that was left alone, bit for bit.
"""

import argparse
import importlib
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.environment import environment

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

worker = importlib.import_module("worker")


def main() -> int:
    """Kills, and prints what came of it; the exit status is 1 where a bit has changed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where the JSON lines go")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        cache, whole, killed = (Path(name) / part for part in ("cache", "whole", "killed"))
        for _ in range(2):  # the second finds its programs compiled
            for folder in (whole, killed):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
            begin = time.monotonic()
            worker.wait(worker.start(whole, options.processes, cache=cache), worker.ALL_DONE)
            seconds = time.monotonic() - begin
        expected = worker.result(whole)
        chance = random.Random(options.seed)
        unmet, amid, same, seconds_to_end, hung = 0, 0, 0, [], 0
        for number in range(options.kills):
            kill = None
            while kill is None:  # it ended before
                shutil.rmtree(killed)
                killed.mkdir()
                kill = worker.kill_one(killed, cache, options.processes, chance, seconds)
            unmet += not kill.met
            amid += (killed / "saved").exists()
            hung += kill.seconds is None
            seconds_to_end.append(worker.ALL_END if kill.seconds is None else kill.seconds)
            resumed = worker.start(killed, options.processes, cache=cache)
            ended = worker.wait(resumed, worker.ALL_DONE) == [0] * options.processes
            same += ended and np.array_equal(worker.result(killed), expected)
            print(f"{number + 1} killed, {same} resumed to the same bits", file=sys.stderr)
    record = {"record": "kills", "kills": options.kills, "processes": options.processes}
    record |= {
        "before_they_met": unmet,
        "amid_training": amid,
        "slowest_end_seconds": max(seconds_to_end),
        "hung": hung,
        "resumed_to_the_same_bits": same,
    }
    lines = "".join(json.dumps(line) + "\n" for line in (environment(), record))
    print(lines, end="")
    if options.out:
        options.out.write_text(lines)
    return int(same < options.kills or hung > 0)


if __name__ == "__main__":
    sys.exit(main())
