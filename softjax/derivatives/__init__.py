"""Derivatives of softmax, logsumexp and cross-entropy in closed form.

Users can call them in place of automatic differentiation; the losses use the same formulas. All
functions work over the last axis, which has K classes, with p = softmax(logits). They share one
matrix, the covariance of the one-hot label,

    H = diag(p) - p p^T = Hessian of logsumexp = Jacobian of softmax = Cov[one-hot].

Where p is near 1, 1 - p is computed without cancellation as r / (1 + r), with the excess r.
"""

from softjax.derivatives._cross_entropy import cross_entropy_gradient as cross_entropy_gradient
from softjax.derivatives._cross_entropy import cross_entropy_hessian as cross_entropy_hessian
from softjax.derivatives._cross_entropy import cross_entropy_hvp as cross_entropy_hvp
from softjax.derivatives._normalizers import log_partition_cumulants as log_partition_cumulants
from softjax.derivatives._normalizers import logsumexp_gradient as logsumexp_gradient
from softjax.derivatives._normalizers import logsumexp_hessian as logsumexp_hessian
from softjax.derivatives._normalizers import logsumexp_hessian_pinv as logsumexp_hessian_pinv
from softjax.derivatives._normalizers import logsumexp_hessian_sqrt as logsumexp_hessian_sqrt
from softjax.derivatives._normalizers import logsumexp_hvp as logsumexp_hvp
from softjax.derivatives._normalizers import softmax_jacobian as softmax_jacobian
from softjax.derivatives._normalizers import softmax_jvp as softmax_jvp
from softjax.derivatives._normalizers import softmax_vjp as softmax_vjp

__all__ = [
    "cross_entropy_gradient",
    "cross_entropy_hessian",
    "cross_entropy_hvp",
    "log_partition_cumulants",
    "logsumexp_gradient",
    "logsumexp_hessian",
    "logsumexp_hessian_pinv",
    "logsumexp_hessian_sqrt",
    "logsumexp_hvp",
    "softmax_jacobian",
    "softmax_jvp",
    "softmax_vjp",
]
