"""The scheduler, on a simulated network: who works on what, in which order updates come."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from allfuse.base.errors import RunError
from allfuse.roles import messages as say
from allfuse.roles.book import Book
from allfuse.roles.leases import Leases
from allfuse.roles.messages import SCHEDULER
from allfuse.roles.records import State, Work
from allfuse.roles.scheduler import Scheduler
from allfuse.roles.terms import Terms
from allfuse.sync import Asp, Bsp, Ssp, Sync
from tests.simulated import Auditor, FakeServer, FakeWorker, Faults, Mail, Network, join

SYNCS: tuple[Sync, ...] = (Bsp(), Ssp(1), Ssp(3), Asp())
WILD = Faults(drop=0.1, double=0.1, delay_s=0.5)


class Desk:
    """A scheduler whose workers and one server answer as the test says, at once."""

    def __init__(
        self,
        terms: Terms,
        *names: str,
        make: type[Scheduler] = Scheduler,
        bound: int | None = None,
        book: Book | None = None,
        **job: Any,
    ) -> None:
        self.terms, self.make, self.job = terms, make, job
        self.book = Book(":memory:") if book is None else book
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.now_s = 0.0
        self.auditor = Auditor(bound)
        self.leases: dict[str, say.Lease] = {}  # the newest of each worker
        self.begin()
        for shard in range(terms.servers):
            self.serve(shard, birth=shard)
        for name in names:
            self.join(name)

    def begin(self) -> None:
        """A scheduler from the book as it is."""
        self.scheduler = self.make(self.terms, self.book, self.emit)

    def emit(self, name: str, /, **data: Any) -> None:
        self.events.append((name, data))

    def told(self, name: str) -> list[dict[str, Any]]:
        return [data for each, data in self.events if each == name]

    def say(self, sender: str, message: say.Message) -> Mail:
        return self.take(self.scheduler.handle(sender, message, self.now_s))

    def take(self, mail: Mail) -> Mail:
        for to, message in mail:
            self.auditor.watch(SCHEDULER, to, message)
            if isinstance(message, say.Lease):
                self.leases[to] = message
            if isinstance(message, say.Welcome) and message.gives_weights:
                given = say.Finished(
                    lease=-1, sequence=-1, births=self.births, loss=0, count=0, rows=0, seconds=0
                )
                mail = mail + self.say(to, given)
        return mail

    @property
    def births(self) -> list[int]:
        return list(range(self.terms.servers))

    def serve(self, shard: int, **changed: Any) -> Mail:
        serve = say.Serve(index=shard, birth=shard, applied=-1, place=f"p{shard}")
        return self.say(f"s{shard}", replace(serve, **changed))

    def join(self, name: str, **changed: Any) -> Mail:
        return self.say(name, join(name, **{**self.job, **changed}))

    def finish(self, name: str, lease: say.Lease | None = None, **changed: Any) -> Mail:
        lease = lease or self.leases[name]
        finished = say.Finished(
            lease=lease.lease,
            sequence=lease.sequence,
            births=self.births,
            loss=1.0,
            count=1.0,
            rows=1,
            seconds=0.1,
        )
        return self.say(name, replace(finished, **changed))

    def is_busy(self, name: str) -> bool:
        """Whether a worker has a lease that is not ordered."""
        return name in self.leases and self.leases[name].lease not in self.auditor.committed

    def lose(self, name: str) -> Mail:
        return self.take(self.scheduler.lost(name, self.now_s))

    def wait(self, seconds: float) -> Mail:
        self.now_s += seconds
        return self.take(self.scheduler.tick(self.now_s))


def only(mail: Mail, kind: type[say.Message]) -> list[tuple[str, Any]]:
    return [(to, message) for to, message in mail if isinstance(message, kind)]


def orders(mail: Mail) -> list[list[Any]]:
    return [message.entries[0] for _, message in only(mail, say.Orders)]


# The bound of ssp, in random schedules.


@pytest.fixture(scope="module")
def blank() -> Callable[[], Book]:
    """Makes one book blank again and again, which is faster than to make it."""
    book = Book(":memory:")

    def wipe() -> Book:
        with book.transaction():
            for table in ("facts", "notes", "workers", "servers", "leases", "orders"):
                book._write(f"DELETE FROM {table}")
        return book

    return wipe


def run_schedule(book: Book, seed: int, s: int, make: type[Scheduler] = Scheduler) -> Auditor:
    """Workers that take random times, come, are killed, and say things twice."""
    chance = random.Random(seed)
    parts, steps = chance.randint(1, 6), chance.choice([1, 1, 2, 3])
    names = [f"w{n}" for n in range(parts)]
    speeds = {name: chance.choice([1, 1, 4, 16]) for name in names}
    terms = Terms(parts=parts, sync=Ssp(s), min=1, max=parts + 2, snapshot_s=None)
    desk = Desk(terms, *names, make=make, bound=s, book=book, steps=steps, epochs=None)
    while desk.scheduler.outcome is None:
        event = chance.random()
        if event < 0.04 and len(speeds) > 1:
            name = chance.choice(list(speeds))
            del speeds[name]
            desk.lose(name)
        elif event < 0.08 and len(speeds) < terms.most:
            newcomer = f"n{len(desk.events)}"
            speeds[newcomer] = chance.choice([1, 4, 16])
            desk.join(newcomer)
        else:
            busy = [name for name in speeds if desk.is_busy(name)]
            name = max(busy, key=lambda name: chance.random() ** (1 / speeds[name]))
            lease = desk.leases[name]
            desk.finish(name, lease)
            if event > 0.95:
                desk.finish(name, lease)
    desk.auditor.check(steps, parts)
    return desk.auditor


@pytest.mark.parametrize("s", range(5))
@pytest.mark.parametrize("seeds", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_ssp_never_exceeds_its_bound_in_random_schedules(
    s: int, seeds: int, blank: Callable[[], Book]
) -> None:
    highest = max(run_schedule(blank(), seed, s).highest for seed in range(seeds))
    assert highest > s


class Unbound(Scheduler):
    """Lets everybody begin."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._course._clocks.may_begin = lambda worker: True  # type: ignore[method-assign]


