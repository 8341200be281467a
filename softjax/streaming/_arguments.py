"""What all of streaming takes: dtypes and labels."""

import jax
import numpy as np

from softjax import _checks
from softjax._numerics import compute_dtype


def computed_in(dtype: np.dtype) -> np.dtype:
    """float64 where the features are and it is on, else float32."""
    if not np.issubdtype(dtype, np.floating):
        dtype = np.dtype(float)
    return np.dtype(compute_dtype(jax.dtypes.canonicalize_dtype(dtype)))


def as_indices(labels: np.ndarray) -> np.ndarray:
    """Class indices in int32; -1, which no class has, for what is none."""
    if not np.issubdtype(labels.dtype, np.number):
        expected, got = "class indices", f"dtype {labels.dtype}"
        raise TypeError(_checks.message("streaming", "labels", expected, got))
    whole = (labels >= 0) & (labels < 2**31) & (labels == np.floor(labels))
    return np.where(whole, labels, -1).astype(np.int32)
