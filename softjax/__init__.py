"""Accurate softmax, log-sum-exp, cross-entropy and softmax regression for JAX."""

from importlib import import_module
from typing import TYPE_CHECKING

from softjax import _interrupt as _interrupt  # first, so that Ctrl-C works during other imports
from softjax import _uncollected as _uncollected
from softjax._checks import checks as checks
from softjax._cross_entropy import cross_entropy as cross_entropy
from softjax._cross_entropy import weighted_mean as weighted_mean
from softjax._labels import TopKLabels as TopKLabels
from softjax._logsumexp import logmeanexp as logmeanexp
from softjax._logsumexp import logsumexp as logsumexp
from softjax._smooth_extrema import smooth_max as smooth_max
from softjax._smooth_extrema import smooth_max_bounds as smooth_max_bounds
from softjax._smooth_extrema import smooth_min as smooth_min
from softjax._softmax import log_softmax as log_softmax
from softjax._softmax import softmax as softmax
from softjax._softmax import softmin as softmin

__version__ = "0.1.0"

if TYPE_CHECKING:
    from softjax import calibration as calibration
    from softjax import checkpoints as checkpoints
    from softjax import choice as choice
    from softjax import datasets as datasets
    from softjax import derivatives as derivatives
    from softjax import information as information
    from softjax import models as models
    from softjax import plots as plots
    from softjax import regression as regression
    from softjax import streaming as streaming
    from softjax._linear_cross_entropy.curvature import (
        linear_cross_entropy_ggn_vp as linear_cross_entropy_ggn_vp,
    )
    from softjax._linear_cross_entropy.distillation import LinearHead as LinearHead
    from softjax._linear_cross_entropy.distillation import (
        linear_distillation_loss as linear_distillation_loss,
    )
    from softjax._linear_cross_entropy.entry import linear_cross_entropy as linear_cross_entropy
    from softjax._linear_cross_entropy.outputs import LinearOutputs as LinearOutputs
    from softjax._linear_cross_entropy.outputs import (
        linear_cross_entropy_outputs as linear_cross_entropy_outputs,
    )
    from softjax._linear_cross_entropy.outputs import linear_logsumexp as linear_logsumexp
    from softjax.models import load_model as load_model
else:
    # These names are imported when they are first used, so that a program that calls only the
    # normalizers and the loss does not wait for the rest of the package.
    _SUBMODULES = (
        "calibration",
        "checkpoints",
        "choice",
        "datasets",
        "derivatives",
        "information",
        "models",
        "plots",
        "regression",
        "streaming",
    )
    _MODULE_OF = {
        "linear_cross_entropy_ggn_vp": "_linear_cross_entropy.curvature",
        "LinearHead": "_linear_cross_entropy.distillation",
        "linear_distillation_loss": "_linear_cross_entropy.distillation",
        "linear_cross_entropy": "_linear_cross_entropy.entry",
        "LinearOutputs": "_linear_cross_entropy.outputs",
        "linear_cross_entropy_outputs": "_linear_cross_entropy.outputs",
        "linear_logsumexp": "_linear_cross_entropy.outputs",
        "load_model": "models",
    }

    def __getattr__(name):
        if name == "__all__":  # `import *` and editors read it, and then every name in it
            for lazy in _MODULE_OF:
                __getattr__(lazy)
            module_of = {name: getattr(v, "__module__", "") for name, v in globals().items()}
            own = [name for name, module in module_of.items() if module.startswith("softjax.")]
            globals()["__all__"] = sorted((*own, *_SUBMODULES))
            return globals()["__all__"]
        if name in _SUBMODULES:
            return import_module(f"softjax.{name}")
        if name in _MODULE_OF:
            value = getattr(import_module(f"softjax.{_MODULE_OF[name]}"), name)
            globals()[name] = value  # later uses find the name without calling this function
            return value
        raise AttributeError(f"module 'softjax' has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *_SUBMODULES, *_MODULE_OF})
