"""The benchmarks from end to end on tiny shapes. No time is asserted."""

import json

import numpy as np
import pytest
import scipy.special
from scipy.stats import binom

from benchmarks import __main__ as command_line
from benchmarks import measure, peers
from benchmarks.cases import CORE, SUITES, Case, Shape, core, inputs, reference
from benchmarks.run import larger_temporaries, run_case

pytestmark = pytest.mark.x64_once

TINY = Shape("tiny", 8, 5, "no model")


@pytest.fixture
def tiny_core(monkeypatch):
    monkeypatch.setitem(SUITES, "core", core((TINY,)))


def test_a_run_writes_its_environment_and_one_record_a_case(tiny_core, tmp_path, capsys):
    out = tmp_path / "results" / "run.jsonl"
    assert command_line.main(["run", "core", "--quick", "--out", str(out)]) == 0
    environment, *records = map(json.loads, out.read_text().splitlines())
    assert environment["record"] == "environment"
    assert {"date", "commit", "device", "cores", "versions", "flags"} <= environment.keys()
    assert [(r["operation"], r["mode"], r["bound"]) for r in records] == list(CORE)
    for record in records:
        assert record["softjax"]["correct"]
        assert record["peer"]["correct"]
        assert record["ratio"]["low"] <= record["ratio"]["median"] <= record["ratio"]["high"]
        assert record["met"] == (record["ratio"]["median"] <= record["bound"])
        assert record["softjax"]["seconds"]["median"] > 0
        assert record["softjax"]["temporary_bytes"] >= 0
    printed = capsys.readouterr().out
    assert "tiny (8, 5) float32" in printed
    assert "0 wrong results" in printed


def test_a_wrong_implementation_is_reported_and_not_timed(monkeypatch, capsys, tmp_path):
    def off_by_one(logits, labels):
        return peers.OPTAX.operations["cross_entropy"](logits, (labels + 1) % 5)

    wrong = peers.Implementation("wrong", "jax", {"cross_entropy": off_by_one})
    monkeypatch.setattr(peers, "PEERS", (wrong,))
    case = Case("cross_entropy", "value_and_gradient", TINY, bound=1.15)
    monkeypatch.setitem(SUITES, "core", [case])
    (record,) = run_case(case, pairs=1)
    assert record["softjax"]["correct"]
    assert not record["peer"]["correct"]
    assert "ratio" not in record
    assert command_line.main(["run", "core", "--quick", "--out", str(tmp_path / "run.jsonl")]) == 1
    assert "wrong: wrong" in capsys.readouterr().out


def test_what_was_measured_before_an_interrupt_is_kept(tiny_core, monkeypatch, tmp_path, capsys):
    def interrupted(case, pairs):
        if case.operation == "softmax":
            raise KeyboardInterrupt
        return run_case(case, pairs)

    monkeypatch.setattr(command_line, "run_case", interrupted)
    out = tmp_path / "run.jsonl"
    assert command_line.main(["run", "core", "--quick", "--out", str(out)]) == 130
    assert len(out.read_text().splitlines()) == 3  # the environment and two modes of logsumexp
    assert "logsumexp gradient" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "cores"], "unknown suite cores; there is core"),
        (["run", "--only", "sigmoid"], "no case's name holds 'sigmoid'"),
    ],
)
def test_a_wrong_name_is_an_error_that_says_what_there_is(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command_line.main(arguments)
    assert message in capsys.readouterr().err


def test_list_names_suites_shapes_and_absent_peers(monkeypatch, capsys):
    absent = peers.Implementation("absent", "no-such-distribution", peers.JAX_NN.operations)
    monkeypatch.setattr("benchmarks.tables.PEERS", (*peers.PEERS, absent))
    monkeypatch.setattr(peers, "PEERS", (*peers.PEERS, absent))
    assert command_line.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("gemma-3" in line and "(64, 262144)" in line for line in lines)
    assert any("absent" in line and "not installed" in line for line in lines)
    assert absent not in peers.peers_of("softmax")


def test_the_reference_agrees_with_scipy():
    logits, labels = inputs(TINY, "float32")
    rows = range(TINY.examples)
    wide = logits.astype(np.float64)
    p = scipy.special.softmax(wide, axis=-1)
    y = np.asarray(scipy.special.logsumexp(wide, axis=-1))
    expected = {
        ("logsumexp", "value"): [y],
        ("logsumexp", "gradient"): [p],
        ("softmax", "value"): [p],
        ("log_softmax", "value"): [np.log(p)],
        ("cross_entropy", "value"): [y - wide[rows, labels]],
        ("cross_entropy", "value_and_gradient"): [
            np.mean(y - wide[rows, labels]),
            (p - np.eye(TINY.classes)[labels]) / TINY.examples,
        ],
    }
    for operation, mode, bound in CORE:
        got = reference(Case(operation, mode, TINY, bound), logits, labels)
        for a, b in zip(got, expected[operation, mode], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-13)  # float64, entries of order 1 to 1e-4


@pytest.mark.parametrize("n", [6, 9, 20, 41])
def test_the_interval_of_the_median_covers_95_percent(n):
    # The ranks (k, n + 1 - k) cover the median with probability 1 - 2 P(Binomial(n, 1/2) < k).
    interval = measure.estimate(range(1, n + 1))
    k = int(interval.low)
    assert interval.high == n + 1 - k
    assert 2 * binom.cdf(k - 1, n, 0.5) <= 0.05 < 2 * binom.cdf(k, n, 0.5)


def test_a_large_temporary_counts_only_where_the_peer_holds_less():
    def record(ours, theirs):
        sides = {"softjax": {"temporary_bytes": ours}, "peer": {"temporary_bytes": theirs}}
        return {"logits_bytes": 100, **sides}

    assert larger_temporaries(record(100, 99))
    assert not larger_temporaries(record(100, 100))
    assert not larger_temporaries(record(99, 0))
    assert not larger_temporaries(record(None, 0))
