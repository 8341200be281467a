"""SoftmaxClassifier: softjax.regression.fit as an estimator of scikit-learn."""

import warnings
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, ClassVar

import jax
import numpy as np
from sklearn.base import BaseEstimator, _fit_context
from sklearn.exceptions import ConvergenceWarning

# Every linear classifier of scikit-learn has its decision function and its sparse coefficients
# from these two, which have no public name.
from sklearn.linear_model._base import LinearClassifierMixin, SparseCoefMixin
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted

from softjax import regression
from softjax._softmax import log_softmax, softmax
from softjax.regression import SoftmaxRegression, inference
from softjax.sklearn._examples import Examples, as_jax, examples

SOLVERS = ("auto", "newton-cg", "newton", "lbfgs", "proximal", "firth")

# Of float64 a fit is expected to have nearly all digits, for which Newton's method takes one step
# more; the rounding of float32 would hide them.
TOL = {"float64": 1e-10, "float32": 1e-6}

# What a user may do where the fit has stopped without an optimum.
ADVICE = {
    regression.STEP_LIMIT: "it took all the steps that `max_iter` allows",
    regression.PRECISION_FLOOR: "the rounding of {dtype} hides any further progress",
    regression.SEPARATED: "the features separate the classes, so that the loss falls without end "
    "as the coefficients grow; a smaller `C` gives an optimum",
    regression.QUASI_SEPARATED: "some coefficients grow without end, since the features separate a "
    "part of the examples, or a class has no weight; a smaller `C` may give an optimum",
    regression.NON_FINITE: "the objective is no longer finite",
}


def penalties(data: Examples, C: Any, l1_ratio: float) -> tuple[Any, Any]:
    """l2 and l1 of `softjax.regression.fit` for C, a number or a grid.

    The loss of scikit-learn is a sum, and its coefficients of two classes are one column:
    c / 2 |w|^2 is l2 / 2 |(-w / 2, w / 2)|^2 for l2 = 2 c.
    """
    columns = 2 if len(data.classes) == 2 else 1
    return (1 - l1_ratio) * (columns / data.mass) / C, l1_ratio / (data.mass * C)


class SoftmaxModel(LinearClassifierMixin, SparseCoefMixin, BaseEstimator):
    """What the classifiers have in common once they are fitted: predictions and statistics."""

    classes_: np.ndarray
    coef_: Any
    intercept_: Any
    l2_: float
    l1_: float
    fit_intercept: bool

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probabilities of the classes.

        Args:
            X: features [N, D].

        Returns:
            [N, K], rows that sum to 1, in the order of `classes_`.
        """
        return self._normalised(softmax, X)

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """The log-probabilities of the classes, accurate where a probability is near 0 or near 1.

        Args:
            X: features [N, D].

        Returns:
            [N, K], nats, in the order of `classes_`; finite where a probability underflows to 0.
        """
        return self._normalised(log_softmax, X)

    @property
    def params_(self) -> SoftmaxRegression:
        """The parameters in the form of `softjax.regression`: kernel [D, K] and bias [K]."""
        check_is_fitted(self)
        coef = self.coef_.toarray() if hasattr(self.coef_, "toarray") else self.coef_
        if len(self.classes_) > 2:
            return SoftmaxRegression(coef.T, self.intercept_)
        # Of two classes only the difference of the columns counts: half of it is for each.
        halves: Any = np.array([-0.5, 0.5], coef.dtype)
        return SoftmaxRegression(coef.T * halves, self.intercept_ * halves)

    def summary(
        self,
        X: Any = None,
        y: Any = None,
        sample_weight: Any = None,
        *,
        reference: Any = None,
        level: float = 0.95,
        robust: bool = False,
        clusters: Any = None,
    ) -> inference.Summary:
        """The table of the fit: coefficients with standard errors, tests, intervals, and its fit.

        Features and classes have the names that they had in the data.

        Args:
            X: the features that the classifier was fitted to; None for those of the last `fit`, to
                which a reference is kept that is not pickled or copied.
            y: the labels that it was fitted to.
            sample_weight: the weights that it was fitted with. They count as numbers of examples.
            reference: the class that the others are compared with; None for the first.
            level: the confidence level, in (0, 1).
            robust: whether the labels may vary otherwise than the model says.
            clusters: [N], equal within a cluster; implies `robust`.

        Returns:
            `softjax.regression.inference.Summary`.

        Raises:
            ValueError: features that are collinear; a fit with l1, by "firth", or that is not at
                its optimum; no data.
        """
        check_is_fitted(self)
        if X is None:
            X, y, sample_weight = self._fitted_to()
        if self.l1_ > 0 or getattr(self, "solver", None) == "firth":
            raise ValueError("summary: there are no standard errors of a fit with l1 or by 'firth'")
        data = examples(self, X, y, sample_weight, self.classes_)
        names = [str(name) for name in self.classes_.tolist()]
        place = 0
        if reference is not None:
            places = np.flatnonzero(self.classes_ == reference)
            if len(places) != 1:
                raise ValueError(f"reference must be one of {names}, got {reference!r}")
            place = int(places[0])
        with jax.enable_x64(True):
            return inference.summary(
                self.params_,
                as_jax(data.features),
                data.labels,
                reference=place,
                level=level,
                robust=robust,
                clusters=clusters,
                l2=self.l2_,
                sample_weights=data.weights,
                fit_intercept=self.fit_intercept,
                feature_names=getattr(self, "feature_names_in_", None),
                class_names=names,
            )

    def _normalised(self, normalizer: Callable, X: Any) -> np.ndarray:
        """The normalizer of every row of logits."""
        z = self.decision_function(X)
        if z.ndim == 1:
            z = np.stack([np.zeros_like(z), z], axis=1)
        # The rows are padded to a power of two: few programs serve all numbers of rows.
        padded = np.zeros((1 << max(len(z) - 1, 63).bit_length(), z.shape[1]), z.dtype)
        padded[: len(z)] = z
        with jax.enable_x64(True):
            return np.array(normalizer(padded))[: len(z)]

    def _set_params(self, params: SoftmaxRegression, l2: float, l1: float) -> None:
        """Sets the coefficients, of two classes as those of the second against the first."""
        kernel, bias = (np.asarray(part) for part in params)
        # A vector added to all classes changes no probability: the mean over the classes is 0,
        # as l2 makes it. With l1 it would undo the zeros of the kernel.
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

    def _fitted_to(self) -> tuple[Any, Any, Any]:
        if "_data" not in self.__dict__:
            raise ValueError("summary: pass the X and y of the fit; a copy does not hold them")
        return self.__dict__["_data"]

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled and copied: all but the data of the fit."""
        state: Any = super().__getstate__()
        return {name: value for name, value in state.items() if name != "_data"}

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags


