"""Settings of the allocator of a process, made before anything is allocated."""

import ctypes
import sys

# Parameters of glibc's mallopt, from malloc.h, and the largest threshold that it takes.
TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8
LARGEST_THRESHOLD = 32 * 2**20


def keep_memory() -> None:
    """Makes glibc keep freed buffers below its largest threshold for this process.

    By default the memory of a buffer goes back to the kernel or not, depending on how addresses
    happen to lie, and the next call waits until the kernel has cleared new pages. This changes the
    time by a factor from one process to another, for which no implementation is responsible. With
    this setting buffers below glibc's largest threshold reuse pages of the process, as in a process
    that has run for a long time. Larger buffers are mapped and cleared in every call, as usual.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, LARGEST_THRESHOLD)
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
        mallopt(ARENA_MAX, 1)
