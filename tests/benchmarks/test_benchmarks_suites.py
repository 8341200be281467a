"""Each suite from its command to its page, on a tiny problem, and the special cases of each suite.

No time is asserted.
"""

import re
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import create_autospec

import jax
import numpy as np
import oracles
import pytest

from benchmarks import __main__ as command_line
from benchmarks import (
    core,
    estimator,
    fit_tasks,
    fits,
    fused,
    inference,
    kills,
    measure,
    peers,
    report,
    results,
    roofline,
    scale,
    stream,
    wire,
)
from benchmarks.suites import SUITES
from softjax import regression
from tests.regression.test_regression import D, K, problem

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once]

CEILINGS = {"record": "ceilings", "bytes_per_second": 1e10, "flops_per_second": {"float32": 1e11}}
HEAD = fused.Shape("tiny", 8, 3, 5, "float32", "no model")
TINY = {
    "core": [
        *(
            core.Case(operation, "eager", core.Shape("tiny", 8, 5, "no model"), bound=1e9)
            for operation in ("log_softmax", "distribution_cross_entropy")
        ),
        core.Import(bound=1e9),
    ],
    # One beside a peer with both bounds, one second derivative, one without a peer.
    "fused": [replace(fused.CASES[k], shape=HEAD, quick=True) for k in (0, 3, 4)],
    "fit": [fits.FIT[0]],
    "many": list(fits.MANY),
    "cold": list(fits.COLD),
    "tables": [
        estimator.Case("digits", partial(estimator.estimator, "digits"), 1e9, 1e9),
        estimator.Case("probe", partial(estimator.probe, 40, 3, 3), 1e9),
        estimator.Case("csr", partial(estimator.csr, "lbfgs", 1e-6, (40, 30, 3)), 1e9, once=True),
    ],
    "inference": [
        inference.Case("fit", (60, 2, 3)),
        inference.Case("marginal-effects", (60, 2, 3), bound=1e9),
    ],
    "scale": [replace(case, shape=(16, 8, 32)) for case in scale.CASES if case.program == "loss"],
    "stream": [stream.Case(gigabytes=2e-4, rows=32, pairs=1, quick=True)],
}
# How many rows a suite has, and the sides of its first case.
SCIKIT_LEARN = [f"scikit-learn {name}" for name in fits.PEERS]
EXPECTED = {
    "core": (6, ["softjax", "jax.nn"]),
    "fused": (5, ["softjax", "plain"]),
    "fit": (4, ["softjax", *SCIKIT_LEARN]),
    "many": (8, ["softjax", *SCIKIT_LEARN]),
    "cold": (8, ["softjax", *SCIKIT_LEARN]),
    "tables": (6, ["softjax", "softjax.regression"]),
    "inference": (4, ["softjax", "statsmodels"]),
    "scale": (4, ["softjax"]),
    "stream": (2, ["softjax", "in memory"]),
}


def as_fits(theta):
    return SimpleNamespace(params=(theta[..., :-1, :], theta[..., -1, :]))


@pytest.fixture
def tiny(monkeypatch):
    """Problems that take no time, and processes that are none where starting one takes long."""

    def digits():
        (x, y), (more, others) = problem(), problem(1)
        return np.concatenate([x, more[:2]]), np.concatenate([y, others[:2]])

    def process_times(command, environment):
        monkeypatch.setattr(sys, "argv", ["-c", *command[3:]])
        exec(command[2], {})
        return (3.0, 3.0) if command[2] == fits.SOFTJAX else (2.0, 2.0)

    def resampled(x, y, *, resamples, l2, tol):
        return SimpleNamespace(resamples=as_fits(bootstrap.solve(SCIKIT_LEARN[2], tol)))

    def path_of(x, y, *, l2, folds, tol):
        theta = path.solve(SCIKIT_LEARN[2], tol).reshape(2, fit_tasks.FOLDS, D + 1, K)
        return SimpleNamespace(cross_validation=SimpleNamespace(fits=as_fits(theta)))

    for suite, cases in TINY.items():
        monkeypatch.setitem(SUITES, suite, cases)
    monkeypatch.setattr(roofline, "ceilings", lambda: CEILINGS)
    monkeypatch.setattr(fit_tasks, "digits", digits)
    monkeypatch.setattr(fits, "QUICK_REPEATS", 1)
    monkeypatch.setattr(fit_tasks, "RESAMPLES", 3)
    monkeypatch.setattr(fit_tasks, "INVERSE_PENALTIES", np.array([0.1, 10.0]))
    monkeypatch.setattr(fits, "peaks", lambda *_: {"first_peak_bytes": 2, "peak_bytes": 1})
    monkeypatch.setattr(stream, "BATCH", 4)
    monkeypatch.setattr(measure, "QUICK_PAIRS", 2)
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 1e-4)

    def here(function, *arguments, environment=None):
        return function(*arguments)

    monkeypatch.setattr(measure, "elsewhere", here)
    # A process that imports nothing takes a tenth of the time.
    monkeypatch.setattr(core, "OURS", "import json")
    monkeypatch.setattr(core, "PEER", "pass")
    monkeypatch.setattr(core, "MOST_PAIRS", 2)
    with jax.enable_x64(True):
        bootstrap, path = fit_tasks.bootstrap("float64"), fit_tasks.path("float64")
    # tests/regression/test_regression_many.py proves what these return after seconds of compiling.
    for name, function in (("bootstrap", resampled), ("fit_path", path_of)):
        spec = create_autospec(getattr(regression, name), side_effect=function)
        monkeypatch.setattr(regression, name, spec)
    return process_times


