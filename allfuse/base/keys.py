"""64-bit keys mixed from whole numbers, the same on every machine."""

from __future__ import annotations

_MASK = (1 << 64) - 1


def mix(*parts: int) -> int:
    """One well-mixed 64-bit number from whole numbers, of which the order matters.

    Each part is folded in by splitmix64 (Steele, Lea and Flood 2014, figure 12 and their mix13).

    >>> mix(0, 0, 1) == mix(0, 0, 1), mix(0, 0, 1) == mix(0, 1, 0)
    (True, False)
    """
    state = 0
    for part in parts:
        state = ((state ^ (part & _MASK)) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state
