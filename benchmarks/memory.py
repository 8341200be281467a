"""What a run asks of the allocator of its process, before anything is allocated."""

import ctypes
import sys

# Parameters of glibc's mallopt, from malloc.h, and the largest threshold that it takes.
TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8
LARGEST_THRESHOLD = 32 * 2**20


def keep_memory() -> None:
    """Let this process keep the smaller buffers that it frees, where glibc manages them.

    By default the memory of a buffer goes back to the kernel, or not, as the addresses happen to
    lie, and the next call waits for the kernel to clear its pages anew: a difference by a factor
    from one process to another, in which neither implementation has a part. Here those below
    glibc's largest threshold come from pages that the process has touched before, as in a process
    that has run for long. Larger ones are cleared anew in every call, as they are for everybody.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, LARGEST_THRESHOLD)
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
        mallopt(ARENA_MAX, 1)
