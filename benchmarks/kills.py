"""The suite `kills`: runs of several processes, one of which is killed at a random moment.

Each killed run is resumed to its end. Its parameters must then have the bits of an uninterrupted
run.
"""

import importlib
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.environment import ROOT
from benchmarks.measure import PAIRS
from benchmarks.results import Row

KILLS, QUICK_KILLS = 200, 4


@dataclass(frozen=True)
class Case:
    """The number of processes, which train together."""

    processes: int = 2
    seed: int = 0
    name: str = "resumed"

    def run(self, pairs: int) -> Iterator[Row]:
        """One row; the checks are that no process hung, and that no bit changed."""
        sys.path.insert(0, str(ROOT / "tests"))
        worker = importlib.import_module("worker")
        kills = QUICK_KILLS if pairs < PAIRS else KILLS
        with tempfile.TemporaryDirectory() as folder:
            cache, whole, killed = (Path(folder) / part for part in ("cache", "whole", "killed"))
            for _ in range(2):  # the second run finds its programs compiled
                for part in (whole, killed):
                    shutil.rmtree(part, ignore_errors=True)
                    part.mkdir()
                begin = time.monotonic()
                worker.wait(worker.start(whole, self.processes, cache=cache), worker.ALL_DONE)
                seconds = time.monotonic() - begin
            expected = worker.result(whole)
            chance = random.Random(self.seed)
            unmet, amid, same, ends, hung = 0, 0, 0, [], 0
            for number in range(kills):
                kill = None
                while kill is None:  # the run ended before the kill
                    shutil.rmtree(killed)
                    killed.mkdir()
                    kill = worker.kill_one(killed, cache, self.processes, chance, seconds)
                unmet += not kill.met
                amid += (killed / "saved").exists()
                hung += kill.seconds is None
                ends.append(worker.ALL_END if kill.seconds is None else kill.seconds)
                resumed = worker.start(killed, self.processes, cache=cache)
                ended = worker.wait(resumed, worker.ALL_DONE) == [0] * self.processes
                same += ended and np.array_equal(worker.result(killed), expected)
                print(f"{number + 1} killed, {same} resumed to the same bits", file=sys.stderr)
        yield {
            "side": "softjax",
            "kills": kills,
            "processes": self.processes,
            "before_they_met": unmet,
            "amid_training": amid,
            "slowest_end_seconds": max(ends),
            "hung": hung,
            "resumed_to_the_same_bits": same,
            "checks": {"runs that hung": [hung, 0], "runs of other bits": [kills - same, 0]},
        }


CASES = (Case(),)
