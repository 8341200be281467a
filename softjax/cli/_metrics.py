"""How a model does on the held-out examples, beside the class that is most frequent."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

# A table of more classes than this is in the file alone.
MOST_SHOWN = 20


def metrics(
    labels: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str],
    majority: int,
    loss: float,
) -> dict[str, Any]:
    """Accuracy, and precision, recall and F1 of each class.

        precision_k = hits_k / predicted_k,  recall_k = hits_k / examples_k
        F1_k = 2 hits_k / (predicted_k + examples_k)

    Args:
        labels: [N], held-out class indices.
        probabilities: [N, K], predicted for them.
        class_names: K names.
        majority: the class that is most frequent among the examples to fit.
        loss: the mean loss of the held-out examples, nats.

    Returns:
        What JSON can hold; None for a precision or a recall that is 0 / 0.
    """
    k = len(class_names)
    predicted = probabilities.argmax(axis=1)
    hits = np.bincount(labels[predicted == labels], minlength=k)
    chosen, there = np.bincount(predicted, minlength=k), np.bincount(labels, minlength=k)

    def share(part: int, whole: int) -> float | None:
        return part / whole if whole else None

    classes = {}
    for i, name in enumerate(class_names):
        h, p, n = hits[i].item(), chosen[i].item(), there[i].item()
        f1 = share(2 * h, p + n)
        figures = {"precision": share(h, p), "recall": share(h, n), "f1": f1, "examples": n}
        classes[name] = figures
    f1 = [figures["f1"] for figures in classes.values() if figures["f1"] is not None]
    return {
        "examples": len(labels),
        "loss": loss,
        "accuracy": float(np.mean(predicted == labels)),
        "majority_class": class_names[majority],
        "majority_accuracy": float(np.mean(labels == majority)),
        "macro_f1": float(np.mean(f1)),
        "classes": classes,
    }


def metrics_table(found: dict[str, Any]) -> Table:
    """The figures of each class."""
    table = Table(title="Held-out examples", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("class", "precision", "recall", "F1", "examples"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for name, figures in found["classes"].items():
        shares = (figures[key] for key in ("precision", "recall", "f1"))
        cells = ("-" if share is None else f"{share:.3f}" for share in shares)
        table.add_row(name, *cells, str(figures["examples"]))
    return table
