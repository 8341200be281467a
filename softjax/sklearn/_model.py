"""The common parts of the classifiers: penalties, predictions and statistics."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, ClassVar

import jax
import numpy as np
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning

# Every linear classifier of scikit-learn inherits its decision function and its sparse coefficients
# from these two classes, which have no public name.
from sklearn.linear_model._base import LinearClassifierMixin, SparseCoefMixin
from sklearn.metrics import accuracy_score
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted

from softjax import regression
from softjax._softmax import log_softmax, softmax
from softjax.regression import SoftmaxRegression, inference
from softjax.regression.inference._optimum import NotAtOptimumError
from softjax.sklearn._examples import (
    Examples,
    as_jax,
    bucket,
    examples,
    host_array,
    naming_columns,
    offset_array,
)

# The default tolerance gives a float64 fit nearly all its digits, which takes Newton's method one
# more step. In float32, rounding would hide such a small gradient.
TOL = {"float64": 1e-10, "float32": 1e-6}

# Why a fit stopped before the optimum, and what the user can do.
ADVICE = {
    regression.STEP_LIMIT: "it took all the steps that `max_iter` allows",
    regression.PRECISION_FLOOR: "the rounding of {dtype} hides any further progress",
    regression.SEPARATED: "the features separate the classes, so that the loss falls without end "
    "as the coefficients grow; a smaller `C` gives an optimum",
    regression.QUASI_SEPARATED: "some coefficients grow without end: the features separate a part "
    "of the examples, for which a smaller `C` may give an optimum, or a class has no weight, for "
    "which none does",
    regression.NON_FINITE: "the objective is no longer finite",
}


@contextmanager
def _naming_the_cause(stop_reason: str) -> Iterator[None]:
    """Says what the user can change if the coefficients are not at the optimum for the data."""
    try:
        yield
    except NotAtOptimumError as error:
        why = "X, y, the weights and the offset are not those of the fit, or have changed since it"
        if stop_reason != regression.CONVERGED:
            advice = ADVICE.get(stop_reason, "it was stopped").format(dtype="its dtype")
            why = f"the fit has not converged: {advice}"
        raise ValueError(
            f"summary: the coefficients are not an optimum for these data: {why}"
        ) from error


def penalties(data: Examples, C: Any, l1_ratio: float) -> tuple[Any, Any]:
    """l2 and l1 of `softjax.regression.fit` for C, a number or a grid.

    scikit-learn sums the losses, and its model for two classes has one column w of coefficients:
    c / 2 |w|^2 equals l2 / 2 |(-w / 2, w / 2)|^2 for l2 = 2 c. A penalty that the dtype cannot hold
    (of tiny weights or a tiny C) becomes its largest number: the coefficients are 0 with either.
    """
    columns = 2 if len(data.classes) == 2 else 1
    with np.errstate(over="ignore", divide="ignore"):
        strength = np.minimum(np.divide(1, data.mass) / C, np.finfo(data.features.dtype).max / 2)
    return (1 - l1_ratio) * columns * strength, l1_ratio * strength


class SoftmaxModel(LinearClassifierMixin, SparseCoefMixin, BaseEstimator):
    """The common methods of all fitted classifiers: predictions and statistics."""

    classes_: np.ndarray
    coef_: Any
    intercept_: Any
    stop_reason_: str
    l2_: float
    l1_: float
    fit_intercept: bool
    l1_ratio: float
    _data: tuple[Any, ...]
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "l1_ratio": [Interval(Real, 0, 1, closed="both")],
        "fit_intercept": ["boolean"],
        "class_weight": [dict, StrOptions({"balanced"}), None],
        "tol": [Interval(Real, 0, None, closed="left"), None],
        "max_iter": [Interval(Integral, 0, None, closed="left"), None],
    }

    def decision_function(self, X: Any, offset: Any = None) -> np.ndarray:
        """The logits of the classes; for two classes, the second logit minus the first.

        Args:
            X: features [N, D].
            offset: the offset of these rows, as in `fit`; None for 0.

        Returns:
            [N, K], or [N] for two classes, nats.
        """
        with naming_columns(self, X):
            z = super().decision_function(host_array(X))
        if offset is None:
            return z
        known = offset_array(offset, len(z), len(self.classes_), z.dtype)
        return z + known if z.ndim == 2 else z + (known[:, 1] - known[:, 0])

    def predict(self, X: Any, offset: Any = None) -> np.ndarray:
        """The most probable class of each row.

        Args:
            X: features [N, D].
            offset: the offset of these rows, as in `fit`; None for 0.

        Returns:
            [N], labels from `classes_`.
        """
        z = self.decision_function(X, offset)
        return self.classes_[(z > 0).astype(int) if z.ndim == 1 else z.argmax(axis=1)]

    def score(self, X: Any, y: Any, sample_weight: Any = None, offset: Any = None) -> float:
        """The accuracy: the share of the labels that are predicted correctly.

        Args:
            X: features [N, D].
            y: labels [N].
            sample_weight: [N], >= 0; None for 1.
            offset: the offset of these rows, as in `fit`; None for 0.
        """
        y, sample_weight = host_array(y), host_array(sample_weight)
        return accuracy_score(y, self.predict(X, offset), sample_weight=sample_weight)

    def predict_proba(self, X: Any, offset: Any = None) -> np.ndarray:
        """The probabilities of the classes.

        Args:
            X: features [N, D].
            offset: the offset of these rows, as in `fit`; None for 0.

        Returns:
            [N, K], rows that sum to 1, in the order of `classes_`.
        """
        return self._normalised(softmax, X, offset)

    def predict_log_proba(self, X: Any, offset: Any = None) -> np.ndarray:
        """The log-probabilities of the classes, accurate for probabilities near 0 and near 1.

        Args:
            X: features [N, D].
            offset: the offset of these rows, as in `fit`; None for 0.

        Returns:
            [N, K], nats, in the order of `classes_`; finite even if a probability underflows to 0.
        """
        return self._normalised(log_softmax, X, offset)

    @property
    def penalty(self) -> str:
        """The kind of the penalty. `SelectFromModel` keeps all but zeros if it is "l1"."""
        return {0.0: "l2", 1.0: "l1"}.get(self.l1_ratio, "elasticnet")

    @property
    def params_(self) -> SoftmaxRegression:
        """The parameters in the form of `softjax.regression`: kernel [D, K] and bias [K]."""
        check_is_fitted(self)
        coef = self.coef_.toarray() if hasattr(self.coef_, "toarray") else self.coef_
        if len(self.classes_) > 2:
            return SoftmaxRegression(coef.T, self.intercept_)
        # For two classes only the difference of the columns counts: each column gets half of it.
        halves: Any = np.array([-0.5, 0.5], coef.dtype)
        return SoftmaxRegression(coef.T * halves, self.intercept_ * halves)

    def summary(
        self,
        X: Any = None,
        y: Any = None,
        sample_weight: Any = None,
        *,
        reference: Any = ...,
        odds_ratios: bool = False,
        marginal_effects: bool = False,
        level: float = 0.95,
        robust: bool | str = False,
        clusters: Any = None,
        offset: Any = None,
        feature_names: Any = None,
    ) -> inference.Summary:
        """A table of the coefficients with standard errors, tests and intervals, and of the fit.

        Features and classes have the names that they have in the data. The last step of a pipeline
        gets arrays without names: pass `feature_names=pipeline[:-1].get_feature_names_out()`.

        A weight of `class_weight` is not a number of examples: it counts squared in the covariance,
        which is then the sandwich, and the likelihood ratio, AIC and BIC are left out.

        Args:
            X: the features of the fit; None for the data of the last `fit`. The classifier keeps a
                reference to them, which is not pickled or copied.
            y: the labels of the fit.
            sample_weight: the weights of the fit, which are counted as numbers of examples. For
                other weights, such as survey weights, pass `clusters=np.arange(N)`.
            reference: the label of the class with which the others are compared; if left out, the
                first of `classes_`. None compares each class with the mean of all classes.
            odds_ratios: whether the table shows odds ratios in place of their logarithms.
            marginal_effects: whether it shows the average marginal effects on the probabilities of
                all classes, which need no reference, in place of the coefficients.
            level: the confidence level, in (0, 1).
            robust: whether to use the sandwich covariance, which does not assume that the model is
                correct; "HC1", "HC2" or "HC3" correct it for few examples.
            clusters: [N], equal within a cluster, for clustered standard errors; implies `robust`.
            offset: the offset of the fit.
            feature_names: D names; None for those of the data of the fit, else x0, x1, ...

        Returns:
            `softjax.regression.inference.Summary`.

        Raises:
            ValueError: the features are collinear; the fit has l1, used solver "firth", or is not
                at its optimum; no data are known, or they are not those of the fit or have changed.
        """
        check_is_fitted(self)
        if X is None:
            if "_data" not in self.__dict__:
                raise ValueError("summary: pass the X and y of the fit; a copy does not hold them")
            X, y, sample_weight, offset = self._data
        if self.l1_ > 0 or getattr(self, "solver", None) == "firth":
            what = "l1, which selects coefficients by the same data, or by solver='firth'"
            raise ValueError(
                f"summary: there are no standard errors of a fit with {what}; fit with l2 alone"
            )
        if self.stop_reason_ in (regression.SEPARATED, regression.QUASI_SEPARATED):
            raise ValueError(f"summary: there is no optimum: {ADVICE[self.stop_reason_]}")
        data = examples(self, X, y, sample_weight, self.classes_, offset)
        count, data = len(data.labels), data.padded()
        if clusters is not None:
            clusters = np.asarray(host_array(clusters))
            if (got := clusters.shape) != (count,):
                raise ValueError(f"clusters must be of shape ({count},), got shape {got}")
            # An added row has weight 0 and so belongs to no cluster, whatever its entry is.
            clusters = np.pad(clusters, (0, len(data.labels) - count), mode="edge")
        names = [str(name) for name in self.classes_.tolist()]
        if feature_names is None:
            feature_names = getattr(self, "feature_names_in_", None)
        place = 0 if reference is ... else None
        if reference is not ... and reference is not None:
            places = np.flatnonzero(self.classes_ == reference)
            if len(places) != 1:
                raise ValueError(f"reference must be one of {names}, got {reference!r}")
            place = int(places[0])
        # The fit divides by the sum of all weights, `inference` by the sum of the sample weights.
        l2 = self.l2_ * data.mass / data._replace(class_weights=None).mass
        with jax.enable_x64(True), _naming_the_cause(self.stop_reason_):
            return inference.summary(
                self.params_,
                as_jax(data.features),
                data.labels,
                reference=place,
                odds_ratios=odds_ratios,
                marginal_effects=marginal_effects,
                level=level,
                robust=robust,
                clusters=clusters,
                l2=l2,
                sample_weights=data.sample_weights,
                class_weights=data.class_weights,
                fit_intercept=self.fit_intercept,
                offset=data.offset,
                feature_names=feature_names,
                class_names=names,
            )

    def _normalised(self, normalizer: Callable, X: Any, offset: Any) -> np.ndarray:
        """Applies `softmax` or `log_softmax` to the logits of every row."""
        z = self.decision_function(X, offset)
        if z.ndim == 1:
            z = np.stack([np.zeros_like(z), z], axis=1)
        # The rows are padded to a power of two, so that few programs are compiled.
        padded = np.zeros((bucket(len(z)), z.shape[1]), z.dtype)
        padded[: len(z)] = z
        with jax.enable_x64(True):
            return np.array(normalizer(padded))[: len(z)]

    def _set_params(self, params: SoftmaxRegression, l2: float, l1: float) -> None:
        """Sets the coefficients; for two classes, the second column minus the first."""
        kernel, bias = (np.asarray(part) for part in params)
        # Adding a vector to all classes changes no probability. The mean over the classes is set to
        # 0, as l2 would do; with l1 the kernel is not centred, which would fill in its zeros.
        bias = bias - bias.mean()
        if l1 == 0:
            kernel = kernel - kernel.mean(axis=1, keepdims=True)
        if len(bias) == 2:
            kernel, bias = kernel[:, 1:] - kernel[:, :1], bias[1:] - bias[:1]
        self.coef_, self.intercept_ = np.ascontiguousarray(kernel.T), bias
        self.l2_, self.l1_ = l2, l1

    def _warn_unless_converged(self, reason: str, steps: int) -> None:
        if reason == regression.CONVERGED:
            return
        advice = ADVICE.get(reason, "it was stopped").format(dtype=self.coef_.dtype)
        name, took = type(self).__name__, f"{steps} step{'s'[: steps != 1]}"
        message = f"{name} has not converged: its status is {reason!r} after {took}: {advice}."
        warnings.warn(message, ConvergenceWarning, stacklevel=4)

    def __getstate__(self) -> dict[str, Any]:
        """The state for pickle and copy, without the data of the fit."""
        state: Any = super().__getstate__()
        return {name: value for name, value in state.items() if name != "_data"}

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags
