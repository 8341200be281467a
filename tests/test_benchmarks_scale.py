"""The suite `scale` on a tiny shape, and the reading of collectives from the text of a program."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from benchmarks import __main__ as command_line
from benchmarks import scale, wire
from benchmarks.cases import SUITES

pytestmark = pytest.mark.x64_once

TINY = (16, 8, 32)

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


def program(text):
    return SimpleNamespace(as_text=lambda: text)


def test_collectives_of_a_text():
    known = '{"known_trip_count":{"n":"5"}}'
    loop, gather, scatter, two, permute = wire.collectives(program(TEXT.replace("{TRIPS}", known)))
    assert (loop.times, loop.devices, loop.bytes) == (5, 4, 5 * 16 * 2 * 3 / 4)
    assert (gather.devices, gather.elements, gather.bytes) == (2, 128, 128)
    assert (scatter.kind, scatter.devices, scatter.bytes) == ("reduce-scatter", 4, 3 * 24)
    assert (two.devices, two.bytes) == (8, 21 * 2 * 7 / 8)
    assert (permute.kind, permute.bytes) == ("collective-permute", 16)
    with pytest.raises(ValueError, match="a collective in a loop of unknown length"):
        wire.collectives(program(TEXT))


def test_a_run_from_end_to_end(monkeypatch, tmp_path, capsys):
    cases = [replace(case, shape=TINY) for case in scale.CASES if case.program == "loss"]
    monkeypatch.setitem(SUITES, "scale", cases)
    out = tmp_path / "run.jsonl"
    assert command_line.main(["run", "scale", "--out", str(out)]) == 0
    assert "scale: 1 of 1 within the asked bounds, 0 wrong results" in capsys.readouterr().out
    _, *records = map(json.loads, out.read_text().splitlines())
    assert [record["devices"] for record in records] == list(scale.DEVICES)
    assert records[0]["wire_bytes"] == records[0]["collectives"] == 0
    picture = tmp_path / "scale.svg"
    scale.main([str(out), str(picture)])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + len(records)
    assert picture.stat().st_size > 0


@pytest.mark.parametrize("case", scale.CASES[3:6], ids=lambda case: case.name)
def test_a_case_gives_the_results_of_one_device(case, monkeypatch):
    monkeypatch.setattr(scale, "DEVICES", (1, 8))
    one, eight = scale.records_of(replace(case, shape=TINY))
    assert not one["wrong"]
    assert not eight["wrong"]
    assert eight["wire_bytes"] > 0
