"""A random order of any number of samples, computed and never stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from allfuse.base.keys import mix

Indices: TypeAlias = NDArray[np.int64]
Words: TypeAlias = NDArray[np.uint32]

_ROUNDS = 6  # each changes both halves; fewer than 5 are seen in sizes below 20


@dataclass(frozen=True)
class Permutation:
    """The order of `size` samples in one epoch: called on positions, it gives sample indices.

    A bijection on range(size), the same on every machine. `shuffle=False` is the identity.

    A Feistel network whose halves are numbers below a and b, the smallest near sqrt(size) with
    a * b >= size; the few indices that fall outside go through again until they are inside
    (generalized Feistel and cycle walking: Black and Rogaway 2002, sections 4 and 5). Integer math
    only; not cryptographic.

    Cost: no memory beyond the positions asked for; about 25 ns per index in calls of 16,384.

    >>> order = Permutation(10, seed=0, epoch=0)
    >>> sorted(order(np.arange(10)).tolist()) == list(range(10))
    True
    >>> Permutation(10**12, seed=0, epoch=0)(np.array([999_999_999_999])).shape
    (1,)
    """

    size: int
    seed: int
    epoch: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.size <= 1 << 62:
            raise ValueError(f"a permutation needs a size of 1 to 2**62, got {self.size}")

    def __call__(self, positions: Indices) -> Indices:
        """Sample indices at these positions, which are in range(size)."""
        if not self.shuffle:
            return np.array(positions, dtype=np.int64)
        values = self._scramble(positions)
        outside = np.flatnonzero(values >= self.size)
        while outside.size:
            again = self._scramble(values[outside])
            values[outside] = again
            outside = outside[again >= self.size]
        return values

    @cached_property
    def _sides(self) -> tuple[int, int]:
        """a and b: neither is above 2**31."""
        high = max(2, math.isqrt(self.size - 1) + 1)
        return high, max(2, -(-self.size // high))

    @cached_property
    def _keys(self) -> list[tuple[np.uint32, np.uint32]]:
        """Two words for each change of a half."""
        words = [mix(self.seed, self.epoch, turn) for turn in range(2 * _ROUNDS)]
        return [(np.uint32(word >> 32), np.uint32(word & 0xFFFFFFFF)) for word in words]

    def _scramble(self, values: Indices) -> Indices:
        """The Feistel network: a bijection on range(a * b)."""
        a, b = self._sides
        quotient = values // b
        high, low = quotient.astype(np.uint32), (values - quotient * b).astype(np.uint32)
        for turn in range(_ROUNDS):
            high = _subtract(high, _hash(low, self._keys[2 * turn]), a)
            low = _subtract(low, _hash(high, self._keys[2 * turn + 1]), b)
        return high.astype(np.int64) * b + low


def _hash(values: Words, keys: tuple[np.uint32, np.uint32]) -> Words:
    """32 well-mixed bits of each value; the constants are those of MurmurHash3's finalizer."""
    mixed = values + keys[0]
    mixed *= np.uint32(0x85EBCA6B)
    mixed ^= mixed >> np.uint32(15)
    mixed += keys[1]
    mixed *= np.uint32(0xC2B2AE35)
    return mixed


def _subtract(values: Words, bits: Words, side: int) -> Words:
    """values - (bits scaled to range(side)), modulo side, for a side of at most 2**31."""
    scaled = bits.astype(np.uint64)
    scaled *= np.uint64(side)
    scaled >>= np.uint64(32)
    difference = values - scaled.astype(np.uint32)
    # A negative difference has wrapped to at least 2**31, and adding the side brings it back.
    back: Words = difference + np.uint32(side)
    return np.minimum(difference, back, out=back)
