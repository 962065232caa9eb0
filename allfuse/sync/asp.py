"""Asynchronous."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from allfuse.sync.base import Sync


@dataclass(frozen=True)
class Asp(Sync):
    """No replica waits for another: each update is applied when it comes (Recht et al. 2011,
    Dean et al. 2012).

    scaled: an update that missed m others is applied with 1 / (m + 1) of its size (Zhang et al.
    2016, arXiv:1511.05950, equation 5, where staleness counts from 1).
    """

    name: ClassVar[str] = "asp"
    scaled: bool = False

    @property
    def bound(self) -> int | None:
        return None