@pytest.mark.parametrize("s", range(1, 4))
def test_a_scheduler_that_ignores_the_bound_is_found_out(s: int, blank: Callable[[], Book]) -> None:
    with pytest.raises(AssertionError, match="clocks apart"):
        for seed in range(200):
            run_schedule(blank(), seed, s, Unbound)


# Exactly once, on a network that loses, doubles and delays.


class World:
    """A job on a network: a scheduler, servers, workers, and what happens to them."""

    def __init__(
        self,
        seed: int,
        sync: Sync,
        faults: Faults = WILD,
        *,
        make: type[Scheduler] = Scheduler,
        parts: int = 3,
        workers: int = 3,
        servers: int = 2,
        every: int = 1,
        fewest: int = 1,
        **job: Any,
    ) -> None:
        self.terms = Terms(
            parts=parts,
            every=every,
            sync=sync,
            servers=servers,
            min=fewest,
            max=8,
            lease_s=5.0,
            snapshot_s=2.0,
        )
        self.make, self.book = make, Book(":memory:")
        self.auditor = Auditor(sync.bound if sync.bound else None)
        self.net = Network(seed, faults, watch=self.auditor.watch)
        self.chance = self.net.random
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.scheduler = make(self.terms, self.book, self.emit)
        self.net.add(SCHEDULER, self.scheduler)
        self.servers: dict[int, FakeServer] = {}
        self.seed, self.job = seed, job
        self.workers: dict[str, FakeWorker] = {}
        for shard in range(servers):
            self.start_server(shard)
        for n in range(workers):
            self.start_worker(f"w{n}", slow=(1.0, 1.0, 4.0)[n % 3])

    def emit(self, name: str, /, **data: Any) -> None:
        self.events.append((name, data))

    def start_worker(self, name: str, slow: float = 1.0) -> None:
        worker = self.workers[name] = FakeWorker(name, self.seed, slow=slow, **self.job)
        self.net.add(name, worker)

    def start_server(self, shard: int, applied: int = -1) -> None:
        name, birth = f"s{shard}", self.chance.getrandbits(48)
        server = self.servers[shard] = FakeServer(shard, name, birth, applied)
        self.net.add(name, server)

    def restart_scheduler(self) -> None:
        self.scheduler = self.make(self.terms, self.book, self.emit)
        self.net.machines.pop(SCHEDULER)
        self.net.add(SCHEDULER, self.scheduler)

    def often(self, every_s: float, act: Callable[[], object], times: int = 100) -> None:
        """Do something every now and then, until the end."""
        left = itertools.count(times, -1)

        def happen() -> None:
            if self.scheduler.outcome is None and next(left) > 0:
                act()
                self.net.at(self.net.now_s + self.chance.uniform(0.5, 1.5) * every_s, happen)

        self.net.at(self.net.now_s + every_s, happen)

    def kill_worker(self) -> None:
        alive = [name for name in self.workers if name in self.net.machines]
        if len(alive) > 1:
            self.net.remove(self.chance.choice(alive), tells=self.chance.random() < 0.5)

    def add_worker(self) -> None:
        self.start_worker(f"n{len(self.workers)}")

    def kill_server(self) -> None:
        """It comes back with its last snapshot, or with nothing."""
        shard = self.chance.choice(list(self.servers))
        saved = self.servers[shard].saved
        kept = -1 if saved is None or self.chance.random() < 0.3 else saved
        self.net.remove(f"s{shard}", tells=self.chance.random() < 0.5)
        self.net.at(self.net.now_s + 1.0, lambda: self.start_server(shard, kept))

    def run(self) -> None:
        self.net.run(lambda: self.scheduler.is_over)
        outcome = self.scheduler.outcome
        assert outcome is not None
        assert not outcome.failed, outcome.reason

    def check(self, steps: int = 8) -> None:
        """What was said, what is in the book, and what was told add up."""
        self.auditor.check(steps, self.terms.parts)
        assert self.scheduler.done == steps
        last = self.book.newest()[0]
        assert {c.lease: c.sequence for c in self.book.commits(0, last)} == self.auditor.committed
        assert [order.plain for order in self.book.orders(0, last)] == [
            self.auditor.orders[sequence] for sequence in range(last + 1)
        ]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sync", SYNCS, ids=str)
def test_all_is_learned_once_though_messages_are_lost_doubled_and_late(
    sync: Sync, seed: int
) -> None:
    world = World(seed, sync)
    world.run()
    world.check()
    first, second = (server.orders for server in world.servers.values())
    assert first == second, "servers carried out different orders"
    assert len({lease.lease for w in world.workers.values() for lease, _ in w.began}) >= 24


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sync", SYNCS, ids=str)
def test_all_is_learned_once_though_workers_are_killed_and_join(sync: Sync, seed: int) -> None:
    world = World(seed, sync)
    world.often(3.0, world.kill_worker)
    world.often(3.0, world.add_worker)
    world.run()
    world.check()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sync", SYNCS, ids=str)
