"""Data that comes with softjax: 1,797 real handwritten digits, and a table of invented people."""

from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np

__all__ = ["PASSENGERS", "Digits", "load_digits"]

NUM_TRAIN = 1437
# A CSV file of 800 invented passengers of a ship, with categories, missing cells and row numbers;
# `_passengers.py` has generated it.
PASSENGERS = Path(str(files("softjax.datasets").joinpath("passengers.csv")))


class Digits(NamedTuple):
    """Handwritten digits, split into a training part and a held-out part.

    Attributes:
        train_features: float32 [1437, 64], ink from 0 to 1, with the rows of an image in sequence.
        train_labels: int32 [1437], the digit in the image.
        test_features: float32 [360, 64].
        test_labels: int32 [360], 36 of each digit.
        image_shape: (8, 8); reshaping a row of features to this shape gives the image.

    Example:
        >>> import softjax
        >>> digits = softjax.datasets.load_digits()
        >>> digits.train_features[0].reshape(digits.image_shape).shape
        (8, 8)
    """

    train_features: np.ndarray
    train_labels: np.ndarray
    test_features: np.ndarray
    test_labels: np.ndarray
    image_shape: tuple[int, int]


def load_digits() -> Digits:
    """The 1,797 real 8 x 8 handwritten digits, always in the same order and split.

    The 16 levels of ink are exact in float32. The held-out part was drawn once, 36 of each digit.

    Returns:
        `Digits`: NumPy arrays.

    Example:
        >>> import softjax
        >>> digits = softjax.datasets.load_digits()
        >>> digits.train_features.shape, digits.test_features.shape
        ((1437, 64), (360, 64))

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits (test part), UCI
    Machine Learning Repository, 1998, doi 10.24432/C50P49; CC BY 4.0.
    """
    with files("softjax.datasets").joinpath("digits.npz").open("rb") as file, np.load(file) as data:
        images, labels = data["images"], data["labels"]
    features = images.reshape(len(images), -1).astype(np.float32) / np.float32(16)
    labels = labels.astype(np.int32)
    return Digits(
        features[:NUM_TRAIN],
        labels[:NUM_TRAIN],
        features[NUM_TRAIN:],
        labels[NUM_TRAIN:],
        images.shape[1:],
    )
