"""Memory of the process: freed blocks stay with it, on large pages, for the temporaries of the next layer."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, which makes networks on a CPU faster under glibc.

    A network frees the temporaries of every layer and asks for blocks of the same sizes in the next one.
    glibc gives large blocks back to the system at once, which then has to zero and map every page again.
    After this call no block has a mapping of its own and the heap is never trimmed, so that the process keeps
    the largest amount of memory that it has needed, until it ends.

    The call also asks for pages of 2 MB instead of 4 kB for the heap, up to half of the machine's memory:
    the processor then finds the address of a page in its own tables more often. A page takes memory when it
    is first used, not before. Nothing happens where the system has no such pages.

    The command line makes this call. The library never does, because it changes the allocator of the whole
    process, and for good.

    Returns:
        True if glibc took the settings. False, and nothing is changed, where malloc is not glibc's (macOS,
        musl).

    Source: mallopt(3), M_MMAP_MAX and M_TRIM_THRESHOLD; madvise(2), MADV_HUGEPAGE.

    Example:
        >>> kept = keep_freed_memory()  # once, at the start of a program
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    if libc.mallopt(_M_MMAP_MAX, 0) != 1 or libc.mallopt(_M_TRIM_THRESHOLD, -1) != 1:
        return False
    _ask_for_large_pages(libc)
    return True


def _ask_for_large_pages(libc: ctypes.CDLL) -> None:
    """Let the heap grow once to its largest size, because the request is for addresses that exist."""
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page = mmap.PAGESIZE
    size = os.sysconf("SC_PHYS_PAGES") * page // 2
    block = libc.malloc(size)
    if block is None:  # a limit on the addresses of this process
        return
    first = -(-block // page) * page
    libc.madvise(first, (block + size - first) // page * page, mmap.MADV_HUGEPAGE)
    libc.free(block)
