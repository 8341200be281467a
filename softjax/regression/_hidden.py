"""Features that their penalty hides, such as masses of atoms in kilograms beside ages in years.

At the optimum l2 f_j kernel_j = -x_j^T (w p - q), so that no example's logits have more than

    max_i |x_ij kernel_jk| <= max_i x_ij^2 / (l2 f_j)

from feature j. Far below the rounding of the logits such a feature changes nothing. But the solvers
ask for a small gradient of every parameter, and this one magnifies the rounding of its coefficient
by the whole ratio: a fit that is at its optimum would go on to its precision floor.
"""

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from softjax import _checks
from softjax.regression._arguments import is_at_hand
from softjax.regression._features import is_sparse, largest_entries, with_data
from softjax.regression._problem import Data

# A feature is hidden if its penalty is more than this many times its largest square.
HIDING = 2.0**80
# The number of examples that are looked at first, since they show most features to be visible.
FIRST = 64


def without_hidden(data: Data) -> Data:
    """The data with zeros in place of the features that are hidden, if the features are known.

    Their coefficients are then 0. In a grid of penalties the smallest one hides them.
    """
    x = data.features
    entries = x.data if is_sparse(x) else x
    if not is_at_hand(entries) or not _checks.is_concrete([data.l2, data.factors]):
        return data
    factors = 1.0 if data.factors is None else np.asarray(data.factors, np.float64)
    ridge = np.broadcast_to(np.min(np.asarray(data.l2)) * factors, x.shape[1])
    host, root = np.asarray(entries), np.sqrt(ridge / HIDING)
    if is_sparse(x):
        # Most data have no entry that is small enough, which is faster to see than the columns.
        if not len(host) or np.min(np.abs(host), where=host != 0, initial=np.inf) >= root.max():
            return data
        largest = largest_entries(x)
    else:
        # The first examples show of most features that they are not hidden.
        largest = np.abs(host[:FIRST]).max(0)
        places = np.flatnonzero(largest < root)
        largest[places] = np.abs(host[:, places]).max(0)
    hidden = (largest > 0) & (largest < root)
    if not hidden.any():
        return data
    if is_sparse(x):  # the column of an entry that is padding is D or more
        hidden = np.append(hidden, True)[np.minimum(np.asarray(x.indices)[:, 1], x.shape[1])]
    seen: Any = jax.device_put(np.where(hidden, 0, host), entries.sharding)
    return replace(data, features=with_data(x, seen) if is_sparse(x) else seen)
