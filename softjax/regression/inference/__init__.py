"""Statistics of a fitted softmax regression: standard errors, tests, intervals and effects.

Start with `covariance`: tests, intervals, marginal effects and predictions are functions of the
parameters and of their covariance matrix. They are valid at the optimum, for many examples.
"""

from softjax.regression.inference._changes import average_changes as average_changes
from softjax.regression.inference._changes import average_elasticities as average_elasticities
from softjax.regression.inference._changes import marginal_effects as marginal_effects
from softjax.regression.inference._covariance import covariance as covariance
from softjax.regression.inference._effects import Predictions as Predictions
from softjax.regression.inference._effects import (
    average_marginal_effects as average_marginal_effects,
)
from softjax.regression.inference._effects import predictions as predictions
from softjax.regression.inference._estimates import ChiSquareTest as ChiSquareTest
from softjax.regression.inference._estimates import Estimates as Estimates
from softjax.regression.inference._estimates import coefficients as coefficients
from softjax.regression.inference._estimates import estimates as estimates
from softjax.regression.inference._estimates import likelihood_ratio_test as likelihood_ratio_test
from softjax.regression.inference._estimates import odds_ratios as odds_ratios
from softjax.regression.inference._estimates import wald_test as wald_test
from softjax.regression.inference._goodness import GoodnessOfFit as GoodnessOfFit
from softjax.regression.inference._goodness import goodness_of_fit as goodness_of_fit
from softjax.regression.inference._goodness import log_likelihood as log_likelihood
from softjax.regression.inference._influence import Influence as Influence
from softjax.regression.inference._influence import influence as influence
from softjax.regression.inference._summary import Summary as Summary
from softjax.regression.inference._summary import summary as summary

__all__ = [
    "ChiSquareTest",
    "Estimates",
    "GoodnessOfFit",
    "Influence",
    "Predictions",
    "Summary",
    "average_changes",
    "average_elasticities",
    "average_marginal_effects",
    "coefficients",
    "covariance",
    "estimates",
    "goodness_of_fit",
    "influence",
    "likelihood_ratio_test",
    "log_likelihood",
    "marginal_effects",
    "odds_ratios",
    "predictions",
    "summary",
    "wald_test",
]