def test_all_is_learned_once_though_the_scheduler_is_started_again(sync: Sync, seed: int) -> None:
    world = World(seed, sync)
    world.often(0.7, world.restart_scheduler, times=15)  # the silent are not found out meanwhile
    world.often(6.0, world.kill_worker)
    world.often(6.0, world.add_worker)
    world.run()
    world.check()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sync", SYNCS, ids=str)
def test_all_is_learned_once_though_servers_are_killed(sync: Sync, seed: int) -> None:
    world = World(seed, sync)
    world.often(4.0, world.kill_server)
    world.often(8.0, world.kill_worker)
    world.often(8.0, world.add_worker)
    world.run()
    world.check()
    assert any(name == "server_restored" for name, _ in world.events)


@pytest.mark.parametrize("sync", [Bsp(), Ssp(2)], ids=str)
def test_blocks_of_several_steps_are_learned_once(sync: Sync) -> None:
    world = World(1, sync, every=3, epochs=None, steps=8)
    world.often(4.0, world.kill_worker)
    world.often(4.0, world.add_worker)
    world.run()
    world.check()


def test_a_scheduler_goes_on_from_a_file_whatever_it_had_not_said_yet(tmp_path: Path) -> None:
    """Started again after every tenth message, before what that led to was sent."""

    class Forgetful:
        """Answers as a scheduler whose process dies again and again."""

        def __init__(self, terms: Terms) -> None:
            self.terms, self.number = terms, 0
            self.scheduler = self.start()

        def start(self) -> Scheduler:
            return Scheduler(self.terms, Book(tmp_path / "book.sqlite"))

        def handle(self, sender: str, message: say.Message, now_s: float) -> Mail:
            self.number += 1
            mail = self.scheduler.handle(sender, message, now_s)
            if self.number % 10:
                return mail
            self.scheduler._book.close()
            self.scheduler = self.start()
            return []

        def lost(self, name: str, now_s: float) -> Mail:
            return self.scheduler.lost(name, now_s)

        def tick(self, now_s: float) -> Mail:
            return self.scheduler.tick(now_s)

    auditor = Auditor(2)
    net = Network(0, Faults(delay_s=0.1), watch=auditor.watch)
    scheduler = Forgetful(Terms(parts=3, sync=Ssp(2), servers=2))
    net.add(SCHEDULER, scheduler)
    for shard in range(2):
        net.add(f"s{shard}", FakeServer(shard, f"s{shard}", birth=shard))
    for n in range(3):
        net.add(f"w{n}", FakeWorker(f"w{n}", seed=0))
    net.run(lambda: scheduler.scheduler.is_over)
    # Orders that were never said are not known to the auditor: the book is.
    book = scheduler.scheduler._book
    leases = [commit.lease for commit in book.commits(0, book.newest()[0])]
    assert len(leases) == len(set(leases)) == 24
    assert sorted(set(book.consumed())) == sorted(book.consumed())
    assert scheduler.scheduler.done == 8


# Planted faults, which the checks above must find.


class Forgiving(Scheduler):
    """Takes what a worker brings for a lease that was revoked."""

    def _dismiss(self, leases: Leases, worker: Any, *args: Any) -> None:
        kept = {work.lease: work for work in leases.open.values() if work.worker == worker.name}
        super()._dismiss(leases, worker, *args)
        for work in kept.values():
            work.state = State.OUT
            leases.ledger._out.add(work.unit)
        leases.open.update(kept)


class Trusting(Scheduler):
    """Believes that servers hold what they held before they were started again."""

    def _finished(self, leases: Leases, worker: Any, message: say.Finished) -> None:
        super()._finished(leases, worker, replace(message, births=self._ordering.births))


class Doubling(Scheduler):
    """Orders what was brought twice."""

    def _finished(self, leases: Leases, worker: Any, message: say.Finished) -> None:
        work = leases.open.get(message.lease)
        super()._finished(leases, worker, message)
        if work is not None and work.state is State.STAGED:
            self._act_twice(leases, work)

    def _act_twice(self, leases: Leases, work: Work) -> None:
        self._course.go_on()
        leases.open[work.lease] = work
        leases.ledger._out.add(work.unit)
        work.state = State.STAGED


@pytest.mark.parametrize("make", [Forgiving, Trusting, Doubling])
def test_a_scheduler_with_a_planted_fault_is_found_out(make: type[Scheduler]) -> None:
    with pytest.raises((AssertionError, KeyError)):  # the latter by the ledger itself
        for seed in range(30):
            world = World(seed, Ssp(2), make=make)
            world.often(2.0, world.kill_worker)
            world.often(2.0, world.add_worker)
            world.often(4.0, world.kill_server)
            world.run()
            world.check()


def test_a_book_that_forgets_what_was_learned_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Book, "consumed", lambda self: [])
    with pytest.raises(AssertionError):
        for seed in range(10):
            world = World(seed, Asp())
            world.often(1.0, world.restart_scheduler)
            world.run()
            world.check()


# In step.


def test_in_step_orders_are_the_same_whatever_the_timing() -> None:
    seen = []
    for seed in range(8):
        world = World(seed, Bsp(), Faults(delay_s=0.9), fewest=3)
        world.run()
        entries = [world.auditor.orders[n][0] for n in sorted(world.auditor.orders)]
        seen.append([entry for entry in entries if entry])
    assert all(entries == seen[0] for entries in seen)
    assert len(seen[0]) == 8


def test_in_step_one_order_holds_all_parts_weighted_by_their_counts() -> None:
    desk = Desk(Terms(parts=3, sync=Bsp()), "w0", "w1", "w2")
    assert not orders(desk.finish("w2", count=1))
    assert not orders(desk.finish("w0", count=5))
    (entry,) = orders(desk.finish("w1", count=2))
    assert entry[:2] == [[[0, 5 / 8], [1, 2 / 8], [2, 1 / 8]], ["w0", "w1", "w2"]]


