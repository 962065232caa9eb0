"""When to fuse, and how stale is allowed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from allfuse.base.choice import Choice


@dataclass(frozen=True)
class Sync(Choice, ABC):
    """Says how far replicas may be apart in clocks (their own counts of steps)."""

    @property
    @abstractmethod
    def bound(self) -> int | None:
        """The largest staleness in clocks; 0 is in step, None is unbounded."""
