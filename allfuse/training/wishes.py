"""Who wishes training to stop, so that all ranks stop after the same step."""

from __future__ import annotations

from collections.abc import Iterable
from threading import Event

NOTHING, STOP, INTERRUPT = 0, 1, 2


class Wishes:
    """This rank's own wish, which travels with the figures of each step, and what all have heard.

    `interrupted` is set when a person or the launcher asks to stop.
    """

    def __init__(self, interrupted: Event) -> None:
        self._interrupted = interrupted
        self._own = NOTHING
        self._reason = ""
        self.heard = NOTHING

    def ask(self, reason: str) -> None:
        if not self._own:
            self._own, self._reason = STOP, reason

    @property
    def own(self) -> int:
        """The strongest wish of this rank, to be told to the others."""
        if self._interrupted.is_set():
            return INTERRUPT
        return self._own

    @property
    def reason(self) -> str:
        return self._reason or "another worker asked to stop"

    def hear(self, wishes: Iterable[int]) -> None:
        """Take in what all ranks of a data axis said in the same step."""
        self.heard = max(self.heard, *wishes)
