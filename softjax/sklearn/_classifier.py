"""SoftmaxClassifier: softjax.regression.fit as an estimator of scikit-learn."""

from numbers import Real
from typing import Any, ClassVar

import jax
import numpy as np
from sklearn.base import _fit_context
from sklearn.utils._param_validation import Interval, StrOptions

from softjax import regression
from softjax.regression import SoftmaxRegression
from softjax.sklearn._examples import Examples, as_jax, examples
from softjax.sklearn._model import TOL, SoftmaxModel, penalties

SOLVERS = ("auto", "newton-cg", "newton", "lbfgs", "proximal", "firth")


class SoftmaxClassifier(SoftmaxModel):
    """Softmax regression (multinomial logistic regression) as a classifier of scikit-learn.

        argmin C sum_i w_i loss_i + (1 - l1_ratio) / 2 |coef|^2 + l1_ratio |coef|_1

    where w_i is the sample weight times the class weight, as in `LogisticRegression`; the intercept
    is not penalised. `softjax.regression.fit` has a mean in place of the sum, and a kernel with two
    columns for two classes, so that its penalties are

        l2 = (1 - l1_ratio) / (C sum_i w_i),      l1 = l1_ratio / (C sum_i w_i)     for K > 2
        l2 = 2 (1 - l1_ratio) / (C sum_i w_i),    l1 = l1_ratio / (C sum_i w_i)     for K = 2

    since the coefficient c of two classes becomes the columns -c / 2 and c / 2, whose squares sum
    to c^2 / 2.

    Features in float64 are fitted in float64 whether or not `jax_enable_x64` is on, and features in
    float32 in float32. Sparse SciPy arrays stay sparse. If the fit has not found the optimum, it
    gives a `ConvergenceWarning` that says why.

    Args:
        C: > 0, the inverse strength of the penalty; `np.inf` for none.
        l2: >= 0, the penalty of `softjax.regression.fit` in place of `C`; None to use `C`.
        l1_ratio: in [0, 1], the share of l1 in the penalty: 0 is ridge, 1 the lasso.
        fit_intercept: whether to fit an intercept; without one `intercept_` is 0.
        class_weight: a dictionary {label: weight}, or "balanced" for the weights N / (K N_k);
            None for weights of 1.
        tol: the tolerance of `softjax.regression.fit`; None for 1e-10 in float64 and 1e-6 in
            float32. With l1 a fit in float64 takes a tenth of it.
        max_iter: the largest number of steps; None for the limit of the solver.
        warm_start: whether a fit starts at the coefficients of the previous fit.
        solver: "auto", "newton-cg", "newton", "lbfgs", "proximal" or "firth", as
            in `softjax.regression.fit`. All find the same optimum, except "firth", which has a
            penalty of its own and needs `C=np.inf`. Only "proximal" supports l1.
        random_state: has no effect, since no solver draws random numbers. Programs that set it on
            every estimator can set it here.

    Attributes:
        coef_: [K, D]; for two classes [1, D], the coefficients of the second class minus those of
            the first.
        intercept_: [K]; for two classes [1].
        classes_: the distinct labels [K], sorted.
        n_features_in_: D.
        feature_names_in_: the names [D] of the columns, if X has column names.
        n_iter_: [1], the number of steps.
        stop_reason_: why the fit stopped: "converged" or another value of `FitResult.stop_reason`.
        objective_: the objective of `softjax.regression.fit` at the fitted coefficients, nats.
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
        **SoftmaxModel._parameter_constraints,
        "C": [Interval(Real, 0, None, closed="right")],
        "l2": [Interval(Real, 0, None, closed="left"), None],
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
    def fit(
        self, X: Any, y: Any, sample_weight: Any = None, offset: Any = None
    ) -> "SoftmaxClassifier":
        """Fits the coefficients.

        Args:
            X: features [N, D]: NumPy, a DataFrame, or SciPy's sparse arrays and matrices.
            y: labels [N]: numbers, text, truth values or pandas categories.
            sample_weight: [N], >= 0; None for 1.
            offset: a part of the logits that is known and not fitted, nats, such as the logarithm
                of an exposure: [N, K] in the order of the sorted labels, or, for two classes, [N]
                of the second class against the first; None for 0. The predictions take the offset
                of their own rows.

        Returns:
            The classifier.

        Raises:
            ValueError: input that scikit-learn's checks refuse, such as NaN or labels of one class
                only; parameters that contradict each other.
        """
        data = examples(self, X, y, sample_weight, offset=offset)
        l2, l1 = self._penalties(data)
        init = None
        if self.warm_start and hasattr(self, "coef_"):
            init = self._start(data)
        self.classes_ = data.classes
        tol = TOL[data.features.dtype.name] if self.tol is None else self.tol
        if l1 > 0 and data.features.dtype == np.float64:
            # Newton's last step ends far below the tolerance, but a proximal step does not. With a
            # tenth of the tolerance the coefficients are equally accurate.
            tol = tol / 10
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
                offset=data.offset,
                init=init,
            )
        self._set_params(result.params, l2, l1)
        self.n_iter_ = np.array([result.steps], np.int32)
        self.stop_reason_, self.objective_ = result.stop_reason, result.objective
        self._data = X, y, sample_weight, offset
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
        """The parameters of the previous fit, if they have the shape of this one."""
        params = self.params_
        if params.kernel.shape != (data.features.shape[1], len(data.classes)):
            return None
        return params if self.fit_intercept else params._replace(bias=0 * params.bias)
