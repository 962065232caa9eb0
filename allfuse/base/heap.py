"""Memory that was freed goes back to the system, where the C library would keep it."""

from __future__ import annotations

import ctypes

EACH_BYTES = 1 << 24


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