def test_in_step_a_lost_workers_part_goes_to_who_is_done() -> None:
    desk = Desk(Terms(parts=3, sync=Bsp(), min=2), "w0", "w1", "w2")
    desk.finish("w0")
    desk.lose("w1")
    lease = desk.leases["w0"]
    assert (lease.first_step, lease.part, lease.sequence) == (0, 1, 0)
    desk.finish("w0")
    (entry,) = orders(desk.finish("w2"))
    assert [lease for lease, _ in entry[0]] == [0, 3, 2]
    assert entry[2] == [1], "servers forget what was revoked"


def test_in_step_what_a_lost_worker_had_brought_counts() -> None:
    desk = Desk(Terms(parts=2, sync=Bsp(), min=1), "w0", "w1")
    desk.finish("w0")
    desk.lose("w0")
    (entry,) = orders(desk.finish("w1"))
    assert [lease for lease, _ in entry[0]] == [0, 1]


def test_ssp_of_0_is_in_step() -> None:
    desk = Desk(Terms(parts=2, sync=Ssp(0)), "w0", "w1")
    assert not orders(desk.finish("w0"))
    assert len(orders(desk.finish("w1"))[0][0]) == 2


# Out of step.


def test_a_parked_worker_reads_weights_that_hold_what_it_waited_for() -> None:
    desk = Desk(Terms(parts=2, sync=Ssp(1)), "w0", "w1", bound=1)
    desk.finish("w0")
    (entry,) = orders(desk.finish("w0"))
    assert entry[1] == [], "it may not go on"
    assert not only(desk.finish("w0"), say.Lease)
    mail = desk.finish("w1")
    ((_, sent),) = only(mail, say.Orders)
    assert sent.entries[0][1] == ["w1", "w0"]
    assert desk.leases["w0"].sequence == sent.first
    assert desk.leases["w0"].clock == 2


def test_a_parked_worker_goes_on_when_who_it_waits_for_is_lost() -> None:
    desk = Desk(Terms(parts=2, sync=Ssp(1), min=1), "w0", "w1")
    desk.finish("w0")
    desk.finish("w0")
    mail = desk.lose("w1")
    assert [to for to, _ in only(mail, say.Lease)] == ["w0"]
    assert desk.leases["w0"].sequence == only(mail, say.Orders)[0][1].first


def test_asp_never_parks_anyone() -> None:
    desk = Desk(Terms(parts=2, sync=Asp()), "w0", "w1")
    for clock in range(1, 7):
        desk.finish("w0")
        assert desk.leases["w0"].clock == clock


def test_missed_and_lag_are_counted_for_each_update() -> None:
    desk = Desk(Terms(parts=2, sync=Asp()), "w0", "w1", epochs=1)
    for name in ("w0", "w0", "w0", "w1", "w0", "w1", "w1", "w0"):
        desk.finish(name)
    assert [data["missed"] for data in desk.told("commit")] == [0, 0, 0, 3, 1, 1, 0, 2]
    assert [data["lag"] for data in desk.told("commit")] == [0, 1, 2, 0, 3, 0, 0, 3]
    (told,) = desk.told("staleness")
    assert told["missed"] == [[0, 4], [1, 2], [2, 1], [3, 1]]


def test_scaled_asp_divides_an_update_by_what_it_missed() -> None:
    desk = Desk(Terms(parts=2, sync=Asp(scaled=True)), "w0", "w1")
    for _ in range(2):
        desk.finish("w0")
    (entry,) = orders(desk.finish("w1"))
    assert entry[0] == [[1, 1 / 3]]


def test_a_revoked_lease_is_never_ordered_and_its_worker_gets_another() -> None:
    desk = Desk(Terms(parts=2, sync=Asp(), min=1), "w0", "w1")
    revoked = desk.leases["w0"]
    desk.lose("w0")
    mail = desk.finish("w0", revoked)
    lease = desk.leases["w0"]
    assert lease.lease != revoked.lease
    assert (lease.first_step, lease.part) == (revoked.first_step, revoked.part)
    assert revoked.lease not in desk.auditor.committed
    assert orders(mail)[0][2] == [revoked.lease]


def test_a_worker_that_joins_begins_at_the_slowest_clock_with_the_newest_weights() -> None:
    desk = Desk(Terms(parts=2, sync=Ssp(2), max=3), "w0", "w1")
    for name in ("w0", "w1", "w0"):
        desk.finish(name)
    desk.join("w2")
    assert desk.leases["w2"].clock == 1
    assert desk.leases["w2"].sequence == 4


def test_weights_that_did_not_come_are_read_again_once() -> None:
    desk = Desk(Terms(parts=1, sync=Asp()), "w0")
    lease = desk.leases["w0"]
    again = say.Again(lease=lease.lease, sequence=lease.sequence)
    mail = desk.say("w0", again)
    assert orders(mail) == [[[], ["w0"], [], False]]
    assert desk.leases["w0"].sequence == 1
    assert not orders(desk.say("w0", again)), "it came twice"
    desk.finish("w0", lease)
    assert desk.told("commit")[0]["read"] == 0, "it had begun with what came late"


# Members.


def test_the_first_worker_gives_the_weights_and_if_it_dies_the_next() -> None:
    scheduler = Scheduler(Terms(parts=2), Book(":memory:"))
    scheduler.handle("s0", say.Serve(index=0, birth=1, applied=-1, place="p"), 0)
    first = scheduler.handle("w0", join("w0"), 0)
    assert [m.gives_weights for _, m in only(first, say.Welcome)] == [True]
    second = scheduler.handle("w1", join("w1"), 0)
    assert [m.gives_weights for _, m in only(second, say.Welcome)] == [False]
    then = scheduler.lost("w0", 0)
    assert [(to, m.gives_weights) for to, m in only(then, say.Welcome)] == [("w1", True)]


