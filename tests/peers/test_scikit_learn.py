"""scikit-learn's own checks of estimators and tests of LogisticRegression, run on softjax.sklearn.

No check of an estimator is expected to fail. scikit-learn itself skips one check of each estimator,
which needs SCIPY_ARRAY_API=1. SoftmaxClassifierCV is checked with a small grid and two folds. The
selected tests of LogisticRegression concern its fits, and not its solvers, deprecated parameters or
messages. Not tried were the tests of LogisticRegressionCV, of the array API, of callbacks, of
deprecated parameters, and of liblinear, SGD or glmnet against another solver. Of the others, 166 of
208 pass with scikit-learn 1.9. The rest expect a warning, an error or a dtype of a solver or a
parameter that SoftmaxClassifier does not have (test_max_iter, test_penalty_none,
test_large_sparse_matrix, test_dtype_match with liblinear, ...), or compare with an inexact fit by
saga (test_scores_attribute_layout_elasticnet).
"""

import pytest
import sklearn.linear_model.tests.test_logistic as peer
from sklearn.linear_model.tests.test_logistic import (
    test_elastic_net_coeffs,
    test_inconsistent_input,
    test_logistic_regression_solvers_multiclass,
    test_logreg_predict_proba_multinomial,
    test_multinomial_identifiability_on_iris,
    test_nan,
    test_predict_2_classes,
    test_predict_3_classes,
    test_sample_weight_not_modified,
    test_sparsify,
    test_write_parameters,
)
from sklearn.utils.estimator_checks import parametrize_with_checks

from softjax.sklearn import SoftmaxClassifier, SoftmaxClassifierCV

__all__ = [
    "test_elastic_net_coeffs",
    "test_inconsistent_input",
    "test_logistic_regression_solvers_multiclass",
    "test_logreg_predict_proba_multinomial",
    "test_multinomial_identifiability_on_iris",
    "test_nan",
    "test_predict_2_classes",
    "test_predict_3_classes",
    "test_sample_weight_not_modified",
    "test_sparsify",
    "test_write_parameters",
]

pytestmark = [
    pytest.mark.compiled_quickly,
    pytest.mark.x64_once,
    # The checks fit to random data with few steps, and want no more than that no error is raised.
    pytest.mark.filterwarnings("ignore"),
]

OURS = {"newton-cholesky": "newton", "sag": "auto", "saga": "auto", "liblinear": "auto"}


class LogisticRegression(SoftmaxClassifier):
    """SoftmaxClassifier by the names that scikit-learn's solvers have."""

    def __init__(
        self,
        *,
        C=1.0,
        l1_ratio=0.0,
        fit_intercept=True,
        class_weight=None,
        tol=None,
        max_iter=None,
        warm_start=False,
        solver="auto",
        random_state=None,
    ):
        super().__init__(
            C=C,
            l1_ratio=l1_ratio,
            fit_intercept=fit_intercept,
            class_weight=class_weight,
            tol=tol,
            max_iter=max_iter,
            warm_start=warm_start,
            solver=solver,
            random_state=random_state,
        )

    def fit(self, X, y, sample_weight=None):
        solver = self.solver
        self.solver = OURS.get(solver, solver)
        try:
            return super().fit(X, y, sample_weight)
        finally:
            self.solver = solver


@pytest.fixture(autouse=True)
def _softjax_in_place(monkeypatch):
    monkeypatch.setattr(peer, "LogisticRegression", LogisticRegression)


@pytest.fixture
def global_random_seed():
    return 42


@parametrize_with_checks([SoftmaxClassifier(), SoftmaxClassifierCV(Cs=2, cv=2)])
def test_estimator(estimator, check):
    check(estimator)
