"""The suite `many` from end to end on a tiny problem. No time is asserted."""

import json
from types import SimpleNamespace
from unittest.mock import create_autospec

import jax
import numpy as np
import pytest
from test_regression import D, K, problem

from benchmarks import __main__ as command_line
from benchmarks import fit, many
from softjax import regression


def as_fits(theta):
    return SimpleNamespace(params=(theta[..., :-1, :], theta[..., -1, :]))


@pytest.mark.x64_once
def test_a_run_compares_every_lane_with_scikit_learn_and_prints_a_table(
    monkeypatch, tmp_path, capsys
):
    def tiny():
        (x, y), (more, others) = problem(), problem(1)
        return np.concatenate([x, more[:2]]), np.concatenate([y, others[:2]])

    monkeypatch.setattr(fit, "digits", tiny)
    monkeypatch.setattr(many, "RESAMPLES", 3)
    monkeypatch.setattr(many, "INVERSE_PENALTIES", np.array([0.1, 10.0]))
    # What these return in a few seconds of compiling, tests/test_regression_many.py proves.
    with jax.enable_x64(True):
        resampled, path = many.bootstrap(), many.path()

    def bootstrap(x, y, *, resamples, l2, tol):
        fits = as_fits(resampled.peer("newton-cholesky", tol))
        return SimpleNamespace(resamples=fits)

    def fit_path(x, y, *, l2, folds, tol):
        fits = as_fits(path.peer("newton-cholesky", tol).reshape(2, many.FOLDS, D + 1, K))
        return SimpleNamespace(cross_validation=SimpleNamespace(fits=fits))

    for function in (bootstrap, fit_path):
        spec = create_autospec(getattr(regression, function.__name__), side_effect=function)
        monkeypatch.setattr(regression, function.__name__, spec)
    out = tmp_path / "run.jsonl"
    assert command_line.main(["run", "many", "--quick", "--out", str(out)]) == 0
    environment, *records = map(json.loads, out.read_text().splitlines())
    assert environment["suite"] == "many"
    assert [record["case"] for record in records] == [case.name for case in many.CASES]
    assert [record["fits"] for record in records] == [3, 10]
    for record in records:
        assert record["ratio"] > 0
        assert [solver["name"] for solver in record["solvers"]] == [
            "softjax",
            "scikit-learn lbfgs",
            "scikit-learn newton-cg",
            "scikit-learn newton-cholesky",
        ]
        # Each of them comes to the optimum that softjax comes to: the lanes are the same problems.
        assert all(solver["suboptimality"] <= 1e-8 for solver in record["solvers"])
    assert "digits-path" in capsys.readouterr().out
