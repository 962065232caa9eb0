"""L1: when to fuse and how stale is allowed."""

from __future__ import annotations

from allfuse.sync.asp import Asp
from allfuse.sync.base import Sync
from allfuse.sync.bsp import Bsp
from allfuse.sync.ssp import Ssp

SYNCS: dict[str, type[Sync]] = {"bsp": Bsp, "ssp": Ssp, "asp": Asp}

__all__ = ["SYNCS", "Asp", "Bsp", "Ssp", "Sync"]
