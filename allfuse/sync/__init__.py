"""L1: when to fuse and how stale is allowed."""

from __future__ import annotations

from allfuse.sync.base import Sync
from allfuse.sync.bsp import Bsp

SYNCS: dict[str, type[Sync]] = {"bsp": Bsp}

__all__ = ["SYNCS", "Bsp", "Sync"]
