"""How far a prediction is, told at most twice a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

OnEvent = Callable[..., None]

EVERY_S = 0.5


class Progress:
    """Counts rows by rank and tells `on_event("scored", ...)` of them.

    The number of all rows is known at the end only; until then it is estimated from the part of
    the file that was read.
    """

    def __init__(self, ranks: int, on_event: OnEvent | None) -> None:
        self.shares = [0] * ranks
        self.began = time.monotonic()
        self._on_event = on_event
        self._told = self.began

    def begin(self) -> None:
        """Scoring begins now: reading the run, and cutting its model, do not count."""
        self.began = self._told = time.monotonic()

    @property
    def rows(self) -> int:
        return sum(self.shares)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def add(self, scored: list[int], part_read: float) -> None:
        """Count what each rank has scored. `part_read` of the file, from 0 to 1, is behind us."""
        self.shares = [held + new for held, new in zip(self.shares, scored, strict=True)]
        if self._on_event is not None and time.monotonic() - self._told >= EVERY_S:
            self._tell(part_read)

    def end(self) -> None:
        if self._on_event is not None:
            self._tell(1.0)

    def _tell(self, part_read: float) -> None:
        assert self._on_event is not None
        self._told, seconds = time.monotonic(), max(self.seconds, 1e-9)
        data: dict[str, Any] = {
            "rows": self.rows,
            "total_rows": round(self.rows / part_read) if part_read > 0 else None,
            "rows_per_s": self.rows / seconds,
            "seconds_left": seconds / part_read - seconds if part_read > 0 else None,
            "shares": list(self.shares),
        }
        self._on_event("scored", **data)
