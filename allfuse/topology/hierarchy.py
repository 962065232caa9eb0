"""Inside each host, then between hosts, then inside again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from allfuse.topology.base import Topology
from allfuse.topology.layout import Layout
from allfuse.topology.ring import ring_phases
from allfuse.topology.schedule import Phase, Schedule, Transfer


@dataclass(frozen=True)
class Hierarchy(Topology):
    """Every byte leaves a host once on its way to the sum and once as a part of it.

    With m peers on the smallest of h hosts, m of each host's peers fuse a slice of the block each:
    they take it from the others of their host, fuse it in a ring with their like on the other
    hosts, and hand it out. A host sends 2 (h-1)/h of the payload to others, where a ring through
    all n peers sends 2 (n-1)/n of it, and m times that if all neighbours sit on other hosts.
    Levels as in Jia et al. 2018 (arXiv:1807.11205).
    """

    name: ClassVar[str] = "hierarchy"
    exact: ClassVar[bool] = True

    def schedule(self, layout: Layout, round: int = 0, seed: int = 0) -> Schedule:
        groups = layout.by_host
        slices, hosts = min(len(group) for group in groups), len(groups)

        def inside(op: str) -> Phase:
            return tuple(
                Transfer(peer, group[s], s * hosts, (s + 1) * hosts, "add")
                if op == "add"
                else Transfer(group[s], peer, s * hosts, (s + 1) * hosts, "copy")
                for group in groups
                for s in range(slices)
                for peer in group
                if peer != group[s]
            )

        rings = [
            ring_phases([group[s] for group in groups], range(s * hosts, (s + 1) * hosts))
            for s in range(slices)
        ]
        between = tuple(sum(phases, ()) for phases in zip(*rings, strict=True))
        phases = (inside("add"), *between, inside("copy"))
        return Schedule(layout.size, slices * hosts, tuple(phase for phase in phases if phase))

    def bytes_per_peer(self, layout: Layout, payload_bytes: float) -> float:
        sizes = [len(group) for group in layout.by_host]
        slices, hosts, largest = min(sizes), len(sizes), max(sizes)
        as_owner = (slices - 1 + largest - 1 + 2 * (hosts - 1) / hosts) / slices
        return max(as_owner, 1.0 if largest > slices else 0.0) * payload_bytes

    def phases(self, layout: Layout) -> int:
        sizes = [len(group) for group in layout.by_host]
        return 2 * (max(sizes) > 1) + 2 * (len(sizes) - 1)
