"""Imports without garbage collection, which takes a twentieth of the time of a short process.

What an import makes lives as long as the process: a collector walks over all of it in vain, again
and again while JAX is imported.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage is collected within the context."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


with uncollected():
    import jax as jax
