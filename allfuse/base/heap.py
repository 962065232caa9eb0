"""What the C library does with memory that was freed: gives it back, or keeps it for what comes."""

from __future__ import annotations

import ctypes

EACH_BYTES = 1 << 24
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
MOST_BYTES = 1 << 25  # up to which glibc takes blocks from its heap


class Returns:
    """Gives freed memory back each time that some 16 MB were freed. Large blocks that come and go
    between small ones that stay would else leave holes all over the heap."""

    def __init__(self) -> None:
        self._freed = 0
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it

    def freed(self, nbytes: int) -> None:
        self._freed += nbytes
        if self._freed >= EACH_BYTES and self._trim is not None:
            self._trim(0)
            self._freed = 0


def keep_freed() -> None:
    """Have blocks of up to 32 MB taken from what each thread freed before, as glibc would do by
    itself once one of 32 MB was freed.

    For work that asks for the same sizes over and over: pages that are new to the process cost as
    much time as the work on them.
    """
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)
    if adjust is not None:
        adjust(M_MMAP_THRESHOLD, MOST_BYTES)
        adjust(M_TRIM_THRESHOLD, 2 * MOST_BYTES)


def give_back() -> None:
    """Give all that is freed back to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
