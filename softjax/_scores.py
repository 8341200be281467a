"""Accuracy of predictions, and precision, recall and F1 of each class."""

from typing import NamedTuple

import numpy as np


class Scores(NamedTuple):
    """Scores of predictions; scores of classes are arrays [K], NaN for 0 / 0."""

    accuracy: float  # the share of the examples whose predicted class is right
    precision: np.ndarray  # the share of the predictions of a class that are right
    recall: np.ndarray  # the share of the examples of a class that are predicted correctly
    f1: np.ndarray  # the harmonic mean of precision and recall, 2 hits / (predictions + examples)
    examples: np.ndarray  # the number of the examples of each class
    macro_f1: float  # the mean F1 of the classes that have examples or predictions


def scores(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> Scores:
    """The scores of predicted class indices [N] against the labels [N]."""
    right = labels == predicted
    hits, predictions, examples = (
        np.bincount(indices, minlength=num_classes)
        for indices in (labels[right], predicted, labels)
    )

    def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)

    f1 = share(2 * hits, predictions + examples)
    accuracy = float(np.mean(right)) if len(labels) else float("nan")
    macro = float(np.nanmean(f1)) if len(labels) else float("nan")
    return Scores(accuracy, share(hits, predictions), share(hits, examples), f1, examples, macro)
