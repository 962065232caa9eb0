"""When what was said is said again, and when a sign of life is due. No clock inside."""

from __future__ import annotations

from collections.abc import Iterable

from allfuse.roles.messages import SCHEDULER, Mail

LONGEST = 8  # pauses between two times that the same is said


class Insistence:
    """A worker's pace towards the scheduler.

    Args:
        repeat_s: how long nothing moves before the last thing is said again; each time twice as
            long as before, up to `LONGEST` times that.
        beat_s: how long the scheduler hears nothing before it gets a sign of life.
    """

    def __init__(self, repeat_s: float, beat_s: float) -> None:
        self.repeat_s, self.beat_s = repeat_s, beat_s
        self.pauses = 0
        self._moved_s = self._spoke_s = float("-inf")

    def progress(self, now_s: float) -> None:
        """Something has moved."""
        self._moved_s, self.pauses = now_s, 1

    def hurry(self, now_s: float) -> None:
        """What was on its way may be lost: it is said again at the next chance."""
        self._moved_s = min(self._moved_s, now_s - self.repeat_s)
        self.pauses = 1

    def is_due(self, now_s: float) -> bool:
        """Whether nothing has moved for so long that it is to be said again."""
        return now_s - self._moved_s >= self.pauses * self.repeat_s

    def again(self, now_s: float) -> None:
        """It was said again."""
        self._moved_s = now_s
        self.pauses = max(1, min(2 * self.pauses, LONGEST))

    def beats(self, mail: Iterable[Mail], now_s: float) -> bool:
        """Whether a sign of life is due and nothing in `mail` is one."""
        return now_s - self._spoke_s >= self.beat_s and not _speaks(mail)

    def said(self, mail: list[Mail], now_s: float) -> list[Mail]:
        """Note that this is sent."""
        if _speaks(mail):
            self._spoke_s = now_s
        return mail


def _speaks(mail: Iterable[Mail]) -> bool:
    return any(to == SCHEDULER for to, _ in mail)
