"""Workers that mix their weights in pairs: the state machines, under thousands of schedules."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from simulated import Faults, Network, join

from allfuse.roles import messages as say
from allfuse.roles import parcels
from allfuse.roles.blueprint import Blueprint
from allfuse.roles.book import Book
from allfuse.roles.cutting import cut_pieces, cut_shards
from allfuse.roles.diary import ANSWERED, APPLIED, COPIED, GATHERED, GAVE, LENT, OFFERED, Entry
from allfuse.roles.gossiper import Gossiper, half_way, mean_of
from allfuse.roles.messages import SCHEDULER
from allfuse.roles.scheduler import Scheduler
from allfuse.roles.terms import Terms
from allfuse.sync import Asp, Sync
from allfuse.topology.gossip import GRAPHS, Gossip
from allfuse.verify.meetings import Learned, Met, in_order

Mail = list[tuple[str, say.Message]]
SIZES = (5, 3)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models travel in several pieces, which can be lost one by one."""

    def cut(blocks: Any, servers: int) -> Any:
        return [cut_pieces(blocks, spans, 24) for spans in cut_shards(blocks, servers)]

    monkeypatch.setattr(parcels, "cut", cut)


def first_weights() -> list[torch.Tensor]:
    return [torch.arange(sum(SIZES), dtype=torch.float64)]


def blueprint() -> Blueprint:
    tensors = [(f"p{n}", torch.zeros(size, dtype=torch.float64)) for n, size in enumerate(SIZES)]
    return Blueprint.of_changes(tensors, options={"lr": 1.0})


def change_of(worker: str, lease: int, step: int) -> torch.Tensor:
    """What a step adds to the weights."""
    generator = torch.Generator().manual_seed(hash_of(worker, lease, step))
    return torch.randn(sum(SIZES), generator=generator, dtype=torch.float64)


def hash_of(*parts: object) -> int:
    return random.Random(repr(parts)).getrandbits(62)


class Walker:
    """A worker whose steps take random times and add known changes to its weights."""

    def __init__(self, name: str, graph: str, seed: int, slow: float = 1.0, **job: Any) -> None:
        self.name, self._random = name, random.Random(f"{seed} {name}")
        self._slow = slow
        topology = Gossip(graph)
        self.gossiper = Gossiper(
            join(name, place=name, **job),
            blueprint(),
            first_weights() if not job.get("other") else [torch.zeros(8, dtype=torch.float64)],
            lambda place, n, round: topology.partner(place, n, round, seed),
        )
        self.wake_s: float | None = None
        self._ready_s = 0.0
        self._left = 0
        self._lease: say.Lease | None = None
        self.gone = False

    def lost(self, name: str, now_s: float) -> Mail:
        return self.gossiper.lost(name, now_s)

    def handle(self, sender: str, message: say.Message, now_s: float) -> Mail:
        if self.gone:
            return []
        return self.gossiper.handle(sender, message, now_s) + self._work(now_s)

    def tick(self, now_s: float) -> Mail:
        if self.gone:
            return []
        return self.gossiper.tick(now_s) + self._work(now_s)

    def _work(self, now_s: float) -> Mail:
        mail: Mail = []
        if self._lease is not None and now_s >= self._ready_s:
            step = self._lease.steps - self._left
            self.gossiper.flats[0].add_(change_of(self.name, self._lease.lease, step))
            mail += self.gossiper.meet(now_s)
            self._left -= 1
            if not self._left:
                mail += self.gossiper.finish(now_s, loss=1.0, count=1.0, rows=1, seconds=0.1)
                self._lease = None
            else:
                self._wait(now_s)
        if self._lease is None and self.gossiper.is_over and not self.gone:
            self.gone = True
            mail += self.gossiper.leave()
        if self._lease is None and self.gossiper.is_ready and not self.gossiper.is_over:
            self._lease = self.gossiper.begin(now_s)
            self._left = self._lease.steps
            self._wait(now_s)
        return mail

    def _wait(self, now_s: float) -> None:
        self._ready_s = self.wake_s = now_s + self._slow * (0.5 + self._random.random())


class World:
    """A scheduler and workers on one unreliable network."""

    def __init__(
        self,
        seed: int,
        *,
        workers: int = 4,
        graph: str = "exponential",
        faults: Faults | None = None,
        sync: Sync | None = None,
        every: int = 1,
        steps: int = 12,
        book: Book | None = None,
        **terms: Any,
    ) -> None:
        self.seed, self.graph, self.steps = seed, graph, steps
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.counts: dict[str, int] = {}
        self.terms = Terms(parts=workers, every=every, sync=sync or Asp(), servers=0, **terms)
        self.book = book or Book(":memory:")
        self.network = Network(seed, faults, watch=self._watch)
        self.scheduler = Scheduler(self.terms, self.book, emit=self._emit)
        self.network.add(SCHEDULER, self.scheduler)
        self.walkers: dict[str, Walker] = {}
        for index in range(workers):
            self.come(f"w{index}", slow=1.0 + index)

    def _emit(self, name: str, /, **data: Any) -> None:
        self.events.append((name, data))

    def _watch(self, sender: str, to: str, message: say.Message) -> None:
        self.counts[message.kind] = self.counts.get(message.kind, 0) + 1

    def come(self, name: str, slow: float = 1.0) -> None:
        walker = Walker(name, self.graph, self.seed, slow, steps=self.steps, epochs=None)
        self.walkers[name] = walker
        self.network.add(name, walker)

    def restart_scheduler(self) -> None:
        self.network.remove(SCHEDULER, tells=False)
        self.scheduler = Scheduler(self.terms, self.book, emit=self._emit)
        self.network.add(SCHEDULER, self.scheduler)

    def kill(self, name: str, *, tells: bool = True) -> Walker:
        self.network.remove(name, tells=tells)
        return self.walkers.pop(name)

    def run(self, limit_s: float = 2000.0) -> None:
        self.network.run(lambda: self.scheduler.is_over, limit_s)

    @property
    def weights(self) -> list[torch.Tensor]:
        return [walker.gossiper.flats[0] for walker in self.walkers.values()]

    def units(self) -> list[tuple[int, int]]:
        return [(work.unit.block, work.unit.part) for work, _ in self.book.history()]

    def replay(self) -> torch.Tensor:
        """The weights at the end, by one loop over the logs in the book."""
        return replay(self.book, self.terms.every, self.steps)


