"""The picture of a fit: learning curve, weights, confusion matrix and reliability diagram.

This module needs matplotlib, which the extra `plot` installs.
"""

import unicodedata
import warnings
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np

from softjax import _checks
from softjax._scores import scores
from softjax.calibration import reliability_diagram

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["reliability", "report"]

BINS = 10
# The picture grows with the number of classes between FEW and MANY.
FEW, MANY = 25, 40
# The meaning of the colours of the weights.
SIGNS = "red raises the probability of the class, blue lowers it"
# The width of a letter, as a share of the font size.
EM = 0.62


def report(
    path: Path | BinaryIO,
    history: Sequence[dict[str, float]],
    kernel: np.ndarray,
    feature_names: Sequence[str],
    class_names: Sequence[str],
    labels: np.ndarray | None = None,
    probabilities: np.ndarray | None = None,
    image_shape: tuple[int, int] | None = None,
    *,
    name: str | None = None,
) -> None:
    """Draws a fit in four panels: learning curve, weights, confusion matrix and reliability.

    Without held-out examples there are two panels: learning curve and weights. The picture grows
    with the number of classes, up to 40. With more classes or features only some of the names are
    shown. Long names are shortened in the middle.

    Args:
        path: the PNG file to write, or a binary file that is open for writing.
        history: the history of a fit, with validation data if there are held-out examples.
        kernel: [D, K], the weights of pixels or of standardised features.
        feature_names: D names.
        class_names: K names.
        labels: [N], class indices of held-out examples; None if there are none.
        probabilities: [N, K], predicted probabilities of these examples.
        image_shape: the shape of the image, if the features are its pixels.
        name: the name of the data, for the title.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message names the extra.

    Example:
        >>> import io, numpy as np, softjax
        >>> x, y = np.array([[0.0], [1.0], [2.0], [3.0]]), np.array([0, 1, 0, 1])
        >>> fitted = softjax.regression.fit(x, y, l2=0.1, validation=(x, y))
        >>> kernel, p = fitted.params.kernel, softjax.regression.predict_proba(fitted.params, x)
        >>> file = io.BytesIO()
        >>> softjax.plots.report(file, fitted.history, kernel, ["x"], ["low", "high"], y, p)
        >>> file.getvalue()[1:4]
        b'PNG'
    """
    scale = min(max(len(class_names), FEW), MANY) / FEW
    held_out = None if labels is None or probabilities is None else (labels, probabilities)
    columns = 1 if held_out is None else 2
    figure = _figure("report", (6.5 * columns * scale, 10 * scale))
    data = "" if name is None else f" of {_short([name], 40)[0]}"
    title = f"Softmax regression{data}: {len(class_names)} classes"
    if held_out is not None:
        title += f", {len(held_out[0])} held-out examples"
    figure.suptitle(title, fontsize=12 * scale, parse_math=False)
    panels: Any = figure.subfigures(2, columns)
    curve, weights, *of_held_out = panels.ravel()
    _learning_curve(curve, history)
    if image_shape is None:
        _heat_map(weights.subplots(), kernel, feature_names, class_names)
    else:
        _images(weights, kernel, class_names, image_shape)
    if held_out is not None:
        confusion, reliability = of_held_out
        _confusion(confusion.subplots(), *held_out, class_names)
        _reliability(reliability.subplots(), *held_out)
    _save(figure, path)


def reliability(path: Path | BinaryIO, labels: np.ndarray, probabilities: np.ndarray) -> None:
    """Draws the reliability diagram of held-out examples: accuracy against confidence.

    Args:
        path: the PNG file to write, or a binary file that is open for writing.
        labels: [N], class indices of held-out examples.
        probabilities: [N, K], predicted probabilities of these examples.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message names the extra.

    Example:
        >>> import io, numpy as np, softjax
        >>> labels, p = np.array([0, 1]), np.array([[0.9, 0.1], [0.4, 0.6]])
        >>> file = io.BytesIO()
        >>> softjax.plots.reliability(file, labels, p)
        >>> file.getvalue()[1:4]
        b'PNG'
    """
    figure = _figure("reliability", (6.5, 5))
    _reliability(figure.subplots(), labels, probabilities)
    _save(figure, path)


