"""Workers that gossip, as the scheduler sees them: who has weights, where, and what each did."""

from __future__ import annotations

from typing import Any

from allfuse.link.post import Malformed
from allfuse.roles.book import Book
from allfuse.roles.diary import read_logs
from allfuse.roles.encounters import Logged, Peers
from allfuse.roles.members import Members
from allfuse.roles.outbox import Outbox
from allfuse.roles.records import Worker

MOST = 1 << 53  # entries of a log


class Circle:
    """Tells each of the others, whenever that changes.

    A worker has weights from the moment it says so: one begins with its own, the others with copies
    of those of somebody who has some. In the book that is its `held`, which is -1 before.

    Attributes:
        collector: the name of the worker that averages all weights at the end, empty before.
    """

    def __init__(self, book: Book, outbox: Outbox, members: Members) -> None:
        self._book, self._outbox, self._members = book, outbox, members
        self._places: dict[str, str] = book.get("places", {})
        self.collector = ""
        self._without_s: float | None = None
        self._version: int = book.get("peers", 0)
        self._peers = Peers(peers=[], version=self._version)
        self._told: dict[str, int] = {}

    @property
    def ready(self) -> list[Worker]:
        """Who has weights and is here, in the order of joining."""
        found = [worker for worker in self._members.alive if worker.held >= 0]
        return sorted(found, key=lambda worker: worker.number)

    def overdue(self, has_learned: bool, timeout_s: float) -> str:
        """Why a job that has learned cannot go on, where nobody has had weights for so long: those
        who have a copy would have said so. Empty where it can."""
        now_s = self._outbox.now_s
        if not has_learned or self.ready:
            self._without_s = None
            return ""
        if self._without_s is None:
            self._without_s = now_s
        if now_s - self._without_s <= timeout_s:
            return ""
        return "all workers that had weights are lost, and with them what they learned"

    def come(self, name: str, place: str) -> None:
        """A worker says where it is."""
        if self._places.get(name) != place:
            self._places[name] = place
            self._book.put("places", self._places)

    def give(self, worker: Worker) -> None:
        """A worker has weights."""
        if worker.held < 0:
            worker.held = 0
            self._members.keep(worker)

    def write(self, logs: list[list[Any]]) -> dict[str, int]:
        """Write into the book what workers did; how many entries of each it holds from its first
        on without a gap."""
        try:
            read = read_logs(logs)
            if any(not 0 <= first < MOST for _, first, _ in read):
                raise Malformed("a place in a log that cannot be")
        except Malformed:
            self._outbox.refused["a log that cannot be read"] += 1
            return {}
        for worker, first, entries in read:
            self._book.put_log(worker, first, [list(entry) for entry in entries])
        return {worker: first + len(entries) for worker, first, entries in read}

    def log(self, worker: Worker, logs: list[list[Any]]) -> None:
        """Write logs, and say so."""
        count = self.write(logs).get(worker.name, 0)
        self._outbox.send(worker.name, Logged(count=count))

    def tell(self) -> None:
        """Everybody who has not heard of it yet hears who there is."""
        peers = [[each.name, each.number, self._places.get(each.name, "")] for each in self.ready]
        if (peers, self.collector) != (self._peers.peers, self._peers.collector):
            self._version += 1
            self._book.put("peers", self._version)
            self._peers = Peers(peers=peers, collector=self.collector, version=self._version)
        for worker in self._members.alive:
            if self._told.get(worker.name) != self._version:
                self.tell_one(worker)

    def tell_one(self, worker: Worker) -> None:
        self._told[worker.name] = self._version
        self._outbox.send(worker.name, self._peers)
