"""What a run asks of the allocator of its process, before anything is allocated."""

import ctypes
import sys

# Parameters of glibc's mallopt, from malloc.h.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8


def keep_memory() -> None:
    """Let this process keep the memory that it frees, where glibc manages it.

    By default a large buffer goes back to the kernel, or not, as the addresses happen to lie, and
    the next call waits for the kernel to clear its pages anew: a difference by a factor from one
    process to another, in which neither implementation has a part. With one arena and no mappings
    of their own, buffers come from pages that the process has touched before.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(MMAP_MAX, 0)
        mallopt(ARENA_MAX, 1)
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
