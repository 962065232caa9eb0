"""A ring: reduce-scatter, then all-gather."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from allfuse.topology.base import Topology
from allfuse.topology.layout import Layout
from allfuse.topology.schedule import Op, Phase, Schedule, Transfer


@dataclass(frozen=True)
class Ring(Topology):
    """Each peer talks to its two neighbours only, and sends as little as any exact fusion can.

    2 (n-1) phases, 2 (n-1)/n of the payload sent by each peer (Patarasuk and Yuan 2009). Neighbours
    are taken host by host, so that each host has one stream out and one in.
    """

    name: ClassVar[str] = "ring"
    exact: ClassVar[bool] = True

    def schedule(self, layout: Layout, round: int = 0, seed: int = 0) -> Schedule:
        order = [peer for group in layout.by_host for peer in group]
        return Schedule(layout.size, layout.size, ring_phases(order, range(layout.size)))

    def bytes_per_peer(self, layout: Layout, payload_bytes: float) -> float:
        return 2 * (layout.size - 1) / layout.size * payload_bytes

    def phases(self, layout: Layout) -> int:
        return 2 * (layout.size - 1)


def ring_phases(order: list[int], bounds: range) -> tuple[Phase, ...]:
    """The peers in `order` fuse the chunks in `bounds`, of which there are a multiple of them.

    Part p of the chunks travels once around and is added to at each stop, which ends at the peer
    before its first; then around again, and is copied.
    """
    n = len(order)
    width = len(bounds) // n

    def phase(turn: int, lead: int, op: Op) -> Phase:
        transfers = []
        for place, peer in enumerate(order):
            start = bounds.start + (place + lead - turn) % n * width
            transfers.append(Transfer(peer, order[(place + 1) % n], start, start + width, op))
        return tuple(transfers)

    reduce = [phase(turn, 0, "add") for turn in range(n - 1)]
    gather = [phase(turn, 1, "copy") for turn in range(n - 1)]
    return (*reduce, *gather)
