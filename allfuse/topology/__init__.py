"""L1: who sends what to whom."""

from __future__ import annotations

from allfuse.topology.base import Topology
from allfuse.topology.central import Central
from allfuse.topology.exchange import Exchange
from allfuse.topology.gossip import Gossip
from allfuse.topology.halving import Halving
from allfuse.topology.hierarchy import Hierarchy
from allfuse.topology.layout import Layout
from allfuse.topology.native import Native
from allfuse.topology.ring import Ring
from allfuse.topology.schedule import Phase, Piece, Schedule, Transfer, Turn
from allfuse.topology.tree import Tree

TOPOLOGIES: dict[str, type[Topology]] = {
    "native": Native,
    "ring": Ring,
    "tree": Tree,
    "halving": Halving,
    "hierarchy": Hierarchy,
    "central": Central,
    "exchange": Exchange,
    "gossip": Gossip,
}

__all__ = [
    "TOPOLOGIES",
    "Layout",
    "Native",
    "Phase",
    "Piece",
    "Schedule",
    "Topology",
    "Transfer",
    "Turn",
]
