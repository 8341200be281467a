"""How well a model predicts labels, compared with the most frequent class alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from softjax._scores import scores

# The figures of more classes than this are written to the file, but not printed.
MOST_SHOWN = 20


def metrics(
    labels: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str],
    majority: int,
    loss: float,
) -> dict[str, Any]:
    """Accuracy, and precision, recall and F1 of each class, as a dictionary for JSON.

        precision_k = hits_k / predicted_k,  recall_k = hits_k / examples_k
        F1_k = 2 hits_k / (predicted_k + examples_k)

    `probabilities` are [N, K]. The class `majority` is the most frequent one of the examples of the
    fit or, if these are unknown, of the predicted examples. A precision or a recall of 0 / 0 is
    None.
    """
    found = scores(labels, probabilities.argmax(axis=1), len(class_names))
    columns = (found.precision, found.recall, found.f1)
    shares = np.stack(columns, axis=1).astype(object)
    shares[np.isnan(shares.astype(float))] = None
    classes = {}
    for name, figures, count in zip(class_names, shares, found.examples.tolist(), strict=True):
        precision, recall, f1 = figures.tolist()
        classes[name] = {"precision": precision, "recall": recall, "f1": f1, "examples": count}
    return {
        "examples": len(labels),
        "loss": loss,
        "accuracy": found.accuracy,
        "majority_class": class_names[majority],
        "majority_accuracy": float(np.mean(labels == majority)),
        "macro_f1": found.macro_f1,
        "classes": classes,
    }


def metrics_table(found: dict[str, Any], title: str) -> Table:
    """The table of the figures of each class."""
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("class", "precision", "recall", "F1", "examples"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for name, figures in found["classes"].items():
        shares = (figures[key] for key in ("precision", "recall", "f1"))
        cells = ("-" if share is None else f"{share:.3f}" for share in shares)
        table.add_row(escape(name), *cells, str(figures["examples"]))
    return table


def print_metrics(console: Console, found: dict[str, Any], title: str) -> None:
    """Prints the figures of each class, unless there are too many classes, and the overall ones."""
    if len(found["classes"]) <= MOST_SHOWN:
        console.print(metrics_table(found, title))
    table = Table(show_header=False)
    for row in overall(found):
        table.add_row(*row)
    console.print(table)


def overall(found: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The figures of all classes together, as rows of a table, with a prefix of their names."""
    most = f"accuracy of {found['majority_class']!r} alone"
    return [
        (f"{prefix}loss", f"{found['loss']:.4f} nats"),
        (f"{prefix}accuracy", f"{found['accuracy']:.4f}"),
        (escape(most), f"{found['majority_accuracy']:.4f}"),
        ("mean F1 of the classes", f"{found['macro_f1']:.4f}"),
    ]
