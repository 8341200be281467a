"""The suite `inference` from end to end on a tiny problem. No time is asserted."""

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import __main__ as command_line
from benchmarks import inference, peers, results
from benchmarks.cases import SUITES

pytestmark = pytest.mark.x64_once

TINY = (60, 2, 3)


def test_both_reach_the_same_and_what_is_wrong_is_not_timed(monkeypatch, tmp_path, capsys):
    cases = [inference.Case("fit", TINY), inference.Case("marginal-effects", TINY, bound=1e9)]
    monkeypatch.setitem(SUITES, "inference", cases)
    out = tmp_path / "run.jsonl"
    assert command_line.main(["run", "inference", "--quick", "--out", str(out)]) == 0
    records = results.read(out).results("inference")
    assert [record["case"] for record in records] == [case.name for case in cases]
    for record in records:
        ours, theirs = results.sides(record)
        assert (ours.name, theirs.name) == ("softjax", "statsmodels")
        assert max(ours.error, theirs.error) <= inference.TOLERANCES[record["task"]]
        assert results.ratio(record)[0] > 0
    printed = capsys.readouterr().out
    assert "(60, 2, 3)" in printed
    assert "inference: 2 of 2 results the same, 2 within the asked bound" in printed

    away = SimpleNamespace(params=np.ones((3, 2)))
    monkeypatch.setattr(inference, "_solved", lambda model: away)
    (record,) = inference.run(cases[0], pairs=1)
    assert record["wrong"]
    assert record["softjax"]["correct"]
    assert not record["peer"]["correct"]
    assert "ratio" not in record
    inference.results_tables([record])

    monkeypatch.setattr(peers.Implementation, "absence", "not installed")
    assert list(inference.run(cases[0], pairs=1)) == []
