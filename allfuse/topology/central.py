"""Servers: each fuses a slice of the block and hands it to all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from allfuse.base.errors import PlanError
from allfuse.topology.base import Topology
from allfuse.topology.layout import Layout
from allfuse.topology.schedule import Schedule, Transfer


@dataclass(frozen=True)
class Central(Topology):
    """A parameter server in its collective form: peers are servers too, each of one slice.

    2 phases. With a server on every peer (the default) each sends 2 (n-1)/n of the payload, as a
    ring does, in fewer phases and more transfers. With k servers each of them sends (n + k - 2)/k
    of it, and the others send all of it (Li et al. 2014, the parameter server, in lock-step).

    Server processes can keep `replicas` copies of each one's slice on the servers after it, so that
    one that is killed loses no update.
    """

    name: ClassVar[str] = "central"
    exact: ClassVar[bool] = True
    gathers: ClassVar[bool] = True
    servers: int | None = None
    replicas: int = 0

    def __post_init__(self) -> None:
        if self.servers is not None and self.servers < 1:
            raise PlanError(str(self), "there must be a server", "central(servers=1)")
        if not 0 <= self.replicas < (self.servers or 1):
            raise PlanError(
                str(self),
                "replicas are copies on other servers, of which there must be more than that",
                f"central(servers={max(self.replicas + 1, self.servers or 2)}, replicas=1)",
            )

    def _count(self, layout: Layout) -> int:
        return layout.size if self.servers is None else min(self.servers, layout.size)

    def schedule(self, layout: Layout, round: int = 0, seed: int = 0) -> Schedule:
        servers, n = self._count(layout), layout.size
        pairs = [(s, (s + step) % n) for step in range(1, n) for s in range(servers)]
        push = tuple(Transfer(peer, s, s, s + 1, "add") for s, peer in sorted(pairs))
        pull = tuple(Transfer(s, peer, s, s + 1, "copy") for s, peer in pairs)
        return Schedule(n, servers, (push, pull) if pairs else ())

    def bytes_per_peer(self, layout: Layout, payload_bytes: float) -> float:
        servers, n = self._count(layout), layout.size
        as_server = (servers - 1 + n - 1) / servers * payload_bytes
        return max(as_server, payload_bytes if servers < n else 0.0)

    def phases(self, layout: Layout) -> int:
        return 2 if layout.size > 1 else 0
