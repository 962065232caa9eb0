"""Bulk synchronous."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from allfuse.sync.base import Sync


@dataclass(frozen=True)
class Bsp(Sync):
    """Every replica waits for the fusion of each step (Valiant 1990): staleness 0."""

    name: ClassVar[str] = "bsp"

    @property
    def bound(self) -> int | None:
        return 0
