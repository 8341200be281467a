"""Two runs of the same code do not differ; one that is slower does. Runs are made up, seeded."""

import json

import numpy as np
import pytest

from benchmarks import __main__ as command_line
from benchmarks import compare, results

pytestmark = pytest.mark.x64_once

CASES = 60
BETWEEN, WITHIN = 0.05, 0.02  # standard deviations of log(ratio), between runs and within


def environment(**changes):
    head = {"record": "environment", "date": "2026-11-24T00:00:00", "platform": "cpu"}
    return head | {"processor": "P", "cores": 2, "versions": {"jax": "0.10.2"}} | changes


def record(case, ratio, size=100, error=1e-7, correct=True, width=WITHIN):
    interval = {"low": ratio * np.exp(-1.96 * width), "high": ratio * np.exp(1.96 * width)}
    softjax = {"name": "softjax", "temporary_bytes": size, "error": error, "correct": correct}
    seconds = {"median": ratio, "low": ratio, "high": ratio}
    peer = {"name": "peer", "seconds": seconds, "correct": True}
    timed = {"ratio": {"median": ratio} | interval}
    sides = {"softjax": softjax | {"seconds": seconds}, "peer": peer}
    return {"record": "result", "suite": "core", "case": f"case {case}"} | sides | timed


def run(rng, slower=(), factor=1.0):
    # Student's t with 5 degrees of freedom, scaled to the standard deviation.
    tails = rng.standard_t(5, size=CASES) / np.sqrt(5 / 3)
    ratios = np.exp(np.hypot(BETWEEN, WITHIN) * tails)
    ratios[list(slower)] *= factor
    records = [record(case, ratio) for case, ratio in enumerate(ratios)]
    return results.Run(None, environment(), records)


def test_the_same_code_is_called_slower_in_one_of_twenty_comparisons_at_most():
    rng = np.random.default_rng(0)
    alarms = sum(
        any(change.worse for change in compare.compare(run(rng), run(rng))) for _ in range(100)
    )
    assert alarms <= 5


def test_what_is_twice_as_slow_is_found_and_nothing_else():
    rng = np.random.default_rng(1)
    changes = compare.compare(run(rng), run(rng, slower=(3, 5), factor=2.0))
    assert [change.name for change in changes if change.worse] == ["core case 3", "core case 5"]
    assert not any(change.better for change in changes)
    # Everything twice as slow is no noise either, though it is common to all.
    changes = compare.compare(run(rng), run(rng, slower=range(CASES), factor=2.0))
    assert sum(change.worse for change in changes) > CASES / 2


def test_few_figures_tell_no_noise_and_need_a_large_change():
    def one(ratio):
        return results.Run(None, environment(), [record(0, ratio)])

    assert not compare.compare(one(1.0), one(1.2))[0].worse
    assert compare.compare(one(1.0), one(2.0))[0].worse


def write(path, records, **changes):
    lines = [environment(**changes), *records]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_bytes_errors_and_wrong_results_need_no_interval(tmp_path, capsys):
    before = write(tmp_path / "a", [record(0, 1.0), record(1, 1.0)])
    same = write(tmp_path / "b", [record(0, 1.0), record(1, 1.0)])
    assert command_line.main(["compare", before, same]) == 0
    assert "nothing got slower, larger or less accurate" in capsys.readouterr().out

    changed = [record(0, 1.0, size=101, error=2e-7, correct=False)]
    after = write(tmp_path / "c", changed, cores=4, versions={"jax": "0.11.0"})
    assert command_line.main(["compare", before, after]) == 1
    printed = capsys.readouterr().out
    for line in ("temporary bytes", "error", "wrong results", "3 got worse"):
        assert line in printed
    assert "differs: cores: 2 -> 4" in printed
    assert "differs: jax: 0.10.2 -> 0.11.0" in printed
    assert "missing in the second: core case 1 peer" in printed
    assert command_line.main(["compare", after, before]) == 0
    assert "Better" in capsys.readouterr().out