def test_nobody_is_welcome_before_all_servers_are_there() -> None:
    scheduler = Scheduler(Terms(parts=1, servers=2), Book(":memory:"))
    scheduler.handle("s1", say.Serve(index=1, birth=1, applied=-1, place="p1"), 0)
    assert not only(scheduler.handle("w0", join("w0"), 0), say.Welcome)
    mail = scheduler.handle("s0", say.Serve(index=0, birth=1, applied=-1, place="p0"), 0)
    ((_, welcome),) = only(mail, say.Welcome)
    assert welcome.places == ["p0", "p1"]


def test_work_begins_with_min_workers_and_stops_below() -> None:
    desk = Desk(Terms(parts=3, sync=Asp(), min=2), "w0")
    assert not desk.leases
    desk.join("w1")
    assert set(desk.leases) == {"w0", "w1"}
    desk.lose("w1")
    assert not only(desk.finish("w0"), say.Lease)
    desk.join("w2")
    assert {"w0", "w2"} == {name for name, lease in desk.leases.items() if lease.sequence > 0}


def test_with_too_few_workers_the_job_ends_and_says_who_was_lost_when() -> None:
    desk = Desk(Terms(parts=2, sync=Asp(), lease_s=100, timeout_s=20), "w0", "w1")
    desk.lose("w1")
    desk.wait(1)
    assert not only(desk.wait(19), say.Lease)
    ((_, last),) = only(desk.wait(2), say.Lease)
    assert last.failed
    assert (last.lease, last.sequence) == (-1, -1)
    assert "1 of at least 2 workers" in last.reason
    assert "w1 was lost 22 s ago: its connection ended" in last.reason
    assert desk.scheduler.outcome is not None
    assert desk.scheduler.outcome.failed


def test_a_silent_worker_is_lost_and_one_that_beats_is_not() -> None:
    desk = Desk(Terms(parts=2, sync=Asp(), min=1, lease_s=10), "w0", "w1")
    for _ in range(6):
        desk.say("w0", say.Beat())
        desk.wait(2)
    (loss,) = desk.told("loss")
    assert loss["worker"] == "w1"
    assert "said nothing for 12.0 s" in loss["reason"]


def test_a_worker_beyond_max_is_refused() -> None:
    desk = Desk(Terms(parts=2, sync=Asp()), "w0", "w1")
    ((to, refused),) = desk.join("w2")
    assert to == "w2"
    assert "2 workers are here, and the job takes 2" in refused.reason


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"fingerprint": "g"}, "fingerprint"),
        ({"steps_per_epoch": 5}, "steps_per_epoch is 5, and that of this run is 4"),
        ({"epochs": 3}, "epochs is 3"),
        ({"name": "w8"}, "calls itself"),
    ],
)
def test_a_worker_of_another_job_is_refused_and_changes_nothing(
    changed: dict[str, Any], words: str
) -> None:
    desk = Desk(Terms(parts=1, sync=Asp(), max=2), "w0")
    before = list(desk.book._db.iterdump())
    ((_, refused),) = desk.say("w9", join(**{"name": "w9", **changed}))
    assert words in refused.reason
    assert list(desk.book._db.iterdump()) == before
    assert sum(desk.scheduler.refused.values()) == 1


@pytest.mark.parametrize(
    "changed", [{"count": float("nan")}, {"count": -1}, {"rows": 1 << 70}, {"count": float("inf")}]
)
def test_figures_that_would_spoil_the_sum_are_refused(changed: dict[str, Any]) -> None:
    desk = Desk(Terms(parts=1, sync=Bsp()), "w0")
    mail = desk.finish("w0", **changed)
    assert [type(message) for _, message in mail] == [say.Refused]
    assert not desk.told("commit")


def test_a_worker_that_leaves_gives_back_what_it_had() -> None:
    desk = Desk(Terms(parts=2, sync=Asp(), min=1), "w0", "w1")
    given = desk.leases["w0"]
    desk.say("w0", say.Leave())
    desk.finish("w1")
    lease = desk.leases["w1"]
    assert (lease.first_step, lease.part) == (given.first_step, given.part)
    assert [data["worker"] for data in desk.told("leave")] == ["w0"]


# What falls due, notes, the end.


def test_what_is_due_is_said_to_one_worker_at_each_multiple() -> None:
    facts = {"evaluate_every": 3, "save_every": "epoch"}
    world = World(3, Asp(), Faults(delay_s=0.2), facts=facts)
    world.run()
    finals = [message for w in world.workers.values() for message in w.heard if message == w.final]
    due = world.auditor.due + [(kind, 8) for final in finals for kind in final.due]
    assert Counter(kind for kind, _ in due) == {"evaluate": 2, "save": 2, "finish": 1}
    assert sorted(done for kind, done in due if kind == "save") == [4, 8]


def test_what_was_due_of_a_lost_worker_falls_to_another() -> None:
    desk = Desk(Terms(parts=2, sync=Bsp(), min=1), "w0", "w1", facts={"evaluate_every": 1})
    desk.finish("w0")
    desk.finish("w1")
    assert desk.leases["w0"].due == ["evaluate"]
    assert desk.leases["w1"].due == []
    desk.finish("w1")
    desk.lose("w0")
    assert desk.leases["w1"].due == ["evaluate"]


