"""The campaign of random cases: some cases of each kind, and the report of a failing case."""

import shlex
from types import SimpleNamespace

import pytest

from tests.campaign import Failure, Outcome
from tests.campaign.__main__ import KINDS, main

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once(True)]


@pytest.mark.parametrize(
    ("kind", "cases"),
    [
        ("functions", (0, 5)),
        ("linear", (1,)),
        ("invariance", (0,)),
        ("fits", (1,)),
        ("data-files", (4,)),
        ("model-files", (0,)),
    ],
)
def test_cases_of_every_kind(kind, cases, capsys):
    for case in cases:
        assert main(["--only", kind, "--case", str(case)]) == 0, capsys.readouterr().out


def test_a_failure_is_a_line_with_the_command_that_brings_it_again(monkeypatch, capsys):
    def run(rng):
        number = rng.integers(1 << 60)
        if number % 2:
            raise Failure(f"{number} is odd")
        return Outcome(0.5, "even")

    kind = SimpleNamespace(NAME="numbers", FIGURE="one half", run=run)
    monkeypatch.setitem(KINDS, "numbers", kind)
    assert main(["--only", "numbers", "--cases", "9", "--seed", "3"]) == 1
    *lines, header, row, counts = capsys.readouterr().out.splitlines()
    failures = [line for line in lines if line.startswith("FAILED numbers ")]
    assert 0 < len(failures) < 9
    assert row.split()[:4] == ["numbers", "9", str(len(failures)), "0.5"]
    assert counts.split() == ["even", str(9 - len(failures))]
    assert "failures" in header
    again = shlex.split(failures[-1].partition(" | ")[2])
    assert again[:3] == ["python", "-m", "tests.campaign"]
    assert main(again[3:]) == 1
    assert failures[-1] in capsys.readouterr().out
