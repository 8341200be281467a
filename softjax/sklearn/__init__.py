"""Softmax regression as scikit-learn estimators: for tables, string labels and pipelines.

Needs scikit-learn, of the extra `sklearn`, and an import of its own: `import softjax` does not load
it.
"""

try:
    import sklearn as _sklearn  # noqa: F401
except ModuleNotFoundError as error:
    from softjax import _checks

    _needs = _checks.needs_extra("softjax.sklearn", "scikit-learn", "sklearn")
    raise ModuleNotFoundError(f"{_needs}.", name=error.name) from error

from softjax.sklearn._classifier import SoftmaxClassifier as SoftmaxClassifier
from softjax.sklearn._classifier_cv import SoftmaxClassifierCV as SoftmaxClassifierCV

__all__ = ["SoftmaxClassifier", "SoftmaxClassifierCV"]
