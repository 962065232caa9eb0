"""The names of the ranks of a worker that share its model, as servers know them.

The first rank speaks for the worker and bears its name. Each other one pushes what it has, and gets
what it needs, by itself, under a name of its own; of when and from which version it hears from the
first. So to the scheduler they are one worker, whose updates count as a whole or not at all.
"""

from __future__ import annotations

MARK = "/"


def name_of(worker: str, rank: int) -> str:
    """By which servers know a rank of a worker."""
    return f"{worker}{MARK}{rank}" if rank else worker


def worker_of(name: str) -> str:
    """The worker whose rank is known by a name.

    >>> worker_of(name_of("worker 1 on host", 3)), worker_of("worker 1 on host")
    ('worker 1 on host', 'worker 1 on host')
    """
    worker, mark, rank = name.rpartition(MARK)
    return worker if mark and rank.isdecimal() else name
