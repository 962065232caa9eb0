"""L2: composes rule, topology, sync, codec and link; refuses pairings without meaning."""

from __future__ import annotations

from allfuse.fusion.base import Fusion, choose
from allfuse.fusion.fuser import Fuser

__all__ = ["Fuser", "Fusion", "choose"]
