"""The scheduler's memory on disk: it goes on from here when its process is started again."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack

from allfuse.base.errors import RunError
from allfuse.roles.ledger import Unit
from allfuse.roles.records import (
    Commit,
    Offer,
    Order,
    Presence,
    Rebirth,
    Result,
    Server,
    State,
    Work,
    Worker,
    split_readers,
)

FORMAT = 3
SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID;
CREATE TABLE notes (name TEXT PRIMARY KEY, done INTEGER, state BLOB) WITHOUT ROWID;
CREATE TABLE workers (name TEXT PRIMARY KEY, number INTEGER, host TEXT, presence TEXT,
    clock INTEGER, held INTEGER) WITHOUT ROWID;
CREATE TABLE servers (shard INTEGER, birth INTEGER, name TEXT, place TEXT, found INTEGER,
    born INTEGER, PRIMARY KEY (shard, birth));
CREATE TABLE leases (lease INTEGER PRIMARY KEY, worker TEXT, clock INTEGER, block INTEGER,
    part INTEGER, offers BLOB, due BLOB, state TEXT, read INTEGER, births BLOB, loss REAL,
    count REAL, rows INTEGER, seconds REAL, options BLOB, sequence INTEGER, place INTEGER,
    weight REAL, missed INTEGER, lag INTEGER);
CREATE INDEX open_leases ON leases (state) WHERE state IN ('out', 'staged', 'revoked');
CREATE INDEX leases_of_workers ON leases (worker);
CREATE INDEX commits ON leases (sequence, place) WHERE sequence IS NOT NULL;
CREATE TABLE orders (sequence INTEGER PRIMARY KEY, updates INTEGER, readers BLOB, dropped BLOB,
    save INTEGER, factor REAL);
CREATE TABLE logs (worker TEXT, place INTEGER, entry BLOB, PRIMARY KEY (worker, place))
    WITHOUT ROWID;
"""