def _figure(function: str, size: tuple[float, float]) -> Any:
    """An empty figure; the first call imports matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        needs = _checks.needs_extra(f"softjax.plots.{function}", "matplotlib", "plot")
        raise ModuleNotFoundError(f"{needs}.", name=error.name) from error
    return Figure(figsize=size, layout="constrained", dpi=110)


def _save(figure: Any, path: Path | BinaryIO) -> None:
    with warnings.catch_warnings():
        # Characters that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(path, format="png")  # whatever the suffix of the path is


def _learning_curve(figure, history: Sequence[dict[str, float]]) -> None:
    axes = figure.subplots()
    epochs = [event["epoch"] for event in history]
    steps = [event.get("step", event["epoch"]) for event in history]
    # If every step uses all examples, a step is an epoch.
    unit = "step" if steps == epochs else "epoch: pass over the training examples"
    marker = "o" if len(history) < 10 else ""
    positive = False
    has_held_out = "validation_loss" in history[0]
    curves = [("objective", "training objective"), ("validation_loss", "held-out loss")]
    for key, label in curves if has_held_out else curves[:1]:
        values = [event[key] for event in history]
        axes.plot(epochs, values, label=label, marker=marker)
        positive |= max(values) > 0
    axes.set(title="Learning curve", xlabel=unit, ylabel="nats per example")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if positive:  # a logarithmic axis needs a positive loss
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
    if has_held_out:
        right = axes.twinx()
        accuracy = [100 * event["validation_accuracy"] for event in history]
        look = {"color": "tab:green", "linestyle": "--", "marker": marker}
        right.plot(epochs, accuracy, label="held-out accuracy", **look)
        right.set(ylabel="accuracy, %", ylim=(0, 101))
    figure.legend(loc="outside lower center", ncols=3)


def _plain_numbers(axis) -> None:
    """Makes a logarithmic axis show numbers such as 0.5 instead of powers of ten."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x, pos=None):
            return f"{x:g}" if super().__call__(x, pos) else ""

    axis.set_major_formatter(Plain())
    axis.set_minor_formatter(Plain(minor_thresholds=(1, 0.4)))


