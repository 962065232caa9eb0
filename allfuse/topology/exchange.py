"""Everybody sends everything to everybody."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from allfuse.topology.base import Topology
from allfuse.topology.layout import Layout
from allfuse.topology.schedule import Schedule, Transfer


@dataclass(frozen=True)
class Exchange(Topology):
    """One phase: each peer hears all others and sums in the order of peers.

    The fewest phases there can be, for blocks so small that their bytes hardly count, and for
    encoded ones where sending all of them once costs no more than a sum that is encoded again.
    Each sends n-1 times the payload (an all-gather by direct messages).
    """

    name: ClassVar[str] = "exchange"
    exact: ClassVar[bool] = True
    gathers: ClassVar[bool] = True

    def schedule(self, layout: Layout, round: int = 0, seed: int = 0) -> Schedule:
        n = layout.size
        pairs = [(peer, (peer + step) % n) for step in range(1, n) for peer in range(n)]
        phase = tuple(Transfer(src, dst, 0, 1, "collect") for src, dst in pairs)
        return Schedule(n, 1, (phase,) if phase else ())

    def bytes_per_peer(self, layout: Layout, payload_bytes: float) -> float:
        return (layout.size - 1) * payload_bytes

    def phases(self, layout: Layout) -> int:
        return min(1, layout.size - 1)