@pytest.mark.parametrize("suite", TINY)
def test_a_suite_runs_and_its_rows_are_printed_and_drawn(
    suite, tiny, monkeypatch, tmp_path, capsys
):
    if suite == "cold":
        monkeypatch.setattr(measure, "process_times", tiny)
    out = tmp_path / "run.jsonl"
    with jax.enable_x64(suite in ("fit", "cold")):
        assert command_line.main(["run", suite, "--quick", "--out", str(out)]) == 0
    run = results.read(out)
    assert run.environment["suite"] == suite
    assert not run.failures()
    rows = run.rows(suite)
    count, sides = EXPECTED[suite]
    assert len(rows) == count
    assert [row["side"] for row in rows if row["case"] == rows[0]["case"]] == sides
    assert not any(row["wrong"] for row in rows if "wrong" in row)
    for row in rows:
        if suite in ("fit", "many", "cold"):
            assert row["suboptimality"] <= 1e-8
        if results.is_softjax(row) and suite != "scale":
            assert row.get("seconds", 1) > 0
        elif suite != "scale":
            assert row["ratio"] > 0 or suite == "many"
    if suite == "cold":
        assert {row["ratio"] for row in rows if "ratio" in row} == {1.5}
    printed = capsys.readouterr().out
    assert re.search(rf"^{suite}: (no bound|\d+ of \d+ bounds met)", printed, re.MULTILINE)
    section, runs = report.sections([run])
    assert (section.title, len(section.rows)) == (suite, len(rows))
    assert all(picture.startswith("<svg") for _, picture in section.draw())
    assert runs.title == "Runs"


def test_a_wrong_result_is_reported_and_not_timed(monkeypatch):
    monkeypatch.setitem(fused.PEERS, "plain", lambda h, w, y: fused.plain(h, w, (y + 1) % 5))
    ours, peer = fused.Case("value", HEAD, "plain", time=1.0).run(pairs=1)
    assert ours["wrong"]
    assert "ratio" not in peer
    assert results.missed(peer) == ["time"]

    away = SimpleNamespace(params=np.ones((3, 2)))
    monkeypatch.setattr(inference, "_solved", lambda model: away)
    ours, peer = TINY["inference"][0].run(pairs=1)
    assert (ours["wrong"], peer["wrong"]) == (False, True)
    assert "ratio" not in peer
    monkeypatch.setattr(peers.Implementation, "absence", "not installed")
    assert list(TINY["inference"][0].run(pairs=1)) == []


def test_every_side_of_fused_is_the_loss_in_float64(monkeypatch):
    monkeypatch.setattr(fused, "CHUNK", 4)
    hidden, kernel, labels = fused.inputs(HEAD)
    logits = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
    expected = oracles.cross_entropy(logits, labels).mean()
    for loss in (fused.fused, *fused.PEERS.values()):
        np.testing.assert_allclose(jax.jit(loss)(hidden, kernel, labels), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="unknown mode 'hessian'"):
        fused.in_mode(fused.plain, "hessian")


def test_only_a_peer_that_may_be_the_fastest_is_timed_again():
    solvers = [
        fits.Solver(name, tol, times=[(cpu, cpu)])
        for name, tol, cpu in (
            ("softjax", 1.0, 9.0),
            ("a", 1.0, 1.0),
            ("b", 1.0, 1.9),
            ("c", 1.0, 3.0),
        )
    ]
    solvers.append(fits.Solver("never"))
    order = []

    def run(name, tol):
        order.append(name)
        return 0.5, 0.5

    fits._take_turns(run, solvers, 2, everybody=False)
    assert order == ["softjax", "a", "b", "b", "a", "softjax"]
    assert [len(solver.times) for solver in solvers] == [2, 2, 2, 1, 0]


