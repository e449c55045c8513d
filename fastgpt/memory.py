"""Keep freed memory in the process: glibc hands large blocks back and pays a page fault for each
page.

A training step allocates and frees the same gigabytes again and again. By default glibc maps every
block above 32 MB afresh and trims the heap, so that each step faults in, and the kernel zeroes,
every page anew; that was a third of the step (docs/LOG.md). Raised thresholds keep the pages, and a
heap reserved at once can be backed by huge pages.
"""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_MADV_HUGEPAGE = 14
_HUGE = 2 << 20


def keep_freed_memory(reserve_bytes: int | None = None) -> bool:
    """Tell glibc to keep and reuse large blocks; call once, before the first tensors.

    Args:
        reserve_bytes: heap to advise as huge pages in advance (address space, not memory); default
            half of the machine's memory, at most 16 GiB.

    Returns:
        False where there is no glibc to tell (other systems, other allocators).
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "gnu_get_libc_version"):
        return False
    if reserve_bytes is None:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        reserve_bytes = min(memory // 2, 16 << 30)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never
    libc.mallopt(_M_TOP_PAD, 256 << 20)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(reserve_bytes)
    if block:
        first = (block + _HUGE - 1) // _HUGE * _HUGE
        size = (block + reserve_bytes - first) // _HUGE * _HUGE
        libc.madvise(first, size, _MADV_HUGEPAGE)
        libc.free(block)
    return bool(block)
