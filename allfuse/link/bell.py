"""Words in shared memory that other processes can wait for."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import sys

WORD_BYTES = 4
WRAP = 0xFFFFFFFF  # counts begin again after this
SLICE_S = 0.05  # how long a bell is waited for before someone looks who still lives
TRIES = 20  # to see a word change, giving the core away, before sleeping: a wake-up takes longer

_WAIT, _WAKE, _ALL = 0, 1, 0x7FFFFFFF
_FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98}.get(platform.machine())
_IN_ORDER = platform.machine() == "x86_64"  # stores are seen by other cores in their order

AVAILABLE = sys.platform == "linux" and sys.maxsize > 2**32 and _FUTEX is not None


class _Slice(ctypes.Structure):
    """A struct timespec."""

    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_slice = _Slice(0, int(SLICE_S * 1e9))
_call = ctypes.CDLL(None, use_errno=True).syscall if AVAILABLE else None
if _call is not None:
    _call.restype = ctypes.c_long
    _call.argtypes = (
        ctypes.c_long,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_uint32,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_uint32,
    )


_nothing = ctypes.c_uint32()


def _fence() -> None:
    """Nothing moves across it. Waking nobody is the kernel's fence, where a core needs one."""
    if not _IN_ORDER and _call is not None:
        _call(_FUTEX, ctypes.addressof(_nothing), _WAKE, 1, None, None, 0)


class Bells:
    """The 32-bit words at the start of a mapping; only one process writes each of them.

    What was written to the memory before `set` is seen by whoever sees the new word (source: the
    manual page futex(2), and Drepper, Futexes Are Tricky, 2011).

    >>> bells = Bells(mmap.mmap(-1, 4096), 8)
    >>> bells.set(3, 7)
    >>> bells.get(3)
    7
    >>> bells.wait(3, 6)  # it is no longer 6
    True
    """

    def __init__(self, memory: mmap.mmap, count: int) -> None:
        self._words = (ctypes.c_uint32 * count).from_buffer(memory)
        self._address = ctypes.addressof(self._words)

    def get(self, place: int) -> int:
        value = self._words[place]
        _fence()
        return value

    def set(self, place: int, value: int) -> None:
        """Write a word, and wake nobody."""
        _fence()
        self._words[place] = value

    def ring(self, place: int) -> None:
        """Wake all that wait for a word."""
        assert _call is not None
        _call(_FUTEX, self._address + WORD_BYTES * place, _WAKE, _ALL, None, None, 0)

    def wait(self, place: int, seen: int) -> bool:
        """Return when a word is another one than `seen`; False, perhaps, after `SLICE_S`."""
        assert _call is not None
        for _ in range(TRIES):
            if self._words[place] != seen:
                return True
            os.sched_yield()
        address = self._address + WORD_BYTES * place
        return bool(_call(_FUTEX, address, _WAIT, seen, ctypes.addressof(_slice), None, 0) == 0)