def _images(figure, kernel: np.ndarray, class_names: Sequence[str], shape: tuple[int, int]) -> None:
    """One image of weights for each class, with the name above it if there is room."""
    k, font = len(class_names), 8
    columns = max(min(5, k), int(np.ceil(np.sqrt(1.3 * k))))
    grid = figure.subplots(-(-k // columns), columns, squeeze=False).ravel()
    room = int(_points(figure, 0.38) / columns / (EM * font))
    for axes in grid:
        axes.axis("off")
    for axes, name, weights in zip(grid, _short(class_names, room), kernel.T, strict=False):
        image = axes.imshow(weights.reshape(shape), **_red_and_blue(kernel))
        if room >= 3:
            axes.set_title(name, fontsize=font, parse_math=False)
    figure.suptitle("Weights of each class")
    bar = figure.colorbar(image, ax=grid.tolist(), shrink=0.9)
    bar.set_label(f"nats per unit of a pixel\n{SIGNS}")


def _heat_map(
    axes: "Axes", kernel: np.ndarray, feature_names: Sequence[str], class_names: Sequence[str]
) -> None:
    image = axes.imshow(kernel, aspect="auto", interpolation="nearest", **_red_and_blue(kernel))
    axes.set(title="Weights of each class", xlabel="class", ylabel="feature")
    _name_ticks(axes, "x", class_names)
    _name_ticks(axes, "y", feature_names)
    bar = axes.figure.colorbar(image, ax=axes)
    bar.set_label(f"nats per standard deviation of the feature\n{SIGNS}")


def _red_and_blue(kernel: np.ndarray) -> dict[str, Any]:
    largest = np.abs(kernel).max()
    return {"cmap": "RdBu_r", "vmin": -largest, "vmax": largest}


def _confusion(
    axes: "Axes", labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]
) -> None:
    """Draws, for each true class, the percentages of its examples that each class is predicted."""
    k = len(class_names)
    counts = np.zeros((k, k), int)
    np.add.at(counts, (labels, probabilities.argmax(-1)), 1)
    totals = counts.sum(-1)
    percent = 100 * counts / np.maximum(totals, 1)[:, None]
    shown = np.ma.masked_where(np.broadcast_to(totals[:, None] == 0, (k, k)), percent)
    image = axes.imshow(shown, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    axes.set_facecolor("0.9")  # the colour of a class without examples
    found, most = scores(labels, probabilities.argmax(-1), k), int(np.argmax(totals))
    figures = f"accuracy {found.accuracy:.1%}, mean F1 {found.macro_f1:.1%}"
    share, (name,) = totals[most] / max(len(labels), 1), _short([class_names[most]], 20)
    title = f"Confusion of the held-out examples, %\n{figures}; {share:.1%} are {name}"
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.set(xlabel="predicted class", ylabel="true class (examples)")
    _name_ticks(axes, "x", class_names)
    _name_ticks(axes, "y", class_names, [f" ({total})" for total in totals])
    if k <= 20:
        font = 9 if k <= 10 else 6
        for row, column in np.argwhere(counts):
            value = percent[row, column]
            color = "white" if value > 50 else "black"
            text = f"{value:.0f}" if value >= 1 else "<1"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=font)
    axes.figure.colorbar(image, ax=axes, label="% of the examples of the true class")


def _reliability(axes: "Axes", labels: np.ndarray, probabilities: np.ndarray) -> None:
    bins = reliability_diagram(probabilities, labels, num_bins=BINS)
    confidence, accuracy, weight = (np.asarray(values) for values in bins)
    filled = np.flatnonzero(weight)
    axes.plot([0, 1], [0, 1], color="gray", linestyle=":", label="calibrated")
    axes.plot(confidence[filled], accuracy[filled], marker="o", label="held-out examples")
    axes.set(title="Reliability", xlim=(0, 1), ylim=(0, 1.05))
    axes.set(xlabel="confidence: probability of the predicted class", ylabel="share that is right")
    # The counts stand above the bins, where they overlap neither the curve nor each other.
    top = axes.secondary_xaxis("top")
    top.set_ticks((np.arange(BINS) + 0.5) / BINS, [_count(w) if w else "" for w in weight])
    top.tick_params(length=0, labelsize=8)
    top.set_xlabel("examples in each bin of confidence", fontsize=8)
    axes.legend()


def _count(number: float) -> str:
    """A number of examples in at most five characters: 12, 9999, 12k, 3.4M."""
    for least, size, unit in ((999.5e6, 1e9, "G"), (999.5e3, 1e6, "M"), (1e4, 1e3, "k")):
        if number >= least:
            return f"{number / size:.3g}{unit}"
    return f"{number:.4g}"


def _name_ticks(
    axes: "Axes", along: Literal["x", "y"], names: Sequence[str], after: Sequence[str] = ()
) -> None:
    """Labels the entries along an axis with names, in which a $ does not begin a formula.

    If there is not enough room for all names, every second or every third name is shown, and so on.
    The axes are in a panel that is a quarter of the figure. The texts `after` the names are not
    shortened.
    """
    # A panel keeps at least this share of the figure for its entries; a line is 8 points high.
    room = _points(axes.figure, 0.3)
    step = -(-len(names) * 8 // int(room))
    places = range(0, len(names), step)
    font = min(9.0, 0.8 * room / len(places))
    shown = _short(names, 16)[::step]
    if after:
        shown = [name + after[i] for name, i in zip(shown, places, strict=True)]
    axis = axes.xaxis if along == "x" else axes.yaxis
    axis.set_ticks(places, shown, parse_math=False, fontsize=font)
    widest = max(map(_width, shown)) + 1
    if along == "x" and widest * EM * font > room / len(places):
        axis.set_tick_params(rotation=90)


def _points(figure, share: float) -> float:
    """A share of the height of the whole figure, its smaller side, in points."""
    return share * 72 * figure.get_figure(root=True).get_size_inches()[1]


def _short(names: Sequence[str], width: int) -> list[str]:
    """The names, each in one line that is at most `width` letters wide.

    The middle of a long name is left out. If different names would then look the same, the
    beginning and the end that all names share are left out first.
    """
    lines = [" ".join(name.split()) for name in names]
    if all(_width(line) <= width for line in lines):
        return lines
    short = [_without_middle(line, width) for line in lines]
    if len(set(short)) < len(set(lines)):
        first = _shared(lines)
        last = _shared([line[first:][::-1] for line in lines])
        ends = ("…" if first else "", "…" if last else "")
        own = [line[first : len(line) - last].strip().join(ends) for line in lines]
        short = [_without_middle(line, width) for line in own]
    return short


def _shared(lines: Sequence[str]) -> int:
    """The number of letters in the common beginning of all lines."""
    columns = zip(*lines, strict=False)
    return sum(1 for _ in takewhile(lambda letters: len(set(letters)) == 1, columns))


def _without_middle(line: str, width: int) -> str:
    if _width(line) <= width:
        return line
    first, last = line, line
    while _width(first) > width // 2:
        first = first[:-1]
    while _width(last) > width - 1 - width // 2:
        last = last[1:]
    return f"{first}…{last}"


def _width(text: str) -> int:
    """The width of a text in letters; Chinese, Japanese and Korean letters count twice."""
    return sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text)
