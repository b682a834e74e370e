"""Keep freed memory: the temporaries of a lifted step are large, and giving them back costs more than using them."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Tell glibc's allocator to reuse large blocks rather than return each to the system.

    Otherwise every temporary of tens of megabytes is mapped, filled page by page with faults, and unmapped again, which
    can cost more than the arithmetic on it (`benchmarks/lifted.py` measures steps with this in force). Results do not
    change. Does nothing where the C library is another one.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
