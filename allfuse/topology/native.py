"""The link's own all-reduce."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from allfuse.topology.base import Topology
from allfuse.topology.layout import Layout
from allfuse.topology.ring import Ring
from allfuse.topology.schedule import Schedule


@dataclass(frozen=True)
class Native(Topology):
    """Hands the whole fusion to the link's own all-reduce (shared memory, gloo, NCCL).

    What it declares is a ring's: these move as few bytes between peers, 2 (n-1)/n of the payload
    (Patarasuk and Yuan 2009).
    """

    name: ClassVar[str] = "native"
    exact: ClassVar[bool] = True

    def schedule(self, layout: Layout, round: int = 0, seed: int = 0) -> Schedule:
        return Ring().schedule(layout, round, seed)

    def bytes_per_peer(self, layout: Layout, payload_bytes: float) -> float:
        return Ring().bytes_per_peer(layout, payload_bytes)

    def phases(self, layout: Layout) -> int:
        return Ring().phases(layout)
