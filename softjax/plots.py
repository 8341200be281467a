"""The picture of a fit: learning curve, weights, confusion matrix and reliability diagram.

Needs matplotlib, of the extra `plot`.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from softjax import _checks
from softjax.calibration import reliability_diagram

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["reliability", "report"]

BINS = 10


def report(
    path: Path | BinaryIO,
    history: Sequence[dict[str, float]],
    kernel: np.ndarray,
    feature_names: Sequence[str],
    class_names: Sequence[str],
    labels: np.ndarray,
    probabilities: np.ndarray,
    image_shape: tuple[int, int] | None = None,
) -> None:
    """Writes four panels on held-out examples: curve, weights, confusion and reliability.

    Args:
        path: the PNG to write, or a binary file that is open for writing.
        history: of a fit with validation data.
        kernel: [D, K], of pixels or of standardised features.
        feature_names: D names.
        class_names: K names.
        labels: [N], held-out class indices.
        probabilities: [N, K], predicted for them.
        image_shape: where the features are the pixels of an image.

    Raises:
        ModuleNotFoundError: without matplotlib; the message names the extra.

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
    figure = _figure("report", (13, 10))
    panels: Any = figure.subfigures(2, 2)
    (curve, weights), (confusion, reliability) = panels
    _learning_curve(curve, history)
    if image_shape is None:
        _heat_map(weights.subplots(), kernel, feature_names, class_names)
    else:
        _images(weights, kernel, class_names, image_shape)
    _confusion(confusion.subplots(), labels, probabilities, class_names)
    _reliability(reliability.subplots(), labels, probabilities)
    _save(figure, path)


def reliability(path: Path | BinaryIO, labels: np.ndarray, probabilities: np.ndarray) -> None:
    """Writes the reliability diagram of held-out examples: accuracy against confidence.

    Args:
        path: the PNG to write, or a binary file that is open for writing.
        labels: [N], held-out class indices.
        probabilities: [N, K], predicted for them.

    Raises:
        ModuleNotFoundError: without matplotlib; the message names the extra.

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
    """An empty figure; matplotlib is loaded by the first one."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        needs = _checks.needs_extra(f"softjax.plots.{function}", "matplotlib", "plot")
        raise ModuleNotFoundError(f"{needs}.", name=error.name) from error
    return Figure(figsize=size, layout="constrained", dpi=110)


def _save(figure: Any, path: Path | BinaryIO) -> None:
    with warnings.catch_warnings():
        # A name in a script that the font lacks is shown as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(path, format="png")  # a name of any suffix


def _learning_curve(figure, history: Sequence[dict[str, float]]) -> None:
    axes = figure.subplots()
    epochs = [event["epoch"] for event in history]
    axes.plot(epochs, [event["objective"] for event in history], label="training objective")
    axes.plot(epochs, [event["validation_loss"] for event in history], label="held-out loss")
    axes.set(title="Learning curve", xlabel="epoch", ylabel="nats per example", yscale="log")
    right = axes.twinx()
    accuracy = [100 * event["validation_accuracy"] for event in history]
    right.plot(epochs, accuracy, color="tab:green", linestyle="--", label="held-out accuracy")
    right.set(ylabel="accuracy, %", ylim=(0, 101))
    figure.legend(loc="outside lower center", ncols=3)


def _images(figure, kernel: np.ndarray, class_names: Sequence[str], shape: tuple[int, int]) -> None:
    columns = min(5, len(class_names))
    rows = -(-len(class_names) // columns)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    largest = np.abs(kernel).max()
    image = None
    for axes in grid:
        axes.axis("off")
    for axes, name, weights in zip(grid, class_names, kernel.T, strict=False):
        image = axes.imshow(weights.reshape(shape), cmap="RdBu_r", vmin=-largest, vmax=largest)
        axes.set_title(name, parse_math=False)
    figure.suptitle("Weights of each class")
    figure.colorbar(image, ax=grid.tolist(), label="nats per unit of ink", shrink=0.8)


def _heat_map(
    axes: "Axes", kernel: np.ndarray, feature_names: Sequence[str], class_names: Sequence[str]
) -> None:
    largest = np.abs(kernel).max()
    image = axes.imshow(
        kernel, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto", interpolation="nearest"
    )
    axes.set(title="Weights of each class", xlabel="class", ylabel="feature")
    _name_ticks(axes.xaxis, class_names)
    _name_ticks(axes.yaxis, feature_names)
    axes.figure.colorbar(image, ax=axes, label="nats per standard deviation")


def _confusion(
    axes: "Axes", labels: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]
) -> None:
    k = len(class_names)
    counts = np.zeros((k, k), int)
    np.add.at(counts, (labels, probabilities.argmax(-1)), 1)
    image = axes.imshow(counts, cmap="Blues")
    axes.set(title="Confusion matrix", xlabel="predicted class", ylabel="true class")
    _name_ticks(axes.xaxis, class_names)
    _name_ticks(axes.yaxis, class_names)
    if k <= 20:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                color = "white" if count > counts.max() / 2 else "black"
                axes.text(column, row, str(count), ha="center", va="center", color=color)
    axes.figure.colorbar(image, ax=axes, label="examples")


def _reliability(axes: "Axes", labels: np.ndarray, probabilities: np.ndarray) -> None:
    bins = reliability_diagram(probabilities, labels, num_bins=BINS)
    confidence, accuracy, weight = (np.asarray(values) for values in bins)
    filled = np.flatnonzero(weight)
    axes.plot([0, 1], [0, 1], color="gray", linestyle=":", label="calibrated")
    axes.plot(confidence[filled], accuracy[filled], marker="o", label="held-out examples")
    for b in filled:
        place = (confidence[b], accuracy[b])
        axes.annotate(f"{weight[b]:g}", place, xytext=(6, -12), textcoords="offset points")
    axes.set(title="Reliability, with the number of examples in each bin", xlim=(0, 1.1))
    axes.set(xlabel="confidence: probability of the predicted class", ylabel="share that is right")
    axes.set_ylim(0, 1.05)
    axes.legend(loc="upper left")


def _name_ticks(axis, names: Sequence[str]) -> None:
    """Up to 20 names along an axis, as they are: a $ begins no formula."""
    step = -(-len(names) // 20)
    axis.set_ticks(range(0, len(names), step), list(names)[::step], parse_math=False)