class SoftmaxClassifier(SoftmaxModel):
    """Softmax regression (multinomial logistic regression) as a classifier of scikit-learn.

        argmin C sum_i w_i loss_i + (1 - l1_ratio) / 2 |coef|^2 + l1_ratio |coef|_1

    with w_i the sample weight times the weight of the class, as `LogisticRegression` has it; the
    intercept is not penalised. In the terms of `softjax.regression.fit`, whose loss is a mean, and
    whose kernel has two columns for two classes:

        l2 = (1 - l1_ratio) / (C sum_i w_i),      l1 = l1_ratio / (C sum_i w_i)     for K > 2
        l2 = 2 (1 - l1_ratio) / (C sum_i w_i),    l1 = l1_ratio / (C sum_i w_i)     for K = 2

    since a coefficient c of two classes is -c / 2 and c / 2 in two columns, of half the square.

    float64 features are computed with in float64 whether or not `jax_enable_x64` is on, float32 in
    float32. SciPy's sparse arrays are not made dense. The fit warns by `ConvergenceWarning` where
    it has not found the optimum, and says why.

    Args:
        C: > 0, the inverse strength of the penalty; `np.inf` for none.
        l2: >= 0, the penalty of `softjax.regression.fit` in place of `C`; None to use `C`.
        l1_ratio: in [0, 1], the part of l1 in the penalty; 0 is ridge and 1 the lasso.
        fit_intercept: whether there is an intercept; without one `intercept_` is 0.
        class_weight: a dictionary {label: weight}, or "balanced" for N / (K N_k); None for 1.
        tol: that of `softjax.regression.fit`; None for 1e-10 in float64 and 1e-6 in float32.
        max_iter: the largest number of steps; None for that of the solver.
        warm_start: whether a fit starts at the coefficients of the one before.
        solver: "auto", "newton-cg", "newton", "lbfgs", "proximal" or "firth", as
            `softjax.regression.fit` has them. All find the same optimum; only "proximal" takes l1,
            and "firth" has a penalty of its own, so that it needs `C=np.inf`.
        random_state: without effect, for no solver draws anything at random. It is there for
            programs that set it on every estimator.

    Attributes:
        coef_: [K, D], or [1, D] of two classes: those of the second class against the first.
        intercept_: [K] or [1].
        classes_: the labels [K], in order.
        n_features_in_: D.
        feature_names_in_: the names [D] of the columns, where X had such.
        n_iter_: [1], the number of steps.
        stop_reason_: why the fit stopped: "converged", or as `FitResult.stop_reason` has it.
        objective_: the objective of `softjax.regression.fit` at the optimum, nats.
        l2_, l1_: the penalties of `softjax.regression.fit`.
        params_: kernel [D, K] and bias [K], for the functions of `softjax.regression`.

    Example:
        >>> import numpy as np
        >>> from softjax.sklearn import SoftmaxClassifier
        >>> X, y = np.array([[0.0], [1.0], [2.0], [3.0]]), np.array(["no", "yes", "no", "yes"])
        >>> classifier = SoftmaxClassifier(C=10.0).fit(X, y)
        >>> classifier.predict([[0.5], [2.5]]).tolist()
        ['no', 'yes']
        >>> classifier.coef_.round(4)
        array([[0.8155]])

    Source: F. Pedregosa et al., "Scikit-learn: machine learning in Python" (2011).
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "C": [Interval(Real, 0, None, closed="right")],
        "l2": [Interval(Real, 0, None, closed="left"), None],
        "l1_ratio": [Interval(Real, 0, 1, closed="both")],
        "fit_intercept": ["boolean"],
        "class_weight": [dict, StrOptions({"balanced"}), None],
        "tol": [Interval(Real, 0, None, closed="left"), None],
        "max_iter": [Interval(Integral, 0, None, closed="left"), None],
        "warm_start": ["boolean"],
        "solver": [StrOptions(set(SOLVERS))],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        *,
        C: float = 1.0,
        l2: float | None = None,
        l1_ratio: float = 0.0,
        fit_intercept: bool = True,
        class_weight: dict | str | None = None,
        tol: float | None = None,
        max_iter: int | None = None,
        warm_start: bool = False,
        solver: str = "auto",
        random_state: Any = None,
    ):
        self.C = C
        self.l2 = l2
        self.l1_ratio = l1_ratio
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight
        self.tol = tol
        self.max_iter = max_iter
        self.warm_start = warm_start
        self.solver = solver
        self.random_state = random_state

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "SoftmaxClassifier":
        """Fits the coefficients.

        Args:
            X: features [N, D]: NumPy, a DataFrame, or SciPy's sparse arrays and matrices.
            y: labels [N]: numbers, text, truth values or pandas categories.
            sample_weight: [N], >= 0; None for 1.

        Returns:
            The classifier.

        Raises:
            ValueError: what scikit-learn's checks refuse, as NaN or labels of one class only; a
                parameter that contradicts another one.
        """
        data = examples(self, X, y, sample_weight)
        l2, l1 = self._penalties(data)
        init = None
        if self.warm_start and hasattr(self, "coef_"):
            init = self._start(data)
        self.classes_ = data.classes
        tol = TOL[data.features.dtype.name] if self.tol is None else self.tol
        with jax.enable_x64(True):
            result = regression.fit(
                as_jax(data.features),
                data.labels,
                solver=self.solver,
                l2=l2,
                l1=l1,
                tol=tol,
                max_steps=self.max_iter,
                num_classes=len(data.classes),
                sample_weights=data.weights,
                fit_intercept=self.fit_intercept,
                init=init,
            )
        self._set_params(result.params, l2, l1)
        self.n_iter_ = np.array([result.steps], np.int32)
        self.stop_reason_, self.objective_ = result.stop_reason, result.objective
        self._data = X, y, sample_weight
        self._warn_unless_converged(result.stop_reason, result.steps)
        return self

    def _penalties(self, data: Examples) -> tuple[float, float]:
        """l2 and l1 of `softjax.regression.fit`."""
        if self.l2 is not None:
            if self.l1_ratio != 0:
                raise ValueError("l1_ratio divides the penalty of C: with l2 it must be 0")
            l2, l1 = float(self.l2), 0.0
        else:
            l2, l1 = penalties(data, self.C, self.l1_ratio)
        if self.solver == "firth" and (l2, l1) != (0, 0):
            raise ValueError("solver='firth' has a penalty of its own: it needs C=np.inf or l2=0")
        return l2, l1

    def _start(self, data: Examples) -> SoftmaxRegression | None:
        """The parameters of the fit before, where they have the shape of this one."""
        params = self.params_
        if params.kernel.shape != (data.features.shape[1], len(data.classes)):
            return None
        return params if self.fit_intercept else params._replace(bias=0 * params.bias)
