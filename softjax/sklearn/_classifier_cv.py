"""SoftmaxClassifierCV: the penalty chosen by cross-validation, all folds fitted at once."""

from numbers import Integral
from typing import Any, ClassVar

import jax
import numpy as np
from sklearn.base import _fit_context
from sklearn.model_selection import check_cv
from sklearn.utils._param_validation import Interval, StrOptions

from softjax import regression
from softjax.sklearn._examples import as_jax, examples
from softjax.sklearn._model import TOL, SoftmaxModel, penalties


class SoftmaxClassifierCV(SoftmaxModel):
    """Softmax regression whose penalty is chosen by cross-validation.

        C = argmax_c mean_f score_cf, or the smallest C whose mean score is within one standard
            error of the largest one

    The objective at each C is the objective of `SoftmaxClassifier`, but with the mean loss of a
    fold, so that C means the same penalty for folds of any size. `softjax.regression.fit_path`
    computes the fits without each fold and the fits to all examples, at all penalties.

    Args:
        Cs: the values of C, each > 0, or how many of them there are between 1e-4 and 1e4.
        cv: the number of stratified folds (None: 5), a splitter of scikit-learn, or an iterable of
            (train, test). The test sets must be disjoint, and each training set must hold all
            examples that are not in its test set.
        scoring: "neg_log_loss", the mean log-probability of the held-out labels, or "accuracy".
            For other scores use `GridSearchCV` with a `SoftmaxClassifier`.
        selection: "best", or "one_standard_error" for the strongest penalty whose mean score is
            within one standard error of the best.
        l1_ratio: the parameter of `SoftmaxClassifier`; above 0 the fits follow an l1 path, which
            uses only the features that may enter the model.
        fit_intercept: the parameter of `SoftmaxClassifier`.
        class_weight: the parameter of `SoftmaxClassifier`; "balanced" counts the labels of all
            examples, and the scores are weighted too.
        tol: the parameter of `SoftmaxClassifier`.
        max_iter: the largest number of steps of each fit; None for the limit of the solver.

    Attributes:
        C_: the chosen value of C.
        Cs_: the values of C that were compared, [P], in ascending order.
        scores_: the score of each fold at each C, [F, P].
        coefs_paths_: the coefficients [P, K, D] of the fits to all examples; for two classes
            [P, 1, D].
        coef_, intercept_, classes_, n_features_in_, feature_names_in_, n_iter_, stop_reason_,
            objective_, l2_, l1_, params_: the attributes of a `SoftmaxClassifier` that is fitted to
            all examples at `C_`.

    Example:
        >>> import numpy as np
        >>> from softjax.sklearn import SoftmaxClassifierCV
        >>> X, y = np.arange(8.0)[:, None], np.array([0, 1, 0, 0, 1, 0, 1, 1])
        >>> classifier = SoftmaxClassifierCV(Cs=[0.01, 1.0, 100.0], cv=4).fit(X, y)
        >>> classifier.C_, classifier.scores_.shape
        (0.01, (4, 3))

    Source: T. Hastie, R. Tibshirani and J. Friedman, "The Elements of Statistical Learning" (2009),
        section 7.10.
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **SoftmaxModel._parameter_constraints,
        "Cs": [Interval(Integral, 1, None, closed="left"), "array-like"],
        "cv": ["cv_object"],
        "scoring": [StrOptions({"neg_log_loss", "accuracy"})],
        "selection": [StrOptions({"best", "one_standard_error"})],
    }

    def __init__(
        self,
        *,
        Cs: Any = 10,
        cv: Any = None,
        scoring: str = "neg_log_loss",
        selection: str = "best",
        l1_ratio: float = 0.0,
        fit_intercept: bool = True,
        class_weight: dict | str | None = None,
        tol: float | None = None,
        max_iter: int | None = None,
    ):
        self.Cs = Cs
        self.cv = cv
        self.scoring = scoring
        self.selection = selection
        self.l1_ratio = l1_ratio
        self.fit_intercept = fit_intercept
        self.class_weight = class_weight
        self.tol = tol
        self.max_iter = max_iter

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(
        self, X: Any, y: Any, sample_weight: Any = None, offset: Any = None, groups: Any = None
    ) -> "SoftmaxClassifierCV":
        """Fits all folds but one, and all examples, at every C, and chooses a C.

        Args:
            X: features [N, D]: NumPy, a DataFrame, or SciPy's sparse arrays and matrices.
            y: labels [N]: numbers, text, truth values or pandas categories.
            sample_weight: [N], >= 0, for the fits and the scores; None for 1.
            offset: for the fits and the scores, as in `SoftmaxClassifier.fit`; None for 0.
            groups: [N], for a `cv` that keeps groups together, such as `GroupKFold`.

        Returns:
            The classifier.

        Raises:
            ValueError: `SoftmaxClassifier` would refuse the data, or the folds overlap.
        """
        data = examples(self, X, y, sample_weight, offset=offset)
        grid = self._grid()
        l2, l1 = penalties(data, grid, self.l1_ratio)
        with jax.enable_x64(True):
            path = regression.fit_path(
                as_jax(data.features),
                data.labels,
                l2=l2,
                l1=l1 if self.l1_ratio else None,
                folds=self._folds(data.features, data.labels, groups),
                tol=TOL[data.features.dtype.name] if self.tol is None else self.tol,
                max_steps=self.max_iter,
                num_classes=len(data.classes),
                sample_weights=data.weights,
                fit_intercept=self.fit_intercept,
                offset=data.offset,
            )
        validated = path.cross_validation
        loss, accuracy = np.asarray(validated.loss), np.asarray(validated.accuracy)
        scores = -loss if self.scoring == "neg_log_loss" else accuracy
        place = _chosen(scores, self.selection)
        self.classes_, self.Cs_, self.C_ = data.classes, grid, float(grid[place])
        self.scores_ = scores.T
        kernels, biases = map(np.asarray, path.fits.params)
        coefficients = []
        for kernel, bias in zip(kernels, biases, strict=True):
            self._set_params(regression.SoftmaxRegression(kernel, bias), 0.0, self.l1_ratio)
            coefficients.append(self.coef_)
        self.coefs_paths_ = np.stack(coefficients)
        chosen = regression.SoftmaxRegression(kernels[place], biases[place])
        self._set_params(chosen, float(l2[place]), float(l1[place]))
        reason, steps = path.fits.stop_reason[place], int(path.fits.steps[place])
        self.n_iter_ = np.array([steps], np.int32)
        self.stop_reason_, self.objective_ = reason, float(path.fits.objective[place])
        self._data = X, y, sample_weight, offset
        self._warn_unless_converged(reason, steps)
        return self

    def _grid(self) -> np.ndarray:
        """The values of C in ascending order."""
        if isinstance(self.Cs, Integral):
            return np.logspace(-4, 4, int(self.Cs))
        grid = np.sort(np.asarray(self.Cs, np.float64).ravel())
        if not len(grid) or not np.all(grid > 0):
            raise ValueError(f"Cs must be numbers > 0, got {self.Cs!r}")
        return grid

    def _folds(self, X: Any, labels: np.ndarray, groups: Any) -> np.ndarray:
        """The fold in which each example is held out, [N]; -1 if it is never held out."""
        folds = np.full(len(labels), -1, np.int32)
        everything = np.arange(len(labels))
        splitter: Any = check_cv(self.cv, labels, classifier=True)
        for fold, (train, test) in enumerate(splitter.split(X, labels, groups)):
            train, test = everything[train], everything[test]
            both = np.sort(np.concatenate([train, test]))
            if (folds[test] >= 0).any() or not np.array_equal(both, everything):
                expected = "disjoint test sets, each fitted without it to all other examples"
                raise ValueError(f"cv must have {expected}: use GridSearchCV for other splits")
            folds[test] = fold
        return folds


def _chosen(scores: np.ndarray, selection: str) -> int:
    """The index of the chosen fit, given scores [P, F] from the strongest penalty down."""
    mean = scores.mean(axis=1)
    best = int(np.argmax(mean))
    if selection == "best" or scores.shape[1] < 2:
        return best
    error = scores[best].std(ddof=1) / scores.shape[1] ** 0.5
    return int(np.argmax(mean >= mean[best] - error))
