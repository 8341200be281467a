"""Two runs of the same code do not differ, and a slower run does. The runs are simulated."""

import json

import numpy as np
import pytest

from benchmarks import __main__ as command_line
from benchmarks import compare, results

pytestmark = pytest.mark.x64_once

CASES = 60
# Standard deviations of a logarithm: of a time between two processes, of a ratio within one.
BETWEEN, WITHIN = 0.01, 0.01


def environment(**changes):
    head = {"record": "environment", "date": "2026-11-24T00:00:00", "platform": "cpu"}
    return head | {"processor": "P", "cores": 2, "versions": {"jax": "0.10.2"}} | changes


def rows(case, ratio, size=100, error=1e-7, correct=True, peer=1.0):
    head = {"record": "result", "suite": "core", "case": f"case {case}"}
    ours = {"side": "softjax", "temporary_bytes": size, "error": error, "wrong": not correct}
    theirs = {"side": "peer", "seconds": peer, "low": peer, "high": peer, "wrong": False}
    ratios = (ratio * np.exp(sign * 1.96 * WITHIN) for sign in (0, -1, 1))
    theirs |= dict(zip(("ratio", "ratio_low", "ratio_high"), ratios, strict=True))
    return [head | ours | {"seconds": ratio * peer}, head | theirs]


def run(rng, slower=(), factor=1.0, noise=BETWEEN):
    """The times of both are off by Student's t with 5 degrees of freedom: its tails are heavy."""
    ours, peers = np.exp(noise * rng.standard_t(5, size=(2, CASES)) / np.sqrt(5 / 3))
    ours[list(slower)] *= factor
    records = [row for k in range(CASES) for row in rows(k, ours[k] / peers[k], peer=peers[k])]
    return results.Run(None, environment(), records)


@pytest.mark.parametrize("noise", [BETWEEN, 0.1])
def test_nothing_is_said_of_two_runs_of_the_same_code(noise):
    for seed in range(30):
        rng = np.random.default_rng(seed)
        changes = compare.compare(run(rng, noise=noise), run(rng, noise=noise))
        assert not [change for change in changes if change.worse or change.better], seed


def test_one_case_that_is_30_percent_slower_is_found_and_nothing_else():
    found = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        changes = compare.compare(run(rng), run(rng, slower=(3,), factor=1.3))
        worse = [change.name for change in changes if change.worse]
        assert worse in ([], ["core case 3"])
        assert not any(change.better for change in changes)
        found += len(worse)
    assert found >= 18
    rng = np.random.default_rng(0)
    # Everything slower is no noise either, though it is common to all.
    changes = compare.compare(run(rng), run(rng, slower=range(CASES), factor=1.5))
    assert sum(change.worse for change in changes) > 0.9 * CASES
    assert 1.05 < compare.sensitivity(changes)["core"] < 1.5


def test_a_peer_is_beside_the_others_of_its_case():
    def timed(*times):
        head = {"record": "result", "suite": "fit", "case": "x"}
        sides = ("softjax", "peer", "other", "third")
        return [head | {"side": s, "seconds": t} for s, t in zip(sides, times, strict=True)]

    def moves(before, after):
        return compare._moves_of_peers(list(zip(before, after, strict=True)))

    # Twice as slow a machine moves no peer; one of three that is slower still has moved.
    before, after = timed(1.0, 1.0, 2.0, 4.0), timed(9.0, 2.0, 4.0, 8.0)
    assert np.abs(moves(before, after)).max() < 1e-12
    moved = moves(before, timed(9.0, 2.0, 4.0, 16.0))
    np.testing.assert_allclose(moved, [-np.log(2) / 2, -np.log(2) / 2, np.log(2)])


def test_few_figures_tell_no_noise_and_need_a_large_change():
    def one(ratio):
        return results.Run(None, environment(), rows(0, ratio))

    assert not compare.compare(one(1.0), one(1.2))[0].worse
    assert compare.compare(one(1.0), one(2.0))[0].worse


def write(path, records, **changes):
    lines = [environment(**changes), *records]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_bytes_errors_and_wrong_results_need_no_interval(tmp_path, capsys):
    before = write(tmp_path / "a", [*rows(0, 1.0), *rows(1, 1.0)])
    same = write(tmp_path / "b", [*rows(0, 1.0), *rows(1, 1.0)])
    assert command_line.main(["compare", before, same]) == 0
    assert "nothing got slower, larger or less accurate" in capsys.readouterr().out

    changed = rows(0, 1.0, size=101, error=2e-7, correct=False)
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


def test_a_compiled_program_that_moves_more_is_worse():
    def compiled(moved):
        case = {"record": "result", "suite": "aot", "case": "core/softmax", "side": "softjax"}
        costs = {"temporary_bytes": 0, "moved_bytes": moved}
        return results.Run(None, environment(platform="tpu"), [case | costs])

    (change,) = [c for c in compare.compare(compiled(100), compiled(101)) if c.worse]
    assert (change.kind, change.before, change.after) == ("bytes read and written", 100, 101)
    assert not any(c.worse for c in compare.compare(compiled(100), compiled(100)))
