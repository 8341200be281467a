"""Random kills of a run of several processes: `python -m benchmarks.kills [--kills 200]`.

The run is started, one of its processes is killed at a random moment, and it is started again.
Whenever it comes to its end it is begun anew, and its parameters must be those of a run that was
left alone, bit for bit.
"""

import argparse
import importlib
import json
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
        numbers = (options.kills, options.processes, seconds, options.seed)
        kills = worker.kill_at_random(killed, cache, *numbers)
        expected = worker.result(whole)
    same = sum(np.array_equal(got, expected) for got in kills.results)
    record = {"record": "kills", "kills": options.kills, "processes": options.processes}
    record |= {
        "before_they_met": kills.unmet,
        "amid_training": kills.amid,
        "slowest_end_seconds": kills.slowest,
        "hung": kills.hung,
        "runs_ended": len(kills.results),
        "runs_with_the_same_bits": same,
    }
    lines = "".join(json.dumps(line) + "\n" for line in (environment(), record))
    print(lines, end="")
    if options.out:
        options.out.write_text(lines)
    return int(same < len(kills.results) or kills.hung > 0)


if __name__ == "__main__":
    sys.exit(main())
