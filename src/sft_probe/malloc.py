"""A setting of glibc's malloc: keep what is freed."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Keep large freed blocks in the process, and do nothing where the C library is not glibc.

    glibc gives every large block back to the kernel and page-faults it in again at the next forward
    pass, which costs 15-20 % of the time on 2 cores (docs/benchmarks.md).
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        if not library.mallopt(_M_MMAP_THRESHOLD, 2**31 - 1):
            library.mallopt(_M_MMAP_THRESHOLD, 2**25)  # the most before glibc 2.35
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        library.mallopt(_M_TOP_PAD, 2**28)
