"""L1: who sends what to whom."""

from __future__ import annotations

from allfuse.topology.base import Topology
from allfuse.topology.native import Native

TOPOLOGIES: dict[str, type[Topology]] = {"native": Native}

__all__ = ["TOPOLOGIES", "Native", "Topology"]
