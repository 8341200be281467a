"""What scikit-learn's estimators are given, as softjax.regression takes it."""

from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from sklearn.preprocessing import LabelEncoder
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, validate_data


class Examples(NamedTuple):
    """Checked features, labels and weights.

    Attributes:
        features: [N, D], float64 or float32, dense, or a SciPy CSR array or matrix.
        labels: [N], integer, the place of each label in `classes`.
        weights: [N], the sample weights times those of the classes; None where all are 1.
        classes: [K], the distinct labels in order.
    """

    features: Any
    labels: np.ndarray
    weights: np.ndarray | None
    classes: np.ndarray

    @property
    def mass(self) -> float:
        """The sum of the weights."""
        return float(len(self.labels) if self.weights is None else self.weights.sum())


def examples(
    estimator: Any, X: Any, y: Any, sample_weight: Any, classes: np.ndarray | None = None
) -> Examples:
    """The arguments of `estimator.fit`, checked by scikit-learn's own helpers.

    Args:
        estimator: whose names and number of features are set; with `classes` they are compared.
        X: features [N, D], as `validate_data` takes them.
        y: labels [N] of any type that has an order.
        sample_weight: [N], >= 0, a number, or None.
        classes: those of a fit, to which the labels have to belong; None for a new fit.
    """
    validated: Any = validate_data(
        estimator,
        X,
        y,
        accept_sparse="csr",
        dtype=[np.float64, np.float32],
        order="C",
        reset=classes is None,
    )
    X, y = validated
    check_classification_targets(y)
    encoder: Any = LabelEncoder()
    if classes is not None:
        encoder.classes_ = classes
        labels = encoder.transform(y)
    else:
        labels = encoder.fit_transform(y)
    classes = np.asarray(encoder.classes_)
    if len(classes) < 2:
        name = type(estimator).__name__
        only = f"the data contains only one class: {classes.tolist()[0]!r}"
        raise ValueError(f"{name} needs samples of at least 2 classes in the data, but {only}")
    weights = None
    if sample_weight is not None:
        weights = _check_sample_weight(sample_weight, X, dtype=X.dtype, ensure_non_negative=True)
    if estimator.class_weight is not None:
        factors = compute_class_weight(
            estimator.class_weight, classes=classes, y=y, sample_weight=weights
        )
        factors = factors.astype(X.dtype)[labels]
        weights = factors if weights is None else weights * factors
    return Examples(X, labels, weights, classes)


def as_jax(features: Any) -> Any:
    """SciPy's CSR in the sparse format of JAX; anything else as it is."""
    if not sparse.issparse(features):
        return features
    from jax.experimental.sparse import BCOO

    rows = np.repeat(np.arange(features.shape[0], dtype=np.int32), np.diff(features.indptr))
    indices: Any = np.stack([rows, features.indices.astype(np.int32, copy=False)], axis=1)
    canonical = features.has_canonical_format
    return BCOO(
        (features.data, indices),
        shape=features.shape,
        indices_sorted=canonical,
        unique_indices=canonical,
    )
