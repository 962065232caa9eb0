"""One sequence of orders for all servers, and how far each server has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from allfuse.roles import messages as say
from allfuse.roles.book import Book
from allfuse.roles.norms import Norms
from allfuse.roles.outbox import Outbox
from allfuse.roles.records import Commit, Order, Rebirth, Server
from allfuse.roles.terms import Terms

MOST_AT_ONCE = 256  # orders of one message
ROOM = 1 << 62  # of a number that the book can hold


@dataclass(frozen=True)
class Arrival:
    """A new server, or the one in whose place another is about to come. lost: updates that its
    shard is without. is_here: it is part of the job now, and not still asking for copies."""

    server: Server
    lost: int = 0
    is_here: bool = True


class Ordering:
    """The orders, each of a sequence; and the servers, one for each shard.

    Attributes:
        current: the last sequence, -1 before the first.
        updates: how many of the orders brought one.
        servers: by shard, the newest of each.
        unwritten: of which sequence a server could not write its shard to disk, and why, if none
            was written by all since then.
        lacking: shards that have no weights at all.
        blueprint: what servers hold, once a worker has said so.
    """

    def __init__(self, book: Book, terms: Terms, outbox: Outbox) -> None:
        self._book, self._terms, self._outbox = book, terms, outbox
        self.current, self.updates = book.newest()
        self.servers: dict[int, Server] = {}
        self._births: set[tuple[int, int]] = set()
        for server in book.servers():
            self.servers[server.shard] = server
            self._births.add((server.shard, server.birth))
        everything = range(terms.servers) if self.current < 0 else ()
        self.lacking: set[int] = set(book.get("lacking", everything))
        self.blueprint: dict[str, Any] | None = None
        self.norms = Norms(outbox, terms.resend_s)
        self.saved: int = book.get("saved", -1)
        self._saving: dict[int, set[int]] = {}
        self.unwritten: tuple[int, str] | None = None
        self._failed: dict[tuple[int, int], int] = {}  # the last one, by shard and birth
        self._ordered_save: int | None = None
        self._next_save_s: float | None = None
        self._moved_s: float | None = None

    @property
    def is_whole(self) -> bool:
        """Each shard has a server that can be reached."""
        servers = self.servers.values()
        return len(servers) == self._terms.servers and all(each.is_up for each in servers)

    @property
    def births(self) -> list[int]:
        return [self.servers[shard].birth for shard in sorted(self.servers)]

    @property
    def places(self) -> list[str]:
        return [self.servers[shard].place for shard in sorted(self.servers)]

    @property
    def is_settled(self) -> bool:
        """All servers carried out all orders, and wrote to disk what they were told to."""
        done = all(server.applied >= self.current for server in self.servers.values())
        return done and (self._ordered_save is None or self.saved >= self._ordered_save)

    @property
    def _partners(self) -> say.Partners:
        found = [self.servers.get(shard) for shard in range(self._terms.servers)]
        return say.Partners(
            places=["" if server is None else server.place for server in found],
            births=[-1 if server is None else server.birth for server in found],
            whole=[server is not None and server.whole for server in found],
        )

    def by_name(self, name: str) -> Server | None:
        return next((each for each in self.servers.values() if each.name == name), None)

    def place(
        self,
        commits: list[Commit],
        to: list[str],
        dropped: list[int],
        *,
        of: Mapping[str, int],
        factor: float = 1.0,
        save: bool = False,
        is_last: bool = False,
    ) -> Order:
        """Write the next order into the book and send it to all servers.

        of: the fragment of the weights that some of those in `to` get; the others get all.

        What counts nothing is no update: servers forget it.
        """
        counting = [(commit.lease, commit.weight) for commit in commits if commit.weight]
        void = [commit.lease for commit in commits if not commit.weight]
        self.current += 1
        self.updates += bool(counting)
        self.norms.forget()
        order = Order(
            self.current,
            self.updates,
            counting,
            to,
            dropped + void,
            is_last or save or self._is_save_due(),
            factor,
            of,
        )
        if order.save:
            self._ordered_save = order.sequence
        if order.save and self._terms.gossips:
            self.saved = order.sequence  # who asks for a checkpoint brings all of it
        self._book.put_order(order)
        message = say.Orders(first=order.sequence, entries=[order.plain])
        for shard in sorted(self.servers):
            server = self.servers[shard]
            if server.applied == order.sequence - 1:  # else it waits for earlier ones since then
                server.asked_s = self._outbox.now_s
            self._send(server, message)
        return order

    def serve(self, sender: str, message: say.Serve) -> Arrival | None:
        """A server is there; what is new about it, if anything."""
        shard, birth = message.index, message.birth
        if not 0 <= shard < self._terms.servers or not 0 <= birth < ROOM:
            self._refuse(sender, f"shard {shard} of {self._terms.servers}, birth {birth}")
            return None
        known = self.servers.get(shard)
        if known is not None and known.birth == birth:
            known.is_up, known.name = True, sender
            self._advance(known, message.applied)
            if self._terms.replicas:
                self._send(known, self._partners)
            if not message.found:
                self.welcome(known)
            elif known.applied < self.current:
                self._resend(known)
            return None
        if (shard, birth) in self._births:
            self._outbox.refused["a server that has a successor"] += 1
            return None
        if message.applied > self.current:
            self._refuse(
                sender, f"its weights are of {message.applied}, after the last order {self.current}"
            )
            return None
        if known is not None and not message.settled:
            self._outbox.send(sender, self._partners)
            return Arrival(known, is_here=False)
        return self._add(sender, message)

    def welcome(self, server: Server) -> None:
        """Tell a server what it holds, once that is known."""
        if self.blueprint is None:
            return
        found = say.Found(
            blueprint=self.blueprint,
            servers=self._terms.servers,
            sequence=server.found,
            born=server.born,
        )
        self._outbox.send(server.name, found)
        if server.applied < self.current:
            self._resend(server)

    def applied(self, sender: str, message: say.Applied) -> None:
        """How far a server is."""
        server = self.by_name(sender)
        if server is None or message.sequence > self.current:
            self._outbox.refused["applied by nobody known, or what was never ordered"] += 1
            return
        self._advance(server, message.sequence)
        if message.saved is not None and self.saved < message.saved <= self.current:
            self._note_saved(server.shard, message.saved)
        if self._failed.get((server.shard, server.birth), -1) < message.failed <= self.current:
            self._failed[server.shard, server.birth] = message.failed
            self._note_failed(server, message)

    def lose(self, server: Server) -> None:
        server.is_up = False
        self._moved_s = self._outbox.now_s

    def give(self) -> None:
        """The weights that were lacking were given."""
        self.lacking.clear()
        self._book.put("lacking", [])

    def tick(self) -> None:
        """Say again what was not answered."""
        now_s = self._outbox.now_s
        self.norms.tick(server for server in self.servers.values() if server.is_up)
        for server in self.servers.values():
            waits = server.is_up and server.applied < self.current
            if waits and now_s - server.asked_s >= self._terms.resend_s:
                self._resend(server)

    def overdue(self) -> str:
        """Which server is waited for, and why, longer than the terms allow; empty for none."""
        now_s, late = self._outbox.now_s, self._late()
        if not late or self._moved_s is None:
            self._moved_s = now_s
        waited_s = now_s - self._moved_s
        return f"{late} for {waited_s:.0f} s" if late and waited_s > self._terms.timeout_s else ""

    def _late(self) -> str:
        for shard in range(self._terms.servers):
            server = self.servers.get(shard)
            if server is None or not server.is_up:
                return f"server {shard} of {self._terms.servers} is not there"
            if server.applied < self.current:
                after = f"carried out nothing after order {server.applied} of {self.current}"
                return f"server {shard} at {server.place} has {after}"
        return ""

    def _advance(self, server: Server, sequence: int) -> None:
        if server.applied < sequence <= self.current:
            server.applied = sequence
            self._moved_s = self._outbox.now_s

    def _add(self, sender: str, message: say.Serve) -> Arrival:
        shard, place = message.index, message.place
        found, born = message.applied if message.whole else self.current, self.current
        server = Server(
            sender, shard, message.birth, place, found, found, whole=message.whole, born=born
        )
        if shard in self.servers and born >= 0:
            self._book.put_rebirth(Rebirth(shard, message.applied, born, message.whole))
        self.servers[shard] = server
        self._births.add((shard, server.birth))
        self._book.put_server(server)
        self._saving.clear()  # what was to be saved may have been lost with the other one
        self._ordered_save = None
        self._moved_s = self._outbox.now_s
        if message.applied < 0 and shard not in self.lacking:
            self.lacking.add(shard)
            self._book.put("lacking", sorted(self.lacking))
        self.welcome(server)
        if self._terms.replicas:
            for each in self.servers.values():
                self._send(each, self._partners)
        if message.whole:
            return Arrival(server)
        return Arrival(server, self.updates - self._book.updates_until(message.applied))

    def _refuse(self, sender: str, reason: str) -> None:
        self._outbox.refused["a server that does not fit"] += 1
        self._outbox.send(sender, say.Refused(reason=reason))

    def _send(self, server: Server, message: say.Message) -> None:
        if server.is_up:
            self._outbox.send(server.name, message)

    def _resend(self, server: Server) -> None:
        first = server.applied + 1
        server.asked_s = self._outbox.now_s
        orders = self._book.orders(first, min(self.current, first + MOST_AT_ONCE - 1))
        entries = [order.plain for order in orders]
        self._send(server, say.Orders(first=first, entries=entries))

    def _is_save_due(self) -> bool:
        every_s, now_s = self._terms.snapshot_s, self._outbox.now_s
        if every_s is None or (self._ordered_save is not None and self.saved < self._ordered_save):
            return False
        if self._next_save_s is not None and now_s < self._next_save_s:
            return False
        self._next_save_s = now_s + every_s
        return True

    def _note_failed(self, server: Server, message: say.Applied) -> None:
        """A server could not write what it was to: it is tried again when the next one is due."""
        if self._ordered_save is not None and self._ordered_save <= message.failed:
            self._ordered_save = None
        if message.failed <= self.saved:
            return
        if self.unwritten is None:  # else it is known
            self._outbox.tell(
                "warning",
                text=f"server {server.shard} could not write its weights to disk: "
                f"{message.reason}; training goes on, and the next snapshot is tried again",
            )
        self.unwritten = message.failed, message.reason

    def _note_saved(self, shard: int, sequence: int) -> None:
        holders = self._saving.setdefault(sequence, set())
        holders.add(shard)
        if len(holders) < self._terms.servers:
            return
        self.saved = sequence
        if self.unwritten is not None and self.unwritten[0] <= sequence:
            self.unwritten = None
        self._saving = {each: who for each, who in self._saving.items() if each > sequence}
        self._book.put("saved", sequence)
        self._outbox.tell("snapshot", sequence=sequence, updates=self.updates)
