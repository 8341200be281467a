"""Sparse features, without the import of what makes them, which brings scipy along."""

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from jax.experimental.sparse import BCOO


def is_sparse(x: Any) -> "TypeGuard[BCOO]":
    """Whether `x` is BCOO: if so, its module has been imported by whoever made it."""
    module = sys.modules.get("jax.experimental.sparse")
    return module is not None and isinstance(x, module.BCOO)
