"""The process's random generators: Python's, NumPy's global one and torch's default one.

What a dataset draws must depend on a key alone, never on who reads it, when, or in which process;
and it must not move the generators that the model's dropout draws from.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator
from torch.utils.data import get_worker_info

T = TypeVar("T")

# Ranks may be threads of one process, which has one set of generators.
_one_at_a_time = threading.RLock()

_MT19937_BYTES = 625 * 4  # 624 words and a position


def seed_generators(key: int) -> None:
    """Set all three generators from a 64-bit key (NumPy's from its low half).

    Cost: 7 us, and 40 us between the kernels of a step, whose data has pushed it out of the caches.
    """
    random.seed(key)
    torch.default_generator.manual_seed(key)
    if isinstance(get_bit_generator(), np.random.MT19937):
        np.random.seed(key & 0xFFFFFFFF)


class Snapshot:
    """The state of all three generators when it was taken. Cost: 14 us.

    NumPy's legacy normals come in pairs; a second one that is held back is not part of the state.
    A global generator of NumPy's other than its default, MT19937, is left alone altogether.
    """

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy = _numpy_words()
        self._torch = torch.default_generator.get_state()

    def moved(self) -> bool:
        """Whether anything was drawn since. Cost: 20 us."""
        return (
            self._numpy != _numpy_words()
            or not torch.equal(self._torch, torch.default_generator.get_state())
            or self._python != random.getstate()
        )

    def restore(self) -> None:
        """Set the generators back. Cost: 6 us."""
        random.setstate(self._python)
        torch.default_generator.set_state(self._torch)
        address = _numpy_address()
        if address is not None:
            np.random.seed(0)  # drops a normal that is held back
            ctypes.memmove(address, self._numpy, _MT19937_BYTES)


def _numpy_words() -> bytes:
    """The state of NumPy's global generator; its own get_state takes 30 us."""
    address = _numpy_address()
    return b"" if address is None else ctypes.string_at(address, _MT19937_BYTES)


def _numpy_address() -> int | None:
    """Where the state lies (NumPy publishes it for ctypes), None for another kind of generator."""
    generator = get_bit_generator()
    if not isinstance(generator, np.random.MT19937):
        return None
    return int(generator.ctypes.state_address)


def _turn() -> AbstractContextManager[Any]:
    """Exclusive use of the generators. A loader process is alone; its lock was forked as it was."""
    return _one_at_a_time if get_worker_info() is None else nullcontext()


@contextmanager
def isolated(key: int) -> Iterator[None]:
    """Generators seeded by a key inside; outside they are as they were. Cost: 25 us."""
    with _turn():
        before = Snapshot()
        try:
            seed_generators(key)
            yield
        finally:
            before.restore()


class Keyed:
    """Runs work that may draw, so that what it draws depends on its keys alone.

    Seeding for every sample costs more than reading most samples does. So work runs unseeded until
    it is first seen to draw; from then on, that time included, it runs in the form that seeds. The
    result is the same as if it had always been seeded, because what draws nothing needs no seed.
    Generators are left as they were found.

    >>> keyed = Keyed()
    >>> keyed.run(random.random, lambda: (seed_generators(7), random.random())[1])
    0.32383276483316237
    """

    def __init__(self) -> None:
        self._draws = False

    def run(self, plain: Callable[[], T], seeded: Callable[[], T]) -> T:
        """The result of `plain` when that draws nothing, else of `seeded`."""
        with _turn():
            before = Snapshot()
            if not self._draws:
                result = plain()
                if not before.moved():
                    return result
                self._draws = True
            try:
                return seeded()
            finally:
                before.restore()


class KeyedStream(Generic[T]):
    """An iterable read in blocks, under generators of its own that are seeded once by a key.

    What it yields depends on the key and the size of the blocks, and moves nobody's generators.
    Cost: 40 us for each block.

    >>> KeyedStream([1, 2, 3], key=0, block=2).take()
    [1, 2]
    """

    def __init__(self, items: Iterable[T], key: int, block: int) -> None:
        self._items, self._key, self._block = items, key, block
        self._iterator: Iterator[T] | None = None
        self._own: Snapshot | None = None

    def take(self) -> list[T]:
        """The next block, which is shorter at the end."""
        with _turn():
            before = Snapshot()
            try:
                if self._own is None:
                    seed_generators(self._key)
                else:
                    self._own.restore()
                if self._iterator is None:
                    self._iterator = iter(self._items)
                taken = list(islice(self._iterator, self._block))
                self._own = Snapshot()
            finally:
                before.restore()
            return taken

    def __iter__(self) -> Iterator[T]:
        while taken := self.take():
            yield from taken
