"""The arguments of scikit-learn's estimators in the form that softjax.regression takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from sklearn.preprocessing import LabelEncoder
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_array, validate_data

from softjax._checks import native
from softjax._foreign import column_at, column_names, filled, is_lazy, numbers_of
from softjax.regression._frame import next_power_of_two

# Larger features, in bytes, are not copied: the copy would only save a compilation.
LARGEST = 2**26


class Examples(NamedTuple):
    """Checked features, labels and weights."""

    features: Any  # [N, D], float64 or float32, dense, or a SciPy CSR array or matrix
    labels: np.ndarray  # integer [N], the index of each label in `classes`
    sample_weights: np.ndarray | None  # [N]; None if all are 1
    classes: np.ndarray  # [K], the distinct labels, sorted
    offset: np.ndarray | None = None  # [N, K], nats; None for 0
    class_weights: np.ndarray | None = None  # [K]; None if all are 1

    @property
    def weights(self) -> np.ndarray | None:
        """Sample weights times class weights, [N]; None if all are 1."""
        if self.class_weights is None:
            return self.sample_weights
        factors = self.class_weights[self.labels]
        return factors if self.sample_weights is None else self.sample_weights * factors

    @property
    def mass(self) -> float:
        """The sum of the weights."""
        weights = self.weights
        return float(len(self.labels) if weights is None else weights.sum())

    def padded(self) -> "Examples":
        """The examples with rows of weight 0, so that tables of many sizes have the same shape."""
        count = len(self.labels)
        missing = bucket(count) - count
        if sparse.issparse(self.features) or self.features.nbytes > LARGEST:
            return self
        ones = np.ones(count, self.features.dtype)
        weights = ones if self.sample_weights is None else self.sample_weights
        return self._replace(
            features=_lengthened(self.features, missing),
            labels=_lengthened(self.labels, missing),
            sample_weights=_lengthened(weights, missing),
            offset=None if self.offset is None else _lengthened(self.offset, missing),
        )


def examples(
    estimator: Any,
    X: Any,
    y: Any,
    sample_weight: Any,
    classes: np.ndarray | None = None,
    offset: Any = None,
) -> Examples:
    """The arguments of `estimator.fit`, checked by scikit-learn's own functions.

    The estimator stores the names and the number of the features. With the `classes` of an earlier
    fit, which must contain all labels, they are compared with the features of that fit instead.
    """
    y, sample_weight = host_array(y), host_array(sample_weight)
    if (getattr(X, "ndim", 2), getattr(y, "ndim", 1)) == (1, 2):
        name = type(estimator).__name__
        raise ValueError(f"{name}: X must be [N, D] and y [N], got them in the other order")
    codes, known = _encoded_texts(y) if classes is None else (y, None)
    with naming_columns(estimator, X):
        validated: Any = validate_data(
            estimator,
            host_array(X),
            codes,
            accept_sparse="csr",
            dtype=[np.float64, np.float32],
            reset=classes is None,
        )
    X, labels = validated
    if known is not None:
        classes = known
    else:
        labels, classes = _encoded(labels, classes)
    if len(classes) < 2:
        name = type(estimator).__name__
        only = f"the data contains only one class: {classes.tolist()[0]!r}"
        raise ValueError(f"{name} needs samples of at least 2 classes in the data, but {only}")
    weights, factors = None, None
    if sample_weight is not None:
        weights = _check_sample_weight(sample_weight, X, dtype=X.dtype, ensure_non_negative=True)
    if estimator.class_weight is not None:
        with np.errstate(divide="ignore", invalid="ignore"):  # a class may have the weight 0
            factors = compute_class_weight(
                estimator.class_weight, classes=classes, y=classes[labels], sample_weight=weights
            )
        if isinstance(estimator.class_weight, str):  # then its factor does not matter
            factors = np.where(np.isfinite(factors), factors, 0)
        if not np.all(np.isfinite(factors) & (factors >= 0)):
            raise ValueError(f"class_weight must be finite and >= 0, got {estimator.class_weight}")
        factors = factors.astype(X.dtype)
        if not np.any(factors[labels] if weights is None else weights * factors[labels]):
            given = estimator.class_weight
            raise ValueError(f"class_weight must be > 0 where sample_weight is, got {given}")
    if offset is not None:
        offset = offset_array(offset, len(labels), len(classes), X.dtype)
    return Examples(X, labels, weights, classes, offset, factors)


def host_array(x: Any) -> Any:
    """`filled`, after an array of another library, such as JAX, has become one of NumPy.

    With `array_api_dispatch`, scikit-learn would not compare it with coefficients in NumPy. It also
    makes floats of the nullable integers and truth values of pandas, and does not know NumPy's
    dtype of texts of any length.
    """
    other = hasattr(x, "__array_namespace__") and not isinstance(x, np.ndarray)
    x = filled(np.asarray(x) if other else x)
    kind = getattr(getattr(x, "dtype", None), "kind", None)
    if kind == "T":
        return x.astype(object)
    if kind in ("b", "i", "u") and hasattr(x, "isna") and not x.isna().any():
        return numbers_of(np.asarray(x))
    return x


@contextmanager
def naming_columns(estimator: Any, X: Any) -> Iterator[None]:
    """Makes an error about a DataFrame name the first column that holds no numbers, if any does.

    Dates and durations are refused, which scikit-learn would take as numbers of nanoseconds.
    """
    expected = "a table of numbers (OneHotEncoder encodes categories)"
    named = (f"sklearn.{type(estimator).__name__}", "X", X, expected)
    if is_lazy(X):
        native(*named)
    is_table, are_dates = hasattr(X, "columns"), False
    try:
        parts = [X] if isinstance(X, np.ndarray) else [X[:1]] if is_table else []
        if is_table and not hasattr(X, "iloc"):  # Polars makes numbers of dates beside numbers
            parts = [column_at(parts[0], i) for i in range(len(column_names(X)))]
        are_dates = any(np.asarray(part).dtype.kind in "mM" for part in parts)
        if are_dates:
            raise TypeError
        yield
    except (TypeError, ValueError):
        if is_table or are_dates:
            native(*named)
        raise


def _encoded_texts(y: Any) -> tuple[Any, np.ndarray | None]:
    """The labels of a pandas Series of texts as integers, with the sorted classes, by pandas.

    pandas hashes the texts, which is faster than sorting them, and knows the missing ones. All
    other labels are returned as they are, with None.
    """
    if getattr(getattr(y, "dtype", None), "kind", None) != "O" or not hasattr(y, "factorize"):
        return y, None
    codes, texts = y.factorize()
    if not len(texts) or not all(isinstance(text, str) for text in texts):
        return y, None
    if codes.min() < 0:
        raise ValueError("Input y contains NaN among texts: a label is missing.")
    if 2 * len(texts) > len(codes):
        return y, None
    classes, places = np.unique(np.asarray(texts, object), return_inverse=True)
    return places[codes], classes


def _encoded(y: np.ndarray, classes: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Validated labels as integers, and the classes: those of an earlier fit, or new ones."""
    # scikit-learn sorts the labels to find their type, and warns if many are distinct. Texts,
    # integers and truth values are always classes, and sorting takes longer than encoding them.
    present = (label for label in y if not (label is None or isinstance(label, float)))
    are_texts = y.dtype.kind in "OU" and isinstance(next(present, None), str)
    are_classes = are_texts or y.dtype.kind in "biu"
    if not are_classes:
        check_classification_targets(y)
    encoder: Any = LabelEncoder()
    if classes is not None:
        encoder.classes_ = classes
        labels = encoder.transform(y)
    else:
        labels = encoder.fit_transform(y)
    classes = np.asarray(encoder.classes_)
    if are_texts and not isinstance(classes[-1], str):  # missing labels are sorted last
        raise ValueError(f"Input y contains {classes[-1]!r} among texts: a label is missing.")
    if are_classes and 2 * len(classes) > len(y):
        check_classification_targets(y)
    return labels, classes


