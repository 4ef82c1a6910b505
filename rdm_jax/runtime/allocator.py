"""The C library's allocator on CPUs, where a program's memory is that of its arrays."""

import contextlib
import ctypes

# Parameters of glibc's mallopt, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Lets the process reuse memory that it has freed, instead of returning it to the system.

    XLA allocates the temporaries of a program at each call. By default glibc maps such large blocks
    and unmaps them again, and the kernel must clear every page of every call.

    Returns:
      Whether the C library has these settings (glibc, on Linux).
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, LARGEST))
    return False
