"""Stale synchronous."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from allfuse.base.errors import PlanError
from allfuse.sync.base import Sync


@dataclass(frozen=True)
class Ssp(Sync):
    """A replica may be at most `s` clocks ahead of the slowest (Ho et al. 2013, SSP).

    Before clock c a replica has seen all updates of the clocks up to c - s - 1. `ssp(0)` is `bsp`.
    """

    name: ClassVar[str] = "ssp"
    s: int

    def __post_init__(self) -> None:
        if isinstance(self.s, int) and self.s < 0:
            raise PlanError(str(self), "the bound counts clocks, from 0", "ssp(0)")

    @property
    def bound(self) -> int | None:
        return self.s