def test_a_note_is_handed_on_and_a_late_one_does_not_replace_it() -> None:
    desk = Desk(Terms(parts=1, sync=Asp()), "w0", facts={"evaluate_every": 2})
    desk.say("w0", say.Note(name="best", done=2, state={"loss": 0.5}))
    desk.say("w0", say.Note(name="best", done=1, state={"loss": 0.9}))
    desk.finish("w0")
    assert not desk.leases["w0"].notes
    desk.finish("w0")
    assert desk.leases["w0"].notes == {"best": {"loss": 0.5}}


def handed_in(lease: say.Lease, **changed: Any) -> say.Save:
    save = say.Save(
        sequence=lease.sequence, done=lease.done, score=None, piece=0, pieces=1, content=""
    )
    return replace(save, **changed)


def test_where_a_save_is_due_the_checkpoint_is_of_the_weights_that_were_sent() -> None:
    facts = {"save_every": 1}
    desk = Desk(Terms(parts=2, sync=Asp(), snapshot_s=None), "w0", "w1", facts=facts)
    desk.finish("w0")
    desk.finish("w0")
    due = desk.leases["w0"]
    assert due.due == ["save"], "two halves of batches are one batch"
    assert desk.auditor.orders[due.sequence][3], "servers write that version"
    assert [data["sequence"] for data in desk.told("hold")] == [due.sequence]
    desk.finish("w1")
    desk.say("w0", handed_in(due, score=0.5))
    assert not desk.told("checkpoint"), "servers have not written it yet"
    assert desk.scheduler.unsaved == [1]
    desk.say("s0", say.Applied(sequence=due.sequence, saved=due.sequence))
    (told,) = desk.told("checkpoint")
    assert desk.scheduler.unsaved == []
    (version,) = told["versions"]
    assert (told["score"], version["sequence"], version["updates"]) == (0.5, due.sequence, 2)
    assert version["whole"] == 0, "part 1 of step 0 is with w1"
    assert version["learned"] == [[0, 1, 0, 2], [1, 1, 0, 2]]


def test_a_save_that_was_not_due_is_of_the_next_version_and_one_of_each_number_of_batches() -> None:
    desk = Desk(Terms(parts=2, sync=Asp(), snapshot_s=None), "w0", "w1")
    desk.finish("w0")
    mail = desk.say("w0", handed_in(desk.leases["w0"], score=0.5, pieces=2))
    assert not orders(mail), "half of it is here"
    mail = desk.say("w0", handed_in(desk.leases["w0"], score=0.5, piece=1, pieces=2))
    ((_, _, _, saves),) = orders(mail)
    assert saves
    assert not orders(desk.say("w1", handed_in(desk.leases["w1"]))), "another group, the same step"
    last = max(desk.auditor.orders)
    desk.begin()  # a scheduler that is started again knows the version, and not what was handed in
    desk.say("w1", handed_in(desk.leases["w1"], sequence=last, done=1))
    desk.say("s0", say.Applied(sequence=last, saved=last))
    (told,) = desk.told("checkpoint")
    assert told["versions"][0]["learned"] == [[0, 1, 0, 2]]
    assert len(told["messages"]) == 1


def test_what_is_there_already_is_not_kept_again_at_the_end_without_its_score() -> None:
    desk = Desk(Terms(parts=1, sync=Asp()), "w0", epochs=None, steps=1)
    desk.finish("w0")
    last = desk.leases["w0"]
    desk.say("w0", handed_in(last, score=0.5))
    desk.say("s0", say.Applied(sequence=last.sequence, saved=last.sequence))
    desk.say("w0", handed_in(last))
    (told,) = desk.told("checkpoint")
    assert (told["score"], told["versions"][0]["whole"]) == (0.5, 1)


def test_a_snapshot_that_a_server_cannot_write_is_told_once_and_tried_again() -> None:
    desk = Desk(Terms(parts=1, sync=Asp(), snapshot_s=0.0), "w0", epochs=None, steps=4)
    for number in range(3):
        last = max(desk.auditor.orders)
        assert desk.auditor.orders[last][3], "it is to be written, as the one before was not"
        failed = say.Applied(sequence=last, saved=None, failed=last, reason="the disk is full")
        for _ in range(2):  # said again, as it may get lost
            desk.say("s0", failed)
        assert len(desk.told("warning")) == 1
        assert f"{number} updates" in desk.scheduler.unwritten
        desk.finish("w0")
    last = max(desk.auditor.orders)
    desk.say("s0", say.Applied(sequence=last, saved=last))
    assert desk.scheduler.unwritten == ""


def test_at_the_end_all_get_the_final_weights() -> None:
    world = World(5, Ssp(1))
    world.run()
    last = max(n for n, entry in world.auditor.orders.items() if entry[0])
    for worker in world.workers.values():
        assert worker.final is not None
        assert worker.final.sequence >= last
        assert worker.final.reason == "all work is done"
    assert world.auditor.orders[last][3], "and they are on disk"


def test_after_a_stop_what_is_out_is_awaited_and_nothing_else_begun() -> None:
    desk = Desk(Terms(parts=2, sync=Asp()), "w0", "w1")
    assert not desk.say("w1", say.Stop(reason="Ctrl-C"))
    assert not only(desk.finish("w0"), say.Lease)
    mail = desk.finish("w1") + desk.say("w0", say.Leave())
    assert {(to, m.lease, m.reason) for to, m in only(mail, say.Lease)} == {
        ("w0", -1, "Ctrl-C"),
        ("w1", -1, "Ctrl-C"),
    }
    assert desk.scheduler.outcome is not None
    assert not desk.scheduler.outcome.failed
    assert len(desk.auditor.committed) == 2


