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


def seed_generators(key: int) -> None:
    """Set all three generators from a 64-bit key (NumPy's from its low half). Cost: 7 us."""
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    torch.default_generator.manual_seed(key)


class Snapshot:
    """The state of all three generators when it was taken. Cost: 45 us, mostly NumPy's."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state()
        self._words = _numpy_words()
        self._torch = torch.default_generator.get_state()

    def moved(self) -> bool:
        """Whether anything was drawn since. Cost: 15 us."""
        if not torch.equal(self._torch, torch.default_generator.get_state()):
            return True
        # NumPy's legacy normals come in pairs, of which the second moves nothing: one such draw in
        # all is not seen. The next one is.
        return self._words != _numpy_words() or self._python != random.getstate()

    def restore(self) -> None:
        """Set the generators back. Cost: 40 us."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.default_generator.set_state(self._torch)


def _numpy_words() -> bytes:
    """What changes when NumPy's global generator draws; its own get_state takes 30 us."""
    generator = get_bit_generator()
    if isinstance(generator, np.random.MT19937):  # 624 words and a position
        return ctypes.string_at(generator.ctypes.state_address, 625 * 4)
    return repr(generator.state).encode()


def _turn() -> AbstractContextManager[Any]:
    """Exclusive use of the generators. A loader process is alone and may have forked a held lock."""
    return _one_at_a_time if get_worker_info() is None else nullcontext()


@contextmanager
def isolated(key: int) -> Iterator[None]:
    """Generators seeded by a key inside; outside they are as they were. Cost: 95 us."""
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
    """An iterable read under generators of its own, seeded once by a key.

    What it yields depends on the key and on how much was taken, and moves nobody's generators.
    Cost: 170 us for each `take`, so take many at once.

    >>> KeyedStream([1, 2, 3], key=0).take(2)
    [1, 2]
    """

    def __init__(self, items: Iterable[T], key: int) -> None:
        self._items, self._key = items, key
        self._iterator: Iterator[T] | None = None
        self._own: Snapshot | None = None

    def take(self, count: int) -> list[T]:
        """The next `count` items, fewer at the end."""
        with _turn():
            before = Snapshot()
            try:
                if self._own is None:
                    seed_generators(self._key)
                else:
                    self._own.restore()
                if self._iterator is None:
                    self._iterator = iter(self._items)
                taken = list(islice(self._iterator, count))
                self._own = Snapshot()
            finally:
                before.restore()
            return taken

    def skip(self, count: int, block: int = 1024) -> None:
        """Read and drop `count` items, some at a time."""
        for start in range(0, count, block):
            if not self.take(min(block, count - start)):
                return
