"""What workers that gossiped did, put into one order in which one process can do it again.

Each worker's own log is in order; an answer comes after its offer, and what was applied after its
answer. Any order that keeps to this gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from allfuse.base.errors import AllfuseError
from allfuse.roles.diary import (
    ANSWERED,
    APPLIED,
    BEGIN,
    COPIED,
    GATHERED,
    GAVE,
    LENT,
    OFFERED,
    Entry,
)

AFTER = {ANSWERED: OFFERED, APPLIED: ANSWERED, COPIED: LENT, GATHERED: GAVE}
"""What a peer did before."""


@dataclass(frozen=True)
class Learned:
    """Steps of a lease that a worker did in a row: from `first`, of the lease, before `last`."""

    worker: str
    lease: int
    first: int
    last: int


@dataclass(frozen=True)
class Met:
    """A deed of a worker with another one, or of its own."""

    worker: str
    entry: Entry


class Log:
    """One worker's deeds, as far as they were done."""

    def __init__(self, worker: str, entries: Sequence[Entry]) -> None:
        self.worker, self.entries = worker, entries
        self.place, self.lease, self.steps = 0, -1, 0

    @property
    def next(self) -> Entry | None:
        return self.entries[self.place] if self.place < len(self.entries) else None

    def learn(self, lease: int, until: int) -> Iterator[Learned]:
        """The steps until then."""
        if lease != self.lease or until < self.steps:
            raise AllfuseError(
                f"the log of {self.worker} cannot be right: it was at step {self.steps} of lease "
                f"{self.lease}, and then at step {until} of lease {lease}"
            )
        if until > self.steps:
            yield Learned(self.worker, lease, self.steps, until)
            self.steps = until


def in_order(
    logs: Mapping[str, Sequence[Entry]],
    steps_of: Callable[[int], int],
    is_committed: Callable[[int], bool],
) -> Iterator[Learned | Met]:
    """All that was done, in an order in which it can be done again.

    Args:
        logs: by worker. steps_of: a lease. is_committed: whether a lease counts; one that does was
            done to its end.

    Raises:
        AllfuseError: there is none: somebody took in what nobody gave.
    """
    runs = [Log(worker, entries) for worker, entries in sorted(logs.items())]
    done: set[tuple[str, str, str, int]] = set()
    moved = True
    while moved:
        moved = False
        for run in runs:
            while (entry := run.next) is not None and _may_follow(run.worker, entry, done):
                if entry.deed == BEGIN:
                    if run.lease >= 0:
                        yield from run.learn(run.lease, steps_of(run.lease))
                    run.lease, run.steps = entry.lease, 0
                yield from run.learn(entry.lease, entry.steps)
                yield Met(run.worker, entry)
                done.add((entry.deed, run.worker, entry.peer, entry.number))
                run.place, moved = run.place + 1, True
    for run in runs:
        if run.next is not None:
            raise AllfuseError(
                f"the log of {run.worker} cannot be right: it {run.next.deed} {run.next.number} of "
                f"{run.next.peer or 'nobody'}, who never came to that"
            )
        if run.lease >= 0 and is_committed(run.lease):
            yield from run.learn(run.lease, steps_of(run.lease))


def _may_follow(worker: str, entry: Entry, done: set[tuple[str, str, str, int]]) -> bool:
    before = AFTER.get(entry.deed)
    if before is None or entry.peer in ("", worker):
        return True
    return (before, entry.peer, worker, entry.number) in done