def test_after_a_stop_a_block_in_step_is_finished() -> None:
    desk = Desk(Terms(parts=2, sync=Bsp(), min=1), "w0")
    desk.say("w0", say.Stop(reason="enough"))
    desk.finish("w0")
    assert desk.leases["w0"].part == 1
    mail = desk.finish("w0")
    assert len(orders(mail)[0][0]) == 2
    assert desk.leases["w0"].lease == -1


def test_one_finishes_the_job_and_where_it_is_lost_another_one_does() -> None:
    facts = {"evaluate_every": 1, "save_every": 1}
    desk = Desk(Terms(parts=2, sync=Bsp(), min=1), "w0", "w1", epochs=None, steps=1, facts=facts)
    desk.finish("w0")
    desk.finish("w1")
    assert sorted(desk.leases["w0"].due) == ["evaluate", "finish", "save"]
    assert desk.leases["w1"].lease != -1, "it waits until the other one has done it"
    desk.lose("w0")
    assert [data["worker"] for data in desk.told("loss")] == ["w0"]
    assert sorted(desk.leases["w1"].due) == ["evaluate", "finish", "save"]
    desk.say("w1", say.Leave())
    desk.say("s0", say.Applied(sequence=3, saved=3))
    assert desk.scheduler.is_over


def test_who_finishes_the_job_is_where_it_was_started() -> None:
    desk = Desk(Terms(parts=2, sync=Bsp(), max=3), "w1", epochs=None, steps=1)
    desk.join("w0", host="elsewhere")
    desk.finish("w1")
    desk.finish("w0")
    assert desk.leases["w1"].due == ["finish"]
    assert desk.leases["w0"].lease != -1


def test_who_finished_the_job_has_left_before_the_others_hear_of_the_end() -> None:
    desk = Desk(Terms(parts=2, sync=Bsp()), "w0", "w1", epochs=None, steps=1)
    desk.finish("w0")
    desk.finish("w1")
    desk.begin()  # a scheduler that is started again knows who it is
    desk.wait(1)
    desk.say("w1", say.Beat())
    assert desk.leases["w1"].lease != -1
    desk.say("w0", say.Leave())
    assert (desk.leases["w1"].lease, desk.leases["w1"].due) == (-1, [])


def test_a_worker_that_beats_and_never_gets_done_loses_its_lease_and_its_place() -> None:
    desk = Desk(Terms(parts=2, sync=Asp(), min=1, lease_s=1.0), "w0", "w1")
    stuck = desk.leases["w1"]
    for _ in range(9):
        desk.wait(0.9)
        desk.say("w1", say.Beat())
        desk.finish("w0")
    assert [data["worker"] for data in desk.told("loss")] == ["w1"]
    assert "it has worked on one lease for 6 s" in desk.told("loss")[0]["reason"]
    taken = [(lease.first_step, lease.part) for _, lease in desk.auditor.leases.values()]
    assert taken.count((stuck.first_step, stuck.part)) == 2
    ((_, refused),) = only(desk.say("w1", say.Beat()), say.Refused)
    assert "it has worked on one lease" in refused.reason
    assert only(desk.join("w1"), say.Refused)


def test_a_lease_may_take_many_times_the_longest_before_it() -> None:
    desk = Desk(Terms(parts=2, sync=Asp(), min=1, lease_s=1.0), "w0", "w1")
    desk.finish("w0", seconds=2.0)
    for _ in range(30):
        desk.wait(0.9)
        desk.say("w0", say.Beat())
        desk.say("w1", say.Beat())
    assert not desk.told("loss")


def test_the_job_is_over_when_workers_left_and_servers_are_through() -> None:
    desk = Desk(Terms(parts=1, sync=Asp()), "w0", epochs=None, steps=1)
    desk.finish("w0")
    desk.say("w0", say.Leave())
    assert not desk.scheduler.is_over
    desk.say("s0", say.Applied(sequence=1, saved=1))
    assert desk.scheduler.is_over
    ((_, refused),) = desk.join("w1", epochs=None, steps=1)
    assert "the job has ended: all work is done" in refused.reason


# Servers.


def test_a_server_that_lost_updates_goes_on_from_the_present_and_they_are_counted() -> None:
    desk = Desk(Terms(parts=1, sync=Asp(), servers=2), "w0")
    for _ in range(3):
        desk.finish("w0")
    mail = desk.serve(1, birth=77, applied=1)
    assert [m.sequence for _, m in only(mail, say.Found)] == [3]
    (restored,) = desk.told("server_restored")
    assert (restored["shard"], restored["lost"]) == (1, 2)
    ((_, repush),) = only(mail, say.Repush)
    assert repush.lease == desk.leases["w0"].lease
    assert only(desk.finish("w0"), say.Repush), "brought to the one that is gone"
    desk.finish("w0", births=[0, 77])
    assert len(desk.told("commit")) == 4


def test_a_server_without_anything_is_given_weights_by_who_has_the_newest() -> None:
    desk = Desk(Terms(parts=2, sync=Asp()), "w0", "w1")
    desk.finish("w1")
    serve = say.Serve(index=0, birth=5, applied=-1, place="p0")
    mail = desk.scheduler.handle("s0", serve, 0)
    assert {to: m.gives_weights for to, m in only(mail, say.Welcome)} == {"w0": False, "w1": True}


def test_a_late_word_of_a_server_that_has_a_successor_is_nothing() -> None:
    desk = Desk(Terms(parts=1, sync=Asp()), "w0")
    desk.serve(0, birth=9, applied=0)
    assert not desk.serve(0, birth=0)
    desk.finish("w0", births=[9])
    assert len(desk.told("commit")) == 1


