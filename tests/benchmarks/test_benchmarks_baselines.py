"""Deterministic figures do not grow: temporaries, passes over the data, errors."""

import pytest

from benchmarks import baselines

pytestmark = pytest.mark.x64_once


def test_no_deterministic_figure_grows():
    committed = baselines.read()
    here = baselines.versions()
    if {key: committed[key] for key in here} != here:
        pytest.skip(f"the figures belong to {committed['jaxlib']} on {committed['platform']}")
    grown = baselines.growth(committed["figures"], baselines.measure()["figures"])
    assert not grown, "\n".join([*grown, "If it must be: python -m benchmarks baselines"])


def test_what_grew_is_named_and_what_shrank_is_not():
    before = {"a": {"temporary_bytes": 10, "ulp": 2}, "b": {"ulp": 1}, "c": {"ulp": 1}}
    after = {"a": {"temporary_bytes": 11, "ulp": 1}, "b": {"ulp": 1}, "d": {"ulp": 1}}
    assert baselines.growth(before, after) == [
        "a: temporary_bytes 10 -> 11",
        "c: ulp 1 -> None",
        "d: not in the committed figures",
    ]
