"""Softmax regression (multinomial logistic regression): the model, its objective and its fit."""

from importlib import import_module
from typing import TYPE_CHECKING

from softjax.regression import inference as inference
from softjax.regression._bootstrap import Bootstrap as Bootstrap
from softjax.regression._bootstrap import bootstrap as bootstrap
from softjax.regression._cross_validation import CrossValidation as CrossValidation
from softjax.regression._cross_validation import cross_validate as cross_validate
from softjax.regression._curvature import fisher_information as fisher_information
from softjax.regression._curvature import gradient as gradient
from softjax.regression._curvature import hessian as hessian
from softjax.regression._curvature import hvp as hvp
from softjax.regression._curvature import lipschitz_constant as lipschitz_constant
from softjax.regression._fit import fit as fit
from softjax.regression._fit_many import fit_many as fit_many
from softjax.regression._model import SoftmaxRegression as SoftmaxRegression
from softjax.regression._model import init as init
from softjax.regression._model import logits as logits
from softjax.regression._model import objective as objective
from softjax.regression._model import predict as predict
from softjax.regression._model import predict_log_proba as predict_log_proba
from softjax.regression._model import predict_proba as predict_proba
from softjax.regression._path import PathResult as PathResult
from softjax.regression._path import fit_path as fit_path
from softjax.regression._path import largest_l1 as largest_l1
from softjax.regression._result import CALLBACK as CALLBACK
from softjax.regression._result import CONVERGED as CONVERGED
from softjax.regression._result import NON_FINITE as NON_FINITE
from softjax.regression._result import PRECISION_FLOOR as PRECISION_FLOOR
from softjax.regression._result import QUASI_SEPARATED as QUASI_SEPARATED
from softjax.regression._result import SEPARATED as SEPARATED
from softjax.regression._result import STEP_LIMIT as STEP_LIMIT
from softjax.regression._result import Event as Event
from softjax.regression._result import FitResult as FitResult
from softjax.regression._result import ManyEvent as ManyEvent
from softjax.regression.inference._leave_one_out import leave_one_out as leave_one_out

if TYPE_CHECKING:
    from softjax.streaming import train as train
else:

    def __getattr__(name):
        if name == "train":  # it reads files too, and so lies in a layer above this one
            globals()[name] = import_module("softjax.streaming").train
            return globals()[name]
        raise AttributeError(f"module 'softjax.regression' has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), "train"})


__all__ = [
    "CALLBACK",
    "CONVERGED",
    "NON_FINITE",
    "PRECISION_FLOOR",
    "QUASI_SEPARATED",
    "SEPARATED",
    "STEP_LIMIT",
    "Bootstrap",
    "CrossValidation",
    "Event",
    "FitResult",
    "ManyEvent",
    "PathResult",
    "SoftmaxRegression",
    "bootstrap",
    "cross_validate",
    "fisher_information",
    "fit",
    "fit_many",
    "fit_path",
    "gradient",
    "hessian",
    "hvp",
    "inference",
    "init",
    "largest_l1",
    "leave_one_out",
    "lipschitz_constant",
    "logits",
    "objective",
    "predict",
    "predict_log_proba",
    "predict_proba",
    "train",
]
