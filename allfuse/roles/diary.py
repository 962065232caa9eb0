"""What a worker that gossips does, in its order: for the scheduler's book, and for the replay."""

from __future__ import annotations

from typing import Any, NamedTuple

from allfuse.link.post import Malformed

BEGIN = "begin"  # work on a lease
OFFERED, ANSWERED, APPLIED = "offered", "answered", "applied"  # an exchange
LENT, COPIED = "lent", "copied"  # weights for one who has none
GAVE, GATHERED = "gave", "gathered"  # at the end, to the one that averages, and by it

DEEDS = (BEGIN, OFFERED, ANSWERED, APPLIED, LENT, COPIED, GAVE, GATHERED)


class Entry(NamedTuple):
    """One deed, after so many steps of a lease (-1 before the first).

    peer: with whom, by name; empty for `begin`, and for weights of its own that it copied from
    nobody. number: of the visitor's question. base: of an offer that was encoded, the number of the
    exchange that left the copy which it is ahead of.
    """

    deed: str
    lease: int
    steps: int
    peer: str = ""
    number: int = -1
    base: int = -1


class Diary:
    """The log of one worker, of which the book has a part, and what it has heard of others' logs.

    What is not in the book yet goes along with everything that others come to depend on: where this
    worker is lost, those know what it did until then.

    Args:
        owner: the worker.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.lease, self.steps = -1, 0
        self._entries: list[Entry] = []  # that are not in the book
        self._first = 0  # place of the first of them
        self._others: dict[str, dict[int, Entry]] = {}

    @property
    def count(self) -> int:
        """Entries in all."""
        return self._first + len(self._entries)

    def begin(self, lease: int) -> None:
        self.lease, self.steps = lease, 0
        self.note(BEGIN)

    def note(self, deed: str, peer: str = "", number: int = -1, base: int = -1) -> None:
        self._entries.append(Entry(deed, self.lease, self.steps, peer, number, base))

    def hear(self, logs: list[list[Any]]) -> None:
        """What others had not told the scheduler yet, which this worker depends on from now on.

        Raises:
            Malformed: they are no logs.
        """
        for worker, first, entries in read_logs(logs):
            if worker != self.owner:
                known = self._others.setdefault(worker, {})
                known.update(enumerate(entries, first))

    def logs(self) -> list[list[Any]]:
        """All that is not known to be in the book, as plain values."""
        found = [[self.owner, self._first, [list(entry) for entry in self._entries]]]
        for worker, entries in self._others.items():
            found += [[worker, place, [list(entry)]] for place, entry in entries.items()]
        return found

    def settle(self, count: int, logs: list[list[Any]]) -> None:
        """So many entries of its own, and those of others that were told, are in the book."""
        gone = max(0, min(count, self.count) - self._first)
        self._entries, self._first = self._entries[gone:], self._first + gone
        for worker, first, entries in logs:
            known = self._others.get(worker, {})
            for place in range(first, first + len(entries)):
                known.pop(place, None)
            if not known:
                self._others.pop(worker, None)


def read_logs(logs: list[list[Any]]) -> list[tuple[str, int, list[Entry]]]:
    """Each worker's name, the place of the first entry, and the entries.

    Raises:
        Malformed: they are no logs.
    """
    found = []
    for each in logs:
        if len(each) != 3 or [type(part) for part in each] != [str, int, list]:
            raise Malformed("a log is a name, a place and entries")
        found.append((each[0], each[1], [_read(entry) for entry in each[2]]))
    return found


def _read(entry: Any) -> Entry:
    kinds = [type(part) for part in entry] if isinstance(entry, list | tuple) else []
    if kinds != [str, int, int, str, int, int] or entry[0] not in DEEDS:
        raise Malformed(f"an entry of a log with {kinds}")
    return Entry(*entry)
