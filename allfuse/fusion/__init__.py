"""L2: composes rule, topology, sync, codec and link; refuses pairings without meaning."""

from __future__ import annotations

from allfuse.fusion.base import Fusion, choose

__all__ = ["Fusion", "choose"]