def replay(book: Book, every: int, limit: int) -> torch.Tensor:
    works = {work.lease: work for work, _ in book.history()}
    offers: dict[tuple[str, int], torch.Tensor] = {}
    answers: dict[tuple[str, int], torch.Tensor] = {}
    lent: dict[tuple[str, int], torch.Tensor] = {}
    now: dict[str, torch.Tensor] = {}
    mean: list[torch.Tensor] = []

    logs = {worker: [Entry(*each) for each in log] for worker, log in book.logs().items()}
    for deed in in_order(logs, lambda lease: every, works.__contains__):
        x = now.setdefault(deed.worker, first_weights()[0])
        if isinstance(deed, Learned):
            for step in range(deed.first, deed.last):
                x.add_(change_of(deed.worker, deed.lease, step))
            continue
        assert isinstance(deed, Met)
        entry = deed.entry
        if entry.deed == OFFERED:
            offers[deed.worker, entry.number] = x.clone()
        elif entry.deed == ANSWERED:
            d = half_way(offers[entry.peer, entry.number], x)
            x.add_(d)
            answers[entry.peer, entry.number] = d
        elif entry.deed == APPLIED:
            x.sub_(answers.pop((deed.worker, entry.number)))
        elif entry.deed == LENT:
            lent[entry.peer, entry.number] = x.clone()
        elif entry.deed == COPIED and entry.peer:
            x.copy_(lent[deed.worker, entry.number])
        elif entry.deed == GAVE:
            lent[deed.worker, entry.number] = x.clone()
        elif entry.deed == GATHERED:
            own = entry.peer == deed.worker
            mean.append(x.clone() if own else lent[entry.peer, entry.number])
    return mean_of(mean)


GRAPH_NAMES = tuple(GRAPHS)
BAD = Faults(drop=0.1, double=0.1, delay_s=0.5)


def expected_mean(world: World) -> torch.Tensor:
    """The first weights, and the mean over workers of all that their steps have added."""
    total = first_weights()[0] * len(world.walkers)
    for work, _ in world.book.history():
        for step in range(world.terms.every):
            total += change_of(work.worker, work.lease, step)
    return total / len(world.walkers)


def assert_all_equal(world: World) -> None:
    first, *others = world.weights
    assert all(torch.equal(first, other) for other in others)


def assert_each_unit_once(world: World) -> None:
    parts, blocks = world.terms.parts, world.steps // world.terms.every
    wanted = [(block, part) for block in range(blocks) for part in range(parts)]
    assert sorted(world.units()) == wanted


@pytest.mark.parametrize("graph", GRAPH_NAMES)
@pytest.mark.parametrize("faults", [Faults(), BAD], ids=["calm", "bad"])
def test_the_mean_is_kept_and_the_logs_give_the_same_bits(graph: str, faults: Faults) -> None:
    for seed in range(10):
        world = World(seed, graph=graph, faults=faults, every=1 + seed % 3, steps=12)
        world.run()
        assert_each_unit_once(world)
        assert_all_equal(world)
        torch.testing.assert_close(world.weights[0], expected_mean(world), rtol=1e-12, atol=1e-12)
        assert torch.equal(world.weights[0], world.replay())
        assert sum(walker.gossiper.exchanges for walker in world.walkers.values()) > 0


@pytest.mark.parametrize("faults", [Faults(), BAD], ids=["calm", "bad"])
def test_every_unit_counts_once_though_workers_are_killed_and_come(faults: Faults) -> None:
    for seed in range(40):
        chance = random.Random(seed)
        world = World(
            seed, graph=chance.choice(GRAPH_NAMES), faults=faults, every=1 + seed % 2, steps=24,
            min=1, max=8,
        )  # fmt: skip
        for number in range(4):
            world.network.at(chance.uniform(2, 25), lambda w=world, n=number: kill_one(w, n))
            world.network.at(
                chance.uniform(2, 25), lambda w=world, n=number: w.come(f"late{n}", 1.5)
            )
        world.run()
        assert_each_unit_once(world)
        left = [walker for walker in world.walkers.values() if not walker.gossiper.refusal]
        weights = [walker.gossiper.flats[0] for walker in left if walker.gone]
        replayed = world.replay()
        assert any(torch.equal(each, replayed) for each in weights)


def kill_one(world: World, number: int) -> None:
    here = [name for name, walker in world.walkers.items() if not walker.gone]
    if len(here) > 2 and world.scheduler.outcome is None:
        world.kill(here[number % len(here)], tells=number % 2 == 0)
