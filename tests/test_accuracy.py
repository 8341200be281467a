"""The accuracy table: softjax is within every bound, and the references are correct."""

from typing import Any

import mpmath
import numpy as np
import oracles
import pytest

import softjax
from softjax import accuracy


@pytest.mark.x64_once(True)  # with 64-bit types on, every dtype is measured
def test_every_bound_holds(monkeypatch):
    # softjax takes the places of the peers, which compiles nothing more: see the next test.
    quantities = [q._replace(functions=2 * q.functions[:1]) for q in accuracy._QUANTITIES]
    monkeypatch.setattr(accuracy, "_QUANTITIES", quantities)
    calls = []
    rows = accuracy.measure(quick=True, progress=lambda done, total: calls.append((done, total)))
    assert [f"{row.function} {row.dtype}: {row.ratio}" for row in rows if not row.ok] == []
    assert {row.dtype for row in rows} == {"float32", "bfloat16", "float16", "float64"}
    assert all(row.ratio <= 1 for row in rows)
    # The aim of logsumexp, which the gap does not enter: log1p(r) is small where it is large.
    assert all(row.softjax <= 3 for row in rows if row.function == "logsumexp")
    done, totals = zip(*calls, strict=True)
    assert list(done) == list(range(1, totals[-1] + 1))


@pytest.mark.compiled_quickly
@pytest.mark.x64_once(True)
def test_the_peers_are_measured_too(monkeypatch):
    monkeypatch.setattr(accuracy, "QUICK_SIZES", (10,))
    rows = accuracy.measure(quick=True)
    assert not np.isnan([row.peer for row in rows]).any()
    assert {row.function for row in rows if row.peer > row.softjax} > {"logsumexp", "softmax"}


@pytest.mark.x64_once
def test_the_oracles_agree_with_the_textbook():
    """log(sum(exp(x))) and its relatives as they are written down, in 400 bits."""
    mp: Any = mpmath.mp.clone()
    mp.prec = 400
    rng = np.random.default_rng(0)
    for row in (8 * rng.standard_normal(20), [0.0, -20.0], [1e3, 985.0], [1e5, 1e5, 1e5 - 60]):
        exps = [mp.exp(float(v)) for v in row]
        total = mp.fsum(exps)
        exact = oracles.exact(row)
        pairs = [
            (oracles.logsumexp(exact), mp.log(total)),
            (oracles.log_softmax(exact)[1], mp.log(exps[1] / total)),
            (oracles.softmax(exact)[0], exps[0] / total),
            (oracles.complement(exact)[0], 1 - exps[0] / total),
            (oracles.cross_entropy(exact, 0), -mp.log(exps[0] / total)),
            (oracles.hessian(exact)[0, 1], -exps[0] * exps[1] / total**2),
        ]
        for actual, desired in pairs:
            difference = mp.mpf(str(np.asarray(actual).item())) - desired
            assert abs(difference) <= 1e-30 * abs(desired)
    for function in (oracles.logsumexp, oracles.softmax, oracles.complement):
        x = 8 * rng.standard_normal((50, 20))
        np.testing.assert_allclose(
            function(x), oracles.rounded(function(oracles.exact(x))), rtol=1e-13
        )


@pytest.mark.parametrize("n", [2, 10, 100])
@pytest.mark.parametrize("scale", [0.1, 1.0, 40.0])
def test_logsumexp_and_loss_against_the_oracles(n, scale, x64, dtype):
    """The bound of the table once more, by other references and for the same function called."""
    rng = np.random.default_rng(n)
    for offset in (0.0, -30.0, 1e3, 1e5):
        x = (offset + scale * rng.standard_normal((3, n))).astype(dtype)
        labels = rng.integers(n, size=3)
        exact = oracles.exact(x) if x64 else x
        two = np.sort(x.astype(np.float64), -1)[:, -2:]
        allowed = 5 + two[:, 1] - two[:, 0]
        y = oracles.logsumexp(exact)
        size = (
            np.abs(oracles.rounded(y)) + np.log1p(oracles.rounded(oracles.excess(exact)[1]))[:, 0]
        )
        assert np.all(oracles.ulps(softjax.logsumexp(x, axis=-1), y, size) <= allowed)
        loss = oracles.cross_entropy(exact, labels)
        # XLA flushes what is below the smallest normal number.
        normal = oracles.rounded(loss) > n * 1e-37
        error = oracles.ulps(softjax.cross_entropy(x, labels), loss)
        assert np.all(np.where(normal, error, 0) <= allowed)
