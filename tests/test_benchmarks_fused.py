"""The suite `fused` from end to end on tiny shapes. No time is asserted."""

from dataclasses import replace

import jax
import numpy as np
import oracles
import pytest

from benchmarks import __main__ as command_line
from benchmarks import fused, results, roofline
from benchmarks.cases import SUITES
from benchmarks.run import run_case

pytestmark = pytest.mark.x64_once

TINY = fused.Shape("tiny", 8, 3, 5, "float32", "no model")


KEPT = (0, 3, 4)  # one beside a peer with both bounds, one second derivative, one without a peer


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(fused, "CHUNK", 4)
    shapes = (replace(TINY, dtype=case.shape.dtype) for case in fused.CASES)
    cases = [
        replace(case, shape=s, quick=True) for case, s in zip(fused.CASES, shapes, strict=True)
    ]
    monkeypatch.setitem(SUITES, "fused", [cases[k] for k in KEPT])


def test_a_run_writes_one_record_a_case_and_its_table(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(roofline, "ceilings", lambda: {"record": "ceilings"})
    out = tmp_path / "run.jsonl"
    assert command_line.main(["run", "fused", "--quick", "--out", str(out)]) == 0
    run = results.read(out)
    records = run.results("fused")
    assert run.environment["suite"] == "fused"
    assert [record["case"] for record in records] == [case.name for case in SUITES["fused"]]
    for record in records:
        assert not record["wrong"]
        ours, *others = results.sides(record)
        assert ours.temporary_bytes >= 0
        if not others:
            assert record["met"]  # any byte is within gigabytes
            continue
        value, low, high = results.ratio(record)
        assert low <= value <= high
        assert others[0].seconds[0] > 0
    printed = capsys.readouterr().out
    assert "tiny (8, 3, 5) bfloat16" in printed
    assert "within the asked bounds, 0 wrong results" in printed

    rows = fused.markdown(records).splitlines()
    assert len(rows) == 2 + len(records)
    assert {row.count("|") for row in rows} == {len(fused.COLUMNS) + 2}


def test_a_wrong_result_is_reported_and_not_timed(monkeypatch):
    monkeypatch.setitem(fused.PEERS, "plain", lambda h, w, y: fused.plain(h, w, (y + 1) % 5))
    (record,) = run_case(fused.Case("value", TINY, "plain", time=1.0), pairs=1)
    assert record["wrong"]
    assert "ratio" not in record
    assert "wrong" in fused.markdown([record | {"shape": vars(TINY)}])


def test_every_side_is_the_loss_in_float64(monkeypatch):
    monkeypatch.setattr(fused, "CHUNK", 4)
    hidden, kernel, labels = fused.inputs(TINY)
    logits = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
    expected = oracles.cross_entropy(logits, labels).mean()
    for loss in (fused.fused, *fused.PEERS.values()):
        np.testing.assert_allclose(jax.jit(loss)(hidden, kernel, labels), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="unknown mode 'hessian'"):
        fused.in_mode(fused.plain, "hessian")
