"""Every test of the command line has a folder of its own, and small data."""

from pathlib import Path

import numpy as np
import pytest

from softjax import models


@pytest.fixture(autouse=True)
def _here(own_folder: None) -> None:
    """Every test has a folder of its own."""


@pytest.fixture
def data() -> str:
    """60 rows with 2 features and 3 classes."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 2)), np.arange(60) % 3
    x[:, 0] += y
    lines = [f"{a!r},{b!r},{'uvw'[k]}" for (a, b), k in zip(x.tolist(), y.tolist(), strict=True)]
    Path("data.csv").write_text("\n".join(["a,b,y", *lines]))
    return "data.csv"


@pytest.fixture
def model() -> Path:
    """A model with 2 features and 3 classes, whose names are not ASCII."""
    kernel = np.array([[1.0, 0.0, -1.0], [0.5, -0.5, 0.0]])
    model = models.Model(kernel, np.zeros(3), ["été", "日本", "x"], ["a", "b"])
    return model.save(Path("m.npz"))
