"""The rows that a fit holds out."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer")
from commands import run

from softjax import models, regression
from softjax.cli import _memory, _stream
from softjax.cli._split import Split

pytestmark = [pytest.mark.compiled_quickly, pytest.mark.x64_once]


@pytest.mark.parametrize("options", [(), ("--stream",), ("--stream", "--epochs", 2)])
def test_a_fit_to_all_rows_has_no_metrics(data, options, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.figure")  # a picture has two panels
    command = ("fit", data, "--label-column", "y", "--l2", 1e-2)
    run(*command)
    result = run(*command, "--test-fraction", 0, *options)
    assert result.exit_code == 0, result.output
    assert "60 examples to fit, none held out, so that no metrics are reported" in result.stdout
    assert "accuracy" not in result.stdout
    out = Path("softjax-out")
    assert sorted(os.listdir(out)) == ["history.jsonl", "model.npz", "report.png"]
    assert "validation" not in (out / "history.jsonl").read_text()
    if "--epochs" not in options:
        table = np.genfromtxt(data, str, delimiter=",", skip_header=1)
        x, y = table[:, :2].astype(float), np.unique(table[:, 2], return_inverse=True)[1]
        kernel = models.load_model(out / "model.npz").kernel * x.std(0)[:, None]
        expected = regression.fit((x - x.mean(0)) / x.std(0), y, l2=1e-2).params.kernel
        np.testing.assert_allclose(kernel, expected, atol=1e-4)


def draw(codes, fraction, seed=0, most=None, runs=1):
    split = Split(len(codes), fraction, seed, most)
    for rows in np.array_split(np.arange(len(codes)), runs):
        split.see(rows, [str(k) for k in range(codes.max() + 1)], codes[rows])
    return split.held_out()


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.99])
def test_every_class_keeps_its_share_of_the_rows_held_out(fraction):
    rng = np.random.default_rng(0)
    for case in range(60):
        counts = rng.integers(1, [3, 40, 400][case % 3], size=rng.integers(2, 30))
        codes = rng.permutation(np.repeat(np.arange(len(counts)), counts))
        rows = draw(codes, fraction, seed=case)
        assert np.array_equal(rows, np.unique(rows))
        drawn = np.bincount(codes[rows], minlength=len(counts))
        assert (drawn <= counts - 1).all()  # a row of each class is left to fit
        most = np.minimum(np.ceil(fraction * counts), counts - 1)
        total = min(round(fraction * len(codes)), most.sum())
        assert abs(len(rows) - total) <= 1
        share = counts * round(fraction * len(codes)) / len(codes)
        assert (drawn >= np.minimum(np.floor(share), counts - 1)).all()
        assert (drawn <= np.ceil(share)).all()


def test_the_rows_held_out_depend_on_the_seed_and_on_nothing_else():
    rng = np.random.default_rng(0)
    codes = rng.integers(7, size=5000)
    rows = draw(codes, 0.2)
    for runs in (3, 50):
        assert np.array_equal(draw(codes, 0.2, runs=runs), rows)
    other = (codes + 3) % 7  # the classes by other names
    assert np.array_equal(draw(other, 0.2), rows)
    assert len(np.intersect1d(draw(codes, 0.2, seed=1), rows)) < 400  # 200 by chance
    few = draw(codes, 0.2, most=100)
    assert len(few) == 100
    assert np.isin(few, rows).all()
    # Nothing of the order of the rows is left: every tenth of them has a tenth of those held out.
    tenths = np.bincount(rows // 500, minlength=10)
    assert (abs(tenths - 100) < 40).all()
    large = rng.integers(3, size=400_000)
    few = draw(large, 0.2, most=1000)
    assert np.bincount(large[few]).tolist() == draw_shares(large, 1000)


def draw_shares(codes, total):
    counts = np.bincount(codes) * total / len(codes)
    rest = np.argsort(np.floor(counts) - counts)[: round(total - np.floor(counts).sum())]
    shares = np.floor(counts)
    shares[rest] += 1
    return shares.astype(int).tolist()


def test_a_stream_holds_out_the_rows_that_a_fit_in_memory_holds_out(data, monkeypatch):
    seen = []

    class Seen(Split):
        def held_out(self):
            seen.append(super().held_out())
            return seen[-1]

    for module in (_memory, _stream):
        monkeypatch.setattr(module, "Split", Seen)
    for options in ([], ["--stream"]):
        result = run("fit", data, "--label-column", "y", "--max-steps", 1, "--seed", 3, *options)
        assert result.exit_code == 0, result.output
    memory, stream = seen
    assert np.array_equal(memory, stream)
    assert np.bincount(memory % 3).tolist() == [4, 4, 4]


def test_a_stream_fits_the_model_of_a_fit_in_memory(data):
    """Rows that are held out count neither in the mean and the scale nor in the majority."""
    rng = np.random.default_rng(1)
    codes = np.repeat([0, 1], [33, 27])  # 26 and 22 rows to fit
    held_out = draw(codes, 0.2)
    x = rng.normal(size=(60, 3))
    x[:, 2] = 7
    x[held_out] = [
        [1e3, -1e20, 8]
    ]  # a number far from the others; a feature that is constant elsewhere
    table = np.column_stack([x, codes])
    np.save("x.npy", table)
    found = []
    for options in ((), ("--stream",)):
        result = run("fit", "x.npy", "--label-column", "3", "--l2", 0.01, *options)
        assert result.exit_code == 0, result.output
        found.append(models.load_model("softjax-out/model.npz"))
    memory, stream = found
    np.testing.assert_allclose(stream.kernel, memory.kernel, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(stream.bias, memory.bias, rtol=1e-3, atol=1e-4)
