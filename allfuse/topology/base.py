"""Who sends what to whom."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from allfuse.base.choice import Choice


@dataclass(frozen=True)
class Topology(Choice, ABC):
    """A way for n peers to make their values one.

    `exact` says that all peers end equal, bit for bit; else it mixes (gossip).
    """

    exact: ClassVar[bool]

    @abstractmethod
    def bytes_per_peer(self, peers: int, payload_bytes: int) -> int:
        """Bytes that one peer sends to fuse a payload once."""
