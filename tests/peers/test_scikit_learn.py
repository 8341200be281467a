"""scikit-learn's own checks of estimators, run on those of softjax.sklearn.

None is expected to fail. One is skipped by scikit-learn itself: it needs SCIPY_ARRAY_API=1.
"""

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from softjax.sklearn import SoftmaxClassifier

pytestmark = [
    pytest.mark.compiled_quickly,
    pytest.mark.x64_once,
    # The checks fit to random data with few steps, and want no more than that no error is raised.
    pytest.mark.filterwarnings("ignore"),
]


@parametrize_with_checks([SoftmaxClassifier()])
def test_estimator(estimator, check):
    check(estimator)