class Book:
    """Rows of an SQLite file (write-ahead log); ":memory:" keeps it off the disk.

    What is written between two calls of `commit` is there as a whole or not at all. It survives the
    end of the process; a crash of the machine may take the last transactions back.

    Raises:
        RunError: the file is no book, or of another version.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                self._db.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version={FORMAT}; COMMIT;")
        except sqlite3.Error as error:
            raise RunError(f"{path} cannot be used as the scheduler's book: {error}") from error
        if version not in (0, FORMAT):
            raise RunError(
                f"{path} is a scheduler's book of version {version}; this allfuse reads {FORMAT}"
            )

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is written inside is kept, or nothing where it raises."""
        try:
            yield
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        if self._db.in_transaction:
            self._db.execute("COMMIT")

    def _write(self, statement: str, *values: Any) -> None:
        if not self._db.in_transaction:
            self._db.execute("BEGIN")
        self._db.execute(statement, values)

    # Facts and notes: plain values by name.

    def put(self, name: str, value: Any) -> None:
        self._write("INSERT OR REPLACE INTO facts VALUES (?, ?)", name, _pack(value))

    def get(self, name: str, default: Any = None) -> Any:
        row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return default if row is None else _unpack(row[0])

    def put_note(self, name: str, done: int, state: dict[str, Any]) -> None:
        packed = _pack(state)
        self._write("INSERT OR REPLACE INTO notes VALUES (?, ?, ?)", name, done, packed)

    def notes(self) -> dict[str, tuple[int, dict[str, Any]]]:
        """Each note's state, with the batches that were done when it was made."""
        rows = self._db.execute("SELECT name, done, state FROM notes ORDER BY name")
        return {name: (done, _unpack(state)) for name, done, state in rows}

    # Workers and servers.

    def put_worker(self, worker: Worker, clock: int) -> None:
        self._write(
            "INSERT OR REPLACE INTO workers VALUES (?, ?, ?, ?, ?, ?)",
            worker.name,
            worker.number,
            worker.host,
            worker.presence.value,
            clock,
            worker.held,
        )

    def workers(self) -> list[tuple[Worker, int]]:
        """Each worker with its clock, in the order of joining."""
        rows = self._db.execute(
            "SELECT name, number, host, presence, max(w.clock, coalesce((SELECT "
            "l.clock + (l.state = 'committed') FROM leases l WHERE l.worker = w.name "
            "ORDER BY l.lease DESC LIMIT 1), 0)), held FROM workers w ORDER BY number"
        )
        return [
            (Worker(name, number, host, Presence(presence), held), clock)
            for name, number, host, presence, clock, held in rows
        ]

    def put_server(self, server: Server) -> None:
        self._write(
            "INSERT OR REPLACE INTO servers VALUES (?, ?, ?, ?, ?, ?)",
            server.shard,
            server.birth,
            server.name,
            server.place,
            server.found,
            server.born,
        )

    def servers(self) -> list[Server]:
        """All that there ever were, the newest of each shard last."""
        rows = self._db.execute(
            "SELECT name, shard, birth, place, found, born FROM servers ORDER BY rowid"
        )
        return [
            Server(name, shard, birth, place, found, found, born=born)
            for name, shard, birth, place, found, born in rows
        ]

    def put_rebirth(self, rebirth: Rebirth) -> None:
        self.put("rebirths", [*self.get("rebirths", []), list(rebirth)])

    def rebirths(self) -> list[Rebirth]:
        """Of all servers, in their order."""
        return [Rebirth(*each) for each in self.get("rebirths", [])]

    def restarts(self) -> list[int]:
        """After which orders the job was started again, in their order."""
        restarts: list[int] = self.get("restarts", [])
        return restarts

    # Leases.

    def put_work(self, work: Work) -> None:
        """A new lease."""
        self._write(
            "INSERT INTO leases (lease, worker, clock, block, part, offers, due, state) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            work.lease,
            work.worker,
            work.clock,
            work.unit.block,
            work.unit.part,
            _pack(work.offers),
            _pack(work.due),
            work.state.value,
        )

    def put_offers(self, work: Work) -> None:
        self._write("UPDATE leases SET offers = ? WHERE lease = ?", _pack(work.offers), work.lease)

    def put_state(self, work: Work) -> None:
        self._write("UPDATE leases SET state = ? WHERE lease = ?", work.state.value, work.lease)

    def put_dropped(self, lease: int) -> None:
        """Servers are told to forget a revoked lease."""
        self._write("UPDATE leases SET state = 'dropped' WHERE lease = ?", lease)

    def put_result(self, work: Work) -> None:
        """State and result of a lease whose update is there, and which is not ordered yet."""
        self._put_result(work, None)

    def put_commit(self, work: Work, commit: Commit) -> None:
        """State and result of a lease whose update is ordered."""
        self._put_result(work, commit)

    def _put_result(self, work: Work, commit: Commit | None) -> None:
        result = work.result
        assert result is not None
        self._write(
            "UPDATE leases SET state = ?, read = ?, births = ?, loss = ?, count = ?, rows = ?, "
            "seconds = ?, options = ?, sequence = ?, place = ?, weight = ?, missed = ?, lag = ? "
            "WHERE lease = ?",
            work.state.value,
            result.sequence,
            _pack(result.births),
            result.loss,
            result.count,
            result.rows,
            result.seconds,
            _pack(result.options),
            None if commit is None else commit.sequence,
            None if commit is None else commit.place,
            None if commit is None else commit.weight,
            None if commit is None else commit.missed,
            None if commit is None else commit.lag,
            work.lease,
        )

    def open_work(self) -> list[Work]:
        """Leases that are out or staged, and those revoked that servers are still to forget."""
        return self._works("state IN ('out', 'staged', 'revoked')")

    def _works(self, where: str) -> list[Work]:
        rows = self._db.execute(
            "SELECT lease, worker, clock, block, part, offers, due, state, read, births, loss, "
            f"count, rows, seconds, options FROM leases WHERE {where} ORDER BY lease"
        )
        found = []
        for lease, worker, clock, block, part, offers, due, state, *result in rows:
            work = Work(lease, worker, clock, Unit(block, part), [], _unpack(due), State(state))
            work.offers = [Offer(*each) for each in _unpack(offers)]
            if result[0] is not None:
                read, births, loss, count, rows, seconds, options = result
                work.result = Result(
                    read, _unpack(births), loss, count, rows, seconds, _unpack(options)
                )
            found.append(work)
        return found

    def next_lease(self) -> int:
        (highest,) = self._db.execute("SELECT max(lease) FROM leases").fetchone()
        return 0 if highest is None else int(highest) + 1

    def next_clock(self) -> int:
        """A clock that no worker had yet."""
        (highest,) = self._db.execute("SELECT max(clock) FROM leases").fetchone()
        return 0 if highest is None else int(highest) + 1

    def consumed(self) -> list[Unit]:
        """Units whose updates were ordered."""
        rows = self._db.execute("SELECT block, part FROM leases WHERE state = 'committed'")
        return [Unit(block, part) for block, part in rows]

    def units(self) -> dict[int, Unit]:
        """What every lease that there ever was is for."""
        rows = self._db.execute("SELECT lease, block, part FROM leases")
        return {lease: Unit(block, part) for lease, block, part in rows}

    # Logs of workers that gossip.

    def put_log(self, worker: str, first: int, entries: list[list[Any]]) -> None:
        """What a worker did, from a place in its log on. What is known already is left."""
        for place, entry in enumerate(entries, first):
            self._write("INSERT OR IGNORE INTO logs VALUES (?, ?, ?)", worker, place, _pack(entry))

    def logs(self) -> dict[str, list[list[Any]]]:
        """What each worker did, from its first entry to where the first one is missing."""
        rows = self._db.execute("SELECT worker, place, entry FROM logs ORDER BY worker, place")
        found: dict[str, list[list[Any]]] = {}
        for worker, place, entry in rows:
            known = found.setdefault(worker, [])
            if place == len(known):
                known.append(_unpack(entry))
        return found

    # Orders.

    def put_order(self, order: Order) -> None:
        self._write(
            "INSERT INTO orders VALUES (?, ?, ?, ?, ?, ?)",
            order.sequence,
            order.updates,
            _pack(order.readers),
            _pack(order.dropped),
            int(order.save),
            order.factor,
        )

    def orders(self, first: int, last: int) -> list[Order]:
        """Those from one sequence to another, both included."""
        rows = self._db.execute(
            "SELECT sequence, updates, readers, dropped, save, factor FROM orders "
            "WHERE sequence BETWEEN ? AND ? ORDER BY sequence",
            (first, last),
        ).fetchall()
        found = []
        for sequence, updates, readers, dropped, save, factor in rows:
            commits = self.commits(sequence, sequence)
            counting = [(each.lease, each.weight) for each in commits if each.weight]
            to, of = split_readers(_unpack(readers))
            dropped = _unpack(dropped)
            found.append(Order(sequence, updates, counting, to, dropped, bool(save), factor, of))
        return found

    def newest(self) -> tuple[int, int]:
        """The last sequence, -1 for none, and the number of updates up to it."""
        row = self._db.execute("SELECT max(sequence), updates FROM orders").fetchone()
        return (-1, 0) if row[0] is None else (int(row[0]), int(row[1]))

    def commits(self, first: int, last: int) -> list[Commit]:
        """The updates of the orders from one sequence to another, in their order."""
        rows = self._db.execute(
            "SELECT sequence, place, lease, weight, read, missed, lag FROM leases "
            "WHERE sequence BETWEEN ? AND ? ORDER BY sequence, place",
            (first, last),
        )
        return [Commit(*row) for row in rows]

    def history(self) -> list[tuple[Work, Commit]]:
        """Every update that was ordered, in their order, with what its worker said of it."""
        commits = {commit.lease: commit for commit in self.commits(0, self.newest()[0])}
        works = {work.lease: work for work in self._works("state = 'committed'")}
        return [(works[lease], commit) for lease, commit in commits.items()]

    def newest_loss(self) -> float | None:
        """The mean loss of the block learned from last that had samples; None where there is
        none."""
        (loss,) = self._db.execute(
            "SELECT sum(loss) / sum(count) FROM leases WHERE state = 'committed' AND count > 0 "
            "AND block = (SELECT max(block) FROM leases WHERE state = 'committed' AND count > 0)"
        ).fetchone()
        return None if loss is None else float(loss)

    def tally(self) -> dict[State, int]:
        """How many leases there are of each state."""
        rows = self._db.execute("SELECT state, count(*) FROM leases GROUP BY state")
        return {State(state): count for state, count in rows}

    def updates_until(self, sequence: int) -> int:
        """How many updates were ordered up to a sequence."""
        row = self._db.execute(
            "SELECT updates FROM orders WHERE sequence <= ? ORDER BY sequence DESC LIMIT 1",
            (sequence,),
        ).fetchone()
        return 0 if row is None else int(row[0])

    def strike(self, last: int) -> int:
        """Take back all that came after a sequence, for a job that starts again from there: nobody
        is here, and what was learned since is to be learned again. How many updates were lost."""
        lost = self.newest()[1] - self.updates_until(last)
        self._write(
            "UPDATE leases SET state = 'dropped', sequence = NULL "
            "WHERE sequence > ? OR state IN ('out', 'staged', 'revoked')",
            last,
        )
        self._write("DELETE FROM orders WHERE sequence > ?", last)
        self._write("UPDATE workers SET presence = 'gone'")
        self._write("DELETE FROM servers")
        self._write(
            "DELETE FROM facts WHERE name IN "
            "('task', 'stop', 'end', 'due', 'final_due', 'finished', 'lacking')"
        )
        versions = self.get("versions", {})
        self.put("versions", {n: known for n, known in versions.items() if n <= last})
        self.put("rebirths", [list(each) for each in self.rebirths() if each.born <= last])
        self.put("restarts", [*(each for each in self.restarts() if each < last), last])
        return lost


def _pack(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed


def _unpack(packed: bytes) -> Any:
    return msgpack.unpackb(packed, strict_map_key=False)