def bucket(count: int) -> int:
    """The number of rows of a program for `count` rows: a power of two, and at least 64."""
    return max(next_power_of_two(count), 64)


def _lengthened(a: np.ndarray, missing: int) -> np.ndarray:
    return np.concatenate([a, np.zeros((missing, *a.shape[1:]), a.dtype)])


def offset_array(offset: Any, num_rows: int, num_classes: int, dtype: Any) -> np.ndarray:
    """The known part of the logits [N, K]; for two classes [N] is the offset of the second."""
    known = check_array(host_array(offset), ensure_2d=False, dtype=dtype, input_name="offset")
    if known.ndim == 1 and num_classes == 2:
        known = np.stack([np.zeros_like(known), known], axis=1)
    if known.shape != (num_rows, num_classes):
        or_one = f" or ({num_rows},)" if num_classes == 2 else ""
        expected = f"of shape ({num_rows}, {num_classes}){or_one}"
        raise ValueError(f"offset must be {expected}, got shape {known.shape}")
    return known


def as_jax(features: Any) -> Any:
    """SciPy's CSR in the sparse format of JAX; dense features are unchanged."""
    if not sparse.issparse(features):
        return features
    import jax
    from jax.experimental.sparse import BCOO

    rows = np.repeat(np.arange(features.shape[0], dtype=np.int32), np.diff(features.indptr))
    indices: Any = np.stack([rows, features.indices.astype(np.int32, copy=False)], axis=1)
    canonical = features.has_canonical_format
    return BCOO(
        (jax.device_put(features.data), jax.device_put(indices)),  # which compiles nothing
        shape=features.shape,
        indices_sorted=canonical,
        unique_indices=canonical,
    )
