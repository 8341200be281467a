"""Softmax regression as scikit-learn estimators: for tables, string labels and pipelines.

This module needs scikit-learn (extra `sklearn`). `import softjax` does not load it, so that it has
to be imported by its own name.
"""

from softjax._uncollected import uncollected as _uncollected

with _uncollected():
    try:
        import sklearn as _sklearn  # noqa: F401
    except ModuleNotFoundError as error:
        from softjax import _checks

        _needs = _checks.needs_extra("softjax.sklearn", "scikit-learn", "sklearn")
        raise ModuleNotFoundError(f"{_needs}.", name=error.name) from error

    from softjax.sklearn._classifier import SoftmaxClassifier as SoftmaxClassifier
    from softjax.sklearn._classifier_cv import SoftmaxClassifierCV as SoftmaxClassifierCV

__all__ = ["SoftmaxClassifier", "SoftmaxClassifierCV"]
