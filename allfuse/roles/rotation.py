"""Which fragment of the weights an update is of, and what it was made of."""

from __future__ import annotations

from typing import NamedTuple

ALL = -1
"""In place of a fragment."""


class Turn(NamedTuple):
    """An update that was ordered. counted: what the losses of its lease were over."""

    lease: int
    fragment: int
    counted: float


class Rotation:
    """Workers bring fragments in turn, each by its own clock: a lease ends where the next fragment
    is due, and after it the worker takes in newer weights of what it has just brought.

    What a worker changed since it last brought a fragment is more than one lease has learned, so a
    site weighs what all of these were over.

    Args:
        fragments: how many there are.

    Example:
        rotation = Rotation(2)
        rotation.add("w", 0, Turn(7, rotation.brings(0, is_late=False), 4.0))
        assert rotation.takes("w") == 0
    """

    def __init__(self, fragments: int) -> None:
        self.fragments = fragments
        self._past: dict[str, dict[int, Turn]] = {}  # by worker and clock

    def brings(self, clock: int, *, is_late: bool) -> int:
        """The fragment of an update. is_late: nothing may come after it, so it brings all."""
        return ALL if is_late or self.fragments == 1 else clock % self.fragments

    def last(self, worker: str) -> Turn | None:
        """What a worker brought last."""
        past = self._past.get(worker)
        return past[max(past)] if past else None

    def takes(self, worker: str) -> int:
        """What a worker takes in next: what it brought last, all before it brought anything."""
        last = self.last(worker)
        return ALL if last is None else last.fragment

    def behind(self, worker: str, clock: int, fragment: int, count: float) -> float:
        """What the losses were over of all that is in an update, `count` in its own lease."""
        past = self._past.get(worker, {})
        for before in range(clock - 1, clock - self.fragments, -1):
            turn = past.get(before)
            if turn is not None and turn.fragment in (ALL, fragment):
                break
            count += 0.0 if turn is None else turn.counted
        return count

    def forget(self, worker: str) -> None:
        """A worker comes, or comes again: it is to take in all."""
        self._past.pop(worker, None)

    def add(self, worker: str, clock: int, turn: Turn) -> None:
        """An update was ordered. Of two of one clock the last one counts: the worker went on from
        there."""
        if self.fragments > 1:
            past = self._past.setdefault(worker, {})
            past[clock] = turn
            past.pop(clock - self.fragments, None)
