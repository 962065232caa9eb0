"""L1: moves bytes, knows who is alive, every wait has a deadline.

The concrete links are imported from their own files, so that no plan loads torch:
`lone`, `thread`, `group`.
"""

from __future__ import annotations

from allfuse.link.base import Board, Link, Work

__all__ = ["Board", "Link", "Work"]