def test_a_process_is_timed_to_its_end_and_one_that_fails_is_said():
    cpu, wall = measure.process_times([sys.executable, "-c", "sum(range(3_000_000))"])
    assert 0 < cpu < 10
    assert 0 < wall < 60
    with pytest.raises(RuntimeError, match="must end with 0, got 3"):
        measure.process_times([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(RuntimeError, match="bytes_asked failed: "):
        measure.elsewhere(measure.bytes_asked, "no error", "and one too many")


def test_a_fit_in_a_process_of_its_own_tells_its_memory(tmp_path):
    x = np.random.default_rng(0).normal(size=(4000, 300))
    y = (x[:, :3] + x[:, 3:6]).argmax(1)
    task = fit_tasks.Task(x, y, np.array([0.01]), None, None)
    found = fits._peaks(fits.Solver("softjax", tol=1e-4), task, tmp_path)
    first, following = found["first_peak_bytes"], found["peak_bytes"]
    assert x.nbytes / 2 <= following <= first < 2**30  # a copy in float32


def test_kills_are_counted(monkeypatch):
    class Worker:
        ALL_DONE, ALL_END = 1, 2
        start, result = staticmethod(lambda *_, **__: None), staticmethod(lambda _: np.ones(2))
        wait = staticmethod(lambda *_: [0, 0])
        ends = iter(
            [None, SimpleNamespace(met=True, seconds=1.0)]
            + 9 * [SimpleNamespace(met=False, seconds=None)]
        )
        kill_one = staticmethod(lambda *_: next(Worker.ends))

    monkeypatch.setitem(sys.modules, "worker", Worker)
    (row,) = kills.Case().run(pairs=1)
    assert (row["kills"], row["hung"], row["before_they_met"]) == (4, 3, 3)
    assert row["resumed_to_the_same_bits"] == 4
    assert results.missed(row) == ["runs that hung"]


@pytest.mark.parametrize("case", scale.CASES[3:6], ids=lambda case: case.name)
def test_a_case_of_scale_gives_the_results_of_one_device(case, monkeypatch):
    monkeypatch.setattr(scale, "DEVICES", (1, 8))
    one, eight = scale.rows_of(vars(replace(case, shape=(16, 8, 32))))
    assert not one["wrong"]
    assert not eight["wrong"]
    assert eight["wire_bytes"] > 0


TEXT = """\
HloModule jit_f, entry_computation_layout={()->f32[4]{0}}, num_partitions=8

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%body.1 (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %r = f32[4]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum
  ROOT %t = (s32[], f32[4]{0}) tuple(%i, %r)
}

%condition.1 (p: (s32[], f32[4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]{0}) while(%t), condition=%condition.1, body=%body.1, backend_config={TRIPS}
  %g = bf16[8,16]{1,0} all-gather(%a), channel_id=2, replica_groups=[4,2]<=[8], dimensions={0}
  %s = f32[2,3]{1,0} reduce-scatter(%b), replica_groups=mesh['d'=2,'c'=4] {'c'}, to_apply=%sum
  %two = (f32[5]{0}, pred[]) all-reduce(%c, %d), replica_groups={}, to_apply=%sum
  %alone = f32[7]{0} all-reduce(%e), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%sum
  ROOT %m = f32[4]{0} collective-permute(%q), source_target_pairs={{0,1},{1,0}}
}
"""


def test_collectives_of_a_text():
    def program(trips):
        return SimpleNamespace(as_text=lambda: TEXT.replace("{TRIPS}", trips))

    found = wire.collectives(program('{"known_trip_count":{"n":"5"}}'))
    loop, gather, scatter, two, permute = found
    assert (loop.times, loop.devices, loop.bytes) == (5, 4, 5 * 16 * 2 * 3 / 4)
    assert (gather.devices, gather.elements, gather.bytes) == (2, 128, 128)
    assert (scatter.kind, scatter.devices, scatter.bytes) == ("reduce-scatter", 4, 3 * 24)
    assert (two.devices, two.bytes) == (8, 21 * 2 * 7 / 8)
    assert (permute.kind, permute.bytes) == ("collective-permute", 16)
    with pytest.raises(ValueError, match="a collective in a loop of unknown length"):
        wire.collectives(program("{}"))
