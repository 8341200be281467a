"""The picture of a fit: nothing in it overlaps, and all its parts are labelled."""

import io
import itertools
import warnings

import numpy as np
import pytest

from softjax import plots

pytestmark = [pytest.mark.x64_once, pytest.mark.compiled_quickly]


def drawn(monkeypatch, num_classes, names, features, shape=None, name="data.csv"):
    """The texts that a report draws, each with its box in pixels, and the figure."""
    matplotlib = pytest.importorskip("matplotlib.text")
    texts, figures = {}, []
    draw = matplotlib.Text.draw

    def recorded(text, renderer, *args, **kwargs):
        if text.get_visible() and text.get_text().strip():
            # Of several draws the last one, which is after the layout.
            texts[text] = text.get_window_extent(renderer)
        draw(text, renderer, *args, **kwargs)

    def laid_out(figure, path):
        figures.append(figure)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            figure.draw_without_rendering()

    monkeypatch.setattr(matplotlib.Text, "draw", recorded)
    monkeypatch.setattr(plots, "_save", laid_out)
    rng = np.random.default_rng(0)
    labels = np.arange(20 * num_classes) % num_classes
    labels[labels == 2] = 1  # a class without examples
    logits = rng.normal(size=(len(labels), num_classes))
    logits[np.arange(len(labels)), labels] += 3
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    losses = np.log(num_classes) * np.exp(-np.arange(30) / 9)
    history = [
        {"step": i, "epoch": i, "objective": loss, "validation_loss": loss + 0.1}
        | {"validation_accuracy": np.exp(-loss)}
        for i, loss in enumerate(losses.tolist())
    ]
    kernel = rng.normal(size=(len(features), num_classes))
    plots.report(io.BytesIO(), history, kernel, features, names, labels, p, shape, name=name)
    (figure,) = figures
    return texts, figure


def named(count, text):
    return [text.format(i) for i in range(count)]


@pytest.mark.parametrize(
    ("num_classes", "names", "features", "shape"),
    [
        (2, ["yes", "no"], named(3, "x{}"), None),
        (10, named(10, "日本語の長い名前 {}"), named(64, "{}"), (8, 8)),
        (10, named(10, "{} of the ten classes, at length"), named(64, "pixel {} of all"), None),
        (40, named(40, "the class of a long name {}"), named(70, "feature {} in metres"), None),
    ],
)
def test_no_text_of_a_report_overlaps_another(monkeypatch, num_classes, names, features, shape):
    texts, figure = drawn(monkeypatch, num_classes, names, features, shape, "a long name " * 9)
    assert len(texts) > 30
    whole = figure.bbox
    for text, box in texts.items():
        assert whole.x0 <= box.x0 <= box.x1 <= whole.x1, text
        assert whole.y0 <= box.y0 <= box.y1 <= whole.y1, text
    for (text, box), (other, second) in itertools.combinations(texts.items(), 2):
        width = min(box.x1, second.x1) - max(box.x0, second.x0)
        height = min(box.y1, second.y1) - max(box.y0, second.y0)
        assert width < 1 or height < 1, f"{text} overlaps {other}"
    # Of every class that has examples, the percentages of its row add up to 100.
    (axes,) = (axes for axes in figure.axes if axes.get_ylabel().startswith("true class"))
    rows = axes.get_images()[0].get_array().sum(-1)
    assert np.ma.getmaskarray(rows).tolist() == [k == 2 for k in range(num_classes)]
    np.testing.assert_allclose(rows.compressed(), 100)
    # Every class is named and told apart from the others.
    shown = [text.get_text().partition(" (")[0] for text in texts]
    assert all(shown.count(name) >= 2 for name in set(plots._short(names, 16)))
    assert len(set(plots._short(names, 16))) == num_classes


def test_a_report_names_the_data_the_steps_and_the_colours(monkeypatch):
    names = named(3, "class {}")
    texts, _ = drawn(monkeypatch, 3, names, named(2, "x{}"))
    words = {text.get_text() for text in texts}
    assert "Softmax regression of data.csv: 3 classes, 60 held-out examples" in words
    assert "step" in words
    assert any("red raises the probability of the class" in text for text in words)
    # Each true class with the number of its examples; one class has none.
    assert {"class 0 (20)", "class 1 (40)", "class 2 (0)"} <= words


@pytest.mark.parametrize(("steps", "unit"), [(1, "step"), (7, "epoch: pass over the training")])
def test_what_the_learning_curve_counts(steps, unit):
    """Steps, where each of them sees all examples; a loss of 0 has no logarithm."""
    figure = plots._figure("report", (4, 3))
    event = {"objective": 0.0, "validation_loss": 0.0, "validation_accuracy": 1.0}
    plots._learning_curve(figure, [event | {"epoch": 1.0, "step": steps}])
    assert figure.axes[0].get_xlabel().startswith(unit)
    assert figure.axes[0].get_yscale() == "linear"


def test_long_names_are_shortened_and_still_told_apart():
    assert plots._short(["a", "a\nb"], 8) == ["a", "a b"]
    assert plots._short(["alphabetical", "b"], 7) == ["alp…cal", "b"]
    assert plots._short(["the class 1 of 2", "the class 2 of 2"], 7) == ["…1…", "…2…"]
    assert all(plots._width(name) <= 9 for name in plots._short(["日本語の長い名前", "x" * 30], 9))


@pytest.mark.parametrize(
    ("number", "text"),
    [(1, "1"), (0.25, "0.25"), (9999, "9999"), (12345, "12.3k"), (999999, "1M"), (3.4e6, "3.4M")],
)
def test_counts_are_short(number, text):
    assert plots._count(number) == text
