"""L1: starts processes; knows nothing of training.

`local` forks workers on this machine, `torchrun` joins processes that were started with its
environment, `thread` runs ranks as threads (tests), `alone` is a world of one.
"""

from __future__ import annotations

from allfuse.launcher.base import World, current_world, entered

__all__ = ["World", "current_world", "entered"]
