"""The process group's own all-reduce."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from allfuse.topology.base import Topology


@dataclass(frozen=True)
class Native(Topology):
    """Hands the whole fusion to the link's own all-reduce (gloo, NCCL).

    The declared bytes are those of a bandwidth-optimal all-reduce, 2 (n-1)/n times the payload,
    which gloo's ring and NCCL's ring both send (Patarasuk and Yuan 2009, section 4).
    """

    name: ClassVar[str] = "native"
    exact: ClassVar[bool] = True

    def bytes_per_peer(self, peers: int, payload_bytes: int) -> int:
        return 2 * (peers - 1) * payload_bytes // peers
