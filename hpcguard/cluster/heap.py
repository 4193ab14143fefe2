"""glibc's heap: keeping what a training step frees for the next one."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
OFF = -1
TRIM_AT, MOST_MAPPINGS = 64 * 2**20, 65536  # where glibc's own settings end up in a process of large blocks


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within it malloc keeps what is freed, up to about the peak; afterwards it is given back.

    A training step on a CPU frees the gigabytes that the next one asks for. By default glibc gives them back to the
    kernel, which then clears each page anew. Nothing is done where the C library is not glibc, or where the
    environment (MALLOC_*, GLIBC_TUNABLES) already says how.
    """
    libc = ctypes.CDLL(None)
    told = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    if told or not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(M_TRIM_THRESHOLD, OFF)
    libc.mallopt(M_MMAP_MAX, 0)
    try:
        yield
    finally:
        libc.mallopt(M_TRIM_THRESHOLD, TRIM_AT)
        libc.mallopt(M_MMAP_MAX, MOST_MAPPINGS)
        libc.malloc_trim(0)
