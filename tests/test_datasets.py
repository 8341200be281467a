"""The embedded digits."""

from pathlib import Path

import numpy as np
import pytest

import softjax

pytestmark = pytest.mark.x64_once


def test_the_digits_are_those_of_scikit_learn_in_a_fixed_split():
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    digits = softjax.datasets.load_digits()
    features = np.concatenate([digits.train_features, digits.test_features])
    labels = np.concatenate([digits.train_labels, digits.test_labels])
    images, targets = sklearn_datasets.load_digits(return_X_y=True)
    ours = sorted(
        (int(y), (16 * x).astype(int).tolist()) for x, y in zip(features, labels, strict=True)
    )
    theirs = sorted((int(y), x.astype(int).tolist()) for x, y in zip(images, targets, strict=True))
    assert ours == theirs


def test_the_split_is_stratified_and_the_ink_between_0_and_1():
    digits = softjax.datasets.load_digits()
    assert digits.train_features.shape == (1437, 64)
    assert digits.test_features.shape == (360, 64)
    assert digits.train_features.dtype == np.float32
    assert digits.train_labels.dtype == np.int32
    assert np.bincount(digits.test_labels).tolist() == [36] * 10
    assert digits.train_features.min() == 0
    assert digits.train_features.max() == 1
    assert np.prod(digits.image_shape) == 64


def test_every_call_gives_new_arrays():
    digits = softjax.datasets.load_digits()
    digits.train_features[:] = -1
    assert softjax.datasets.load_digits().train_features.min() == 0


def test_source_and_licence_stand_beside_the_data():
    text = (Path(softjax.datasets.__file__).parent / "README.md").read_text()
    assert "CC BY 4.0" in text
    assert "Alpaydin" in text
