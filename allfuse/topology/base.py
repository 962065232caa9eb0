"""Who sends what to whom: the contract."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from allfuse.base.choice import Choice
from allfuse.topology.layout import Layout
from allfuse.topology.schedule import Schedule


@dataclass(frozen=True)
class Topology(Choice, ABC):
    """A way for n peers to make their values one: a pure function to a schedule.

    exact: all peers end equal, bit for bit; else they mix (gossip) and come closer in each round.
    gathers: it can bring every peer's value to one place, for rules and codecs that do not sum.
    pipelines: its phases leave links idle on one block, so that a block is cut into segments that
        follow each other.
    """

    exact: ClassVar[bool]
    gathers: ClassVar[bool] = False
    pipelines: ClassVar[bool] = False

    @abstractmethod
    def schedule(self, layout: Layout, round: int = 0, seed: int = 0) -> Schedule:
        """The phases of one round. Equal on all peers; `round` and `seed` matter to gossip only."""

    @abstractmethod
    def bytes_per_peer(self, layout: Layout, payload_bytes: float) -> float:
        """Bytes that the busiest peer sends in one round: the formula, not counted."""

    @abstractmethod
    def phases(self, layout: Layout) -> int:
        """How many transfers follow each other in one round: the formula, not counted."""
