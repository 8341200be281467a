"""The softmax layer of JAX: accurate, safe to differentiate, linear in memory."""

from softjax import calibration as calibration
from softjax import checkpoints as checkpoints
from softjax import choice as choice
from softjax import datasets as datasets
from softjax import derivatives as derivatives
from softjax import information as information
from softjax import regression as regression
from softjax import streaming as streaming
from softjax._cross_entropy import cross_entropy as cross_entropy
from softjax._cross_entropy import weighted_mean as weighted_mean
from softjax._labels import TopKLabels as TopKLabels
from softjax._linear_cross_entropy.curvature import (
    linear_cross_entropy_ggn_vp as linear_cross_entropy_ggn_vp,
)
from softjax._linear_cross_entropy.entry import linear_cross_entropy as linear_cross_entropy
from softjax._linear_cross_entropy.outputs import LinearOutputs as LinearOutputs
from softjax._linear_cross_entropy.outputs import (
    linear_cross_entropy_outputs as linear_cross_entropy_outputs,
)
from softjax._linear_cross_entropy.outputs import linear_logsumexp as linear_logsumexp
from softjax._logsumexp import logmeanexp as logmeanexp
from softjax._logsumexp import logsumexp as logsumexp
from softjax._smooth_extrema import smooth_max as smooth_max
from softjax._smooth_extrema import smooth_max_bounds as smooth_max_bounds
from softjax._smooth_extrema import smooth_min as smooth_min
from softjax._softmax import log_softmax as log_softmax
from softjax._softmax import softmax as softmax
from softjax._softmax import softmin as softmin
