"""The suite `fused` from end to end on tiny shapes. No time is asserted."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracles
import pytest

from benchmarks import __main__ as command_line
from benchmarks import fused
from benchmarks.cases import SUITES
from benchmarks.run import run_case

pytestmark = pytest.mark.x64_once

TINY = fused.Shape("tiny", 8, 3, 5, "float32", "no model")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(fused, "CHUNK", 4)
    shapes = (replace(TINY, dtype=case.shape.dtype) for case in fused.CASES)
    cases = [replace(case, shape=s) for case, s in zip(fused.CASES, shapes, strict=True)]
    monkeypatch.setitem(SUITES, "fused", cases)
    return cases


def test_a_run_writes_one_record_a_case_and_its_table(tiny, tmp_path, capsys):
    out = tmp_path / "run.jsonl"
    assert command_line.main(["run", "fused", "--quick", "--out", str(out)]) == 0
    environment, *records = map(json.loads, out.read_text().splitlines())
    assert environment["suite"] == "fused"
    assert [record["case"] for record in records] == [case.name for case in tiny]
    for record in records:
        assert not record["wrong"]
        assert record["softjax"]["temporary_bytes"] >= 0
        if record["peer"] is None:
            assert record["met"]  # any byte is within gigabytes
            continue
        assert record["ratio"]["low"] <= record["ratio"]["median"] <= record["ratio"]["high"]
        assert record["other"]["seconds"]["median"] > 0
    printed = capsys.readouterr().out
    assert "tiny (8, 3, 5) bfloat16" in printed
    assert "within the asked bounds, 0 wrong results" in printed

    command = [sys.executable, "-m", "benchmarks.fused", str(out)]
    table = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    rows = table.splitlines()
    assert len(rows) == 2 + len(records)
    assert {row.count("|") for row in rows} == {len(fused.COLUMNS) + 2}


def test_a_wrong_result_is_reported_and_not_timed(monkeypatch):
    monkeypatch.setitem(fused.PEERS, "plain", lambda h, w, y: fused.plain(h, w, (y + 1) % 5))
    (record,) = run_case(fused.Case("value", TINY, "plain", time=1.0), pairs=1)
    assert record["wrong"]
    assert "ratio" not in record
    assert "wrong" in fused.markdown([record | {"shape": vars(TINY)}])


def test_every_side_is_the_loss_in_float64(tiny):
    hidden, kernel, labels = fused.inputs(TINY)
    logits = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
    expected = oracles.cross_entropy(logits, labels).mean()
    for loss in (fused.fused, *fused.PEERS.values()):
        np.testing.assert_allclose(loss(hidden, kernel, labels), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="unknown mode 'hessian'"):
        fused.in_mode(fused.plain, "hessian")