def test_the_blueprint_is_said_to_a_server_that_has_not_heard_it_alone() -> None:
    desk = Desk(Terms(parts=1, sync=Asp()), "w0")
    serve = say.Serve(index=0, birth=0, applied=0, place="p0")
    assert only(desk.scheduler.handle("s0", serve, 0), say.Found)
    assert not desk.scheduler.handle("s0", replace(serve, found=True), 0)


def test_a_server_that_is_ahead_of_the_book_is_refused() -> None:
    scheduler = Scheduler(Terms(parts=1), Book(":memory:"))
    ((_, refused),) = scheduler.handle("s0", say.Serve(index=0, birth=1, applied=7, place="p"), 0)
    assert "after the last order -1" in refused.reason


def test_nothing_is_ordered_while_a_server_is_away() -> None:
    desk = Desk(Terms(parts=1, sync=Asp()), "w0")
    desk.lose("s0")
    assert not desk.finish("w0")
    assert desk.serve(0, applied=0)
    assert orders(desk.finish("w0"))


def test_a_server_that_stays_away_ends_the_job() -> None:
    desk = Desk(Terms(parts=1, sync=Asp(), lease_s=100, timeout_s=20), "w0")
    desk.say("s0", say.Applied(sequence=0))
    desk.wait(30)
    assert desk.scheduler.outcome is None, "all is well"
    desk.lose("s0")
    desk.wait(21)
    assert desk.scheduler.outcome is not None
    assert "server 0 of 1 is not there" in desk.scheduler.outcome.reason


def test_orders_that_are_not_answered_are_said_again() -> None:
    desk = Desk(Terms(parts=1, sync=Asp(), resend_s=1), "w0")
    desk.finish("w0")
    ((_, again),) = only(desk.wait(1.5), say.Orders)
    assert (again.first, len(again.entries)) == (0, 2)
    desk.say("s0", say.Applied(sequence=1))
    assert not desk.wait(1.5)


# Starting again.


def test_a_job_starts_again_from_what_all_servers_have_on_disk() -> None:
    desk = Desk(Terms(parts=2, sync=Asp(), servers=2, snapshot_s=0), "w0", "w1")
    for name in ("w0", "w1", "w0", "w1"):
        desk.finish(name)
        sequence = len(desk.auditor.orders) - 1
        desk.say("s0", say.Applied(sequence=sequence, saved=sequence))
        if sequence <= 2:
            desk.say("s1", say.Applied(sequence=sequence, saved=sequence))
    assert desk.book.get("saved") == 2
    with desk.book.transaction():
        assert desk.book.strike(2) == 2
    desk.auditor, desk.leases = Auditor(), {}
    desk.begin()
    desk.auditor.orders = {order.sequence: order.plain for order in desk.book.orders(0, 2)}
    for shard in range(2):
        assert not desk.told("server_restored")
        desk.serve(shard, birth=shard, applied=2)
    desk.join("x0")
    desk.join("x1")
    assert [desk.leases[name].sequence for name in ("x0", "x1")] == [3, 3]
    while desk.scheduler.outcome is None:
        desk.finish("x0")
        desk.finish("x1")
    commits = desk.book.commits(0, desk.book.newest()[0])
    assert len(commits) == len({commit.lease for commit in commits}) == 16
    assert len(set(desk.book.consumed())) == 16
    assert desk.scheduler.done == 8


def test_a_book_of_another_plan_is_refused() -> None:
    book = Book(":memory:")
    Scheduler(Terms(parts=2), book)
    with pytest.raises(RunError, match="'parts': 2"):
        Scheduler(Terms(parts=3), book)


def test_a_file_that_is_no_book_is_refused(tmp_path: Path) -> None:
    (tmp_path / "book").write_text("not a database" * 100)
    with pytest.raises(RunError, match="cannot be used as the scheduler's book"):
        Book(tmp_path / "book")


def test_the_record_says_what_a_replay_needs(tmp_path: Path) -> None:
    desk = Desk(Terms(parts=2, sync=Asp()), "w0", "w1")
    desk.finish("w0", options=[{"lr": 0.1}], loss=3.0, count=2.0, rows=4)
    (commit,) = desk.book.commits(0, 9)
    assert commit == (1, 0, 0, 1.0, 0, 0, 0)
    row = desk.book._db.execute("SELECT worker, clock, block, part, loss FROM leases").fetchone()
    assert row == ("w0", 0, 0, 0, 3.0)


def test_what_was_decided_is_on_disk_before_it_is_said(tmp_path: Path) -> None:
    desk = Desk(Terms(parts=1, sync=Asp()), "w0", book=Book(tmp_path / "book"))
    desk.finish("w0")
    other = Book(tmp_path / "book")
    assert other.newest() == (1, 1)
    assert [commit.lease for commit in other.commits(0, 9)] == [0]
    assert [work.lease for work in other.open_work()] == [desk.leases["w0"].lease]


def test_of_what_raised_nothing_is_in_the_book(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(Terms(parts=1, sync=Asp()), "w0")
    before = list(desk.book._db.iterdump())
    with monkeypatch.context() as patch:
        patch.setattr(Book, "put_order", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            desk.finish("w0")
    assert list(desk.book._db.iterdump()) == before
    desk.begin()
    desk.finish("w0")
    assert desk.scheduler.done == 1


def test_a_lost_worker_whose_place_was_taken_is_refused() -> None:
    desk = Desk(Terms(parts=2, sync=Asp(), min=1), "w0", "w1")
    lease = desk.leases["w0"]
    desk.lose("w0")
    desk.join("w2")
    ((_, refused),) = desk.finish("w0", lease)
    assert "others have taken its place" in refused.reason
