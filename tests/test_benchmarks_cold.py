"""Fits in processes of their own: the suite `cold`, and memory. No time is asserted."""

import json
import sys

import jax
import numpy as np
import pytest
from test_regression import problem

from benchmarks import __main__ as command_line
from benchmarks import cold, fit, fit_memory


@pytest.mark.x64_once(True)
def test_every_script_fits_and_every_case_compares_whole_processes(monkeypatch, tmp_path, capsys):
    caches = []

    def in_this_process(script, arguments, environment):
        caches.append("JAX_COMPILATION_CACHE_DIR" in environment)
        monkeypatch.setattr(sys, "argv", ["-c", *arguments])
        exec(script, {})
        seconds = 3.0 if script is cold.SOFTJAX else 2.0
        return seconds, seconds

    monkeypatch.setattr(fit, "digits", problem)
    monkeypatch.setattr(cold, "_process", in_this_process)
    monkeypatch.setattr(cold, "REPEATS", 1)
    out = tmp_path / "run.jsonl"
    with jax.enable_x64(True):
        assert command_line.main(["run", "cold", "--quick", "--out", str(out)]) == 0
    environment, *records = map(json.loads, out.read_text().splitlines())
    assert environment["suite"] == "cold"
    assert [record["case"] for record in records] == ["digits", "digits-cached"]
    assert [record["ratio"] for record in records] == [1.5, 1.5]
    # The cached case fills its cache first.
    assert caches == 4 * [False] + 5 * [True]
    assert "digits-cached" in capsys.readouterr().out


@pytest.mark.x64_once
def test_a_process_is_timed_to_its_end_and_one_that_fails_is_said():
    cpu, wall = cold._process("sum(range(3_000_000))", [], {})
    assert 0 < cpu < 10
    assert 0 < wall < 60
    with pytest.raises(RuntimeError, match="must end with 0, got 3"):
        cold._process("raise SystemExit(3)", [], {})


@pytest.mark.x64_once(True)
@pytest.mark.parametrize("name", ["softjax auto", "scikit-learn newton-cg"])
def test_a_fit_in_a_process_of_its_own_tells_its_memory(name):
    x = np.random.default_rng(0).normal(size=(4000, 300))
    y = (x[:, :3] + x[:, 3:6]).argmax(1)
    first, following = fit_memory.peaks(name, x, y, 0.01, 1e-4)
    least = x.nbytes / 2 if name.startswith("softjax") else 0  # a copy in float32
    assert least <= following <= first < 2**30
    assert first > 0
