"""Workers that mix their weights in pairs: the state machines, under thousands of schedules."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from simulated import Faults, Network, join

from allfuse.base.errors import AllfuseError
from allfuse.link.frame import Malformed
from allfuse.roles import messages as say
from allfuse.roles import parcels
from allfuse.roles.blueprint import Blueprint
from allfuse.roles.book import Book
from allfuse.roles.cutting import cut_pieces, cut_shards
from allfuse.roles.diary import ANSWERED, APPLIED, COPIED, GATHERED, GAVE, LENT, OFFERED, Entry
from allfuse.roles.encounters import ANSWER, OFFER, Declined, Parcel, Query, Received
from allfuse.roles.gossiper import Gossiper
from allfuse.roles.host import Host
from allfuse.roles.messages import SCHEDULER
from allfuse.roles.mixing import half_way, mean_of
from allfuse.roles.parcels import Incoming, Outgoing, Packing
from allfuse.roles.public import PublicCopy
from allfuse.roles.scheduler import Scheduler
from allfuse.roles.terms import Terms
from allfuse.sync import Asp, Ssp, Sync
from allfuse.topology.gossip import GRAPHS, Gossip
from allfuse.verify import pairs as verify_pairs
from allfuse.verify.meetings import Learned, Met, in_order
from allfuse.verify.pairs import Pairs

Mail = list[tuple[str, say.Message]]
SIZES = (5, 3)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models travel in several pieces, which can be lost one by one."""

    def cut(blocks: Any, servers: int) -> Any:
        return [cut_pieces(blocks, spans, 24) for spans in cut_shards(blocks, servers)]

    monkeypatch.setattr(parcels, "cut", cut)
    monkeypatch.setattr(verify_pairs, "cut", cut)


def first_weights() -> list[torch.Tensor]:
    return [torch.arange(sum(SIZES), dtype=torch.float64)]


def blueprint(codec: str = "identity") -> Blueprint:
    tensors = [(f"p{n}", torch.zeros(size, dtype=torch.float64)) for n, size in enumerate(SIZES)]
    return Blueprint.of_changes(tensors, options={"lr": 1.0}, codec=codec)


def change_of(worker: str, lease: int, step: int) -> torch.Tensor:
    """What a step adds to the weights."""
    generator = torch.Generator().manual_seed(hash_of(worker, lease, step))
    return torch.randn(sum(SIZES), generator=generator, dtype=torch.float64)


def hash_of(*parts: object) -> int:
    return random.Random(repr(parts)).getrandbits(62)


class Walker:
    """A worker whose steps take random times and add known changes to its weights."""

    def __init__(
        self,
        name: str,
        graph: str,
        seed: int,
        slow: float = 1.0,
        codec: str = "identity",
        **job: Any,
    ) -> None:
        self.name, self._random = name, random.Random(f"{seed} {name}")
        self._slow, self.spread = slow, 1.0
        topology = Gossip(graph)
        self.gossiper = Gossiper(
            join(name, place=name, **job),
            blueprint(codec),
            first_weights(),
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
        self._ready_s = self.wake_s = now_s + self._slow * (
            1.0 + self.spread * (self._random.random() - 0.5)
        )


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
        even: bool = False,
        codec: str = "identity",
        **terms: Any,
    ) -> None:
        self.seed, self.graph, self.steps, self.codec = seed, graph, steps, codec
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.counts: dict[str, int] = {}
        self.terms = Terms(parts=workers, every=every, sync=sync or Asp(), servers=0, **terms)
        self.book = Book(":memory:")
        self.network = Network(seed, faults, watch=self._watch)
        self.scheduler = Scheduler(self.terms, self.book, emit=self._emit)
        self.network.add(SCHEDULER, self.scheduler)
        self.walkers: dict[str, Walker] = {}
        for index in range(workers):
            self.come(f"w{index}", slow=1.0 if even else 1.0 + index)
            if even:
                self.walkers[f"w{index}"].spread = 0.0

    def _emit(self, name: str, /, **data: Any) -> None:
        self.events.append((name, data))

    def _watch(self, sender: str, to: str, message: say.Message) -> None:
        self.counts[message.kind] = self.counts.get(message.kind, 0) + 1

    def come(self, name: str, slow: float = 1.0) -> None:
        walker = Walker(
            name, self.graph, self.seed, slow, self.codec, steps=self.steps, epochs=None
        )
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
        return replay(self.book, self.terms.every, self.codec)


def replay(book: Book, every: int, codec: str) -> torch.Tensor:
    works = {work.lease: work for work, _ in book.history()}
    pairs, bases = Pairs(blueprint(codec)), {}
    offers: dict[tuple[str, int], dict[str, torch.Tensor]] = {}
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
            said = pairs.offer(deed.worker, entry, named(x))
            offers[deed.worker, entry.number] = {
                name: value.clone() for name, value in said.items()
            }
            bases[deed.worker, entry.number] = entry.base
        elif entry.deed == ANSWERED:
            offer = entry.peer, entry.number
            found = pairs.answer(deed.worker, entry, bases[offer], offers[offer], named(x))
            d = torch.cat(list(found.values()))
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


def named(x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"p{n}": part for n, part in enumerate(x.split(SIZES))}


GRAPH_NAMES = tuple(GRAPHS)
BAD = Faults(drop=0.1, double=0.1, delay_s=0.5)
LATE = Faults(drop=0.02, double=0.3, delay_s=1.5)


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


CODECS = ("bf16", "int8", "int8(stochastic=true)", "int4(warm=3)", "sign", "topk(0.3)")


@pytest.mark.parametrize("codec", CODECS)
def test_under_a_codec_the_mean_is_kept_and_the_logs_give_the_same_bits(codec: str) -> None:
    for seed in range(5):
        graph = GRAPH_NAMES[seed % len(GRAPH_NAMES)]
        world = World(seed, graph=graph, faults=(Faults(), BAD)[seed % 2], codec=codec, steps=12)
        world.run()
        assert_each_unit_once(world)
        assert_all_equal(world)
        torch.testing.assert_close(world.weights[0], expected_mean(world), rtol=1e-12, atol=1e-12)
        assert torch.equal(world.weights[0], world.replay())
        logs = world.book.logs().values()
        assert any(Entry(*each).base >= 0 for log in logs for each in log), "nothing was encoded"


@pytest.mark.parametrize(
    "codec",
    [
        "identity",
        *(c if c == "int8" else pytest.param(c, marks=pytest.mark.slow) for c in CODECS),
    ],
)
def test_workers_that_learn_nothing_more_come_to_one_mean_whatever_a_codec_leaves_out(
    codec: str,
) -> None:
    """What one message leaves out the next ones bring."""
    for graph in ("ring", "full"):
        far = apart(graph, codec, meetings=0)
        near = apart(graph, codec, meetings=800)
        assert near < 1e-6 * far


def apart(graph: str, codec: str, meetings: int) -> float:
    """How far from their mean 5 workers are after so many exchanges, drawn from the graph."""
    topology, chance = Gossip(graph), random.Random(7)
    packing, models = Packing(blueprint(codec)), [change_of(f"w{n}", 0, 0) for n in range(5)]
    copies: dict[tuple[int, int], PublicCopy] = {}
    mean = torch.stack(models).mean(0)
    for number in range(meetings):
        visitor = chance.randrange(5)
        host = topology.partner(visitor, 5, number, 0)
        assert host is not None
        known = copies.setdefault((visitor, host), PublicCopy(packing))
        is_encoded = known.number >= 0 and packing.codec is not None
        said = [models[visitor].clone()]
        if is_encoded:
            said = known.ahead(packing, [models[visitor]])
            packing.encode(said, 2 * number)
        (theirs,) = known.hear(said, is_encoded=is_encoded)
        differences = [half_way(theirs, models[host])]
        if is_encoded:
            packing.encode(differences, 2 * number + 1)
        models[host] += differences[0]
        models[visitor] -= differences[0]
        known.meet(number, differences)
    torch.testing.assert_close(torch.stack(models).mean(0), mean, rtol=1e-12, atol=1e-12)
    return max(float((model - mean).abs().max()) for model in models)


def test_a_host_without_the_copy_that_an_offer_is_ahead_of_says_so() -> None:
    packing = Packing(blueprint("int8"))
    host = Host(packing, repeat_s=1.0, give_up_s=60.0)
    values = first_weights()
    encoded = packing.encode(values, 0)
    offer = Outgoing(packing, OFFER, 4, values, [], 0.0, base=2, encoded=encoded)
    mail = [each for piece in offer.send() for each in host.handle("a", piece, 0.0, None)]
    assert [message for _, message in mail] == [Declined(number=4, lacks=True)]
    asked = host.handle("a", Query(content=OFFER, number=4), 1.0, None)
    assert [message for _, message in asked] == [Declined(number=4, lacks=True)]
    plain = Outgoing(packing, OFFER, 5, first_weights(), [], 0.0)
    for piece in plain.send():
        host.handle("a", piece, 2.0, None)
    assert [number for _, number, _ in host.held(OFFER)] == [5]


def test_a_piece_that_is_encoded_otherwise_than_its_parcel_is_refused() -> None:
    packing = Packing(blueprint("int8"))
    values = first_weights()
    encoded = packing.encode(values, 0)
    pieces = Outgoing(packing, OFFER, 0, values, [], 0.0, base=2, encoded=encoded).send()
    incoming = Incoming(packing, OFFER, 0, base=-1)
    with pytest.raises(Malformed):
        incoming.take(pieces[0])
    with pytest.raises(Malformed):
        Incoming(Packing(blueprint()), OFFER, 0).take(pieces[0])


def outlive(seed: int, faults: Faults, codec: str = "identity") -> World:
    """A run in which workers are killed, told of or not, and others come."""
    chance = random.Random(seed)
    world = World(
        seed,
        graph=chance.choice(GRAPH_NAMES),
        faults=faults,
        every=1 + seed % 2,
        steps=24,
        codec=codec,
        min=1,
        max=8,
    )
    for number in range(4):
        world.network.at(chance.uniform(2, 25), lambda n=number: kill_one(world, n))
        world.network.at(chance.uniform(2, 25), lambda n=number: world.come(f"late{n}", 1.5))
    world.run()
    return world


def kill_one(world: World, number: int) -> None:
    here = [name for name, walker in world.walkers.items() if not walker.gone]
    able = [name for name in here if world.walkers[name].gossiper.has_weights]
    if len(able) > 2 and world.scheduler.outcome is None:
        world.kill(here[number % len(here)], tells=number % 2 == 0)


def assert_that_it_is_told(world: World) -> None:
    """Each unit was counted once, and the logs of all lead to the weights of those who are left."""
    assert_each_unit_once(world)
    left = [walker.gossiper for walker in world.walkers.values() if walker.gone]
    replayed = world.replay()
    assert any(torch.equal(each.flats[0], replayed) for each in left if not each.refusal)


@pytest.mark.parametrize("faults", [Faults(), BAD, LATE], ids=["calm", "bad", "late"])
def test_every_unit_counts_once_though_workers_are_killed_and_come(faults: Faults) -> None:
    for seed in range(8):
        assert_that_it_is_told(outlive(seed, faults))


@pytest.mark.parametrize("faults", [Faults(), BAD, LATE], ids=["calm", "bad", "late"])
def test_under_a_codec_every_unit_counts_once_though_workers_are_killed_and_come(
    faults: Faults,
) -> None:
    for seed, codec in enumerate(CODECS):
        assert_that_it_is_told(outlive(seed, faults, codec))


@pytest.mark.slow
@pytest.mark.parametrize("faults", [Faults(), BAD, LATE], ids=["calm", "bad", "late"])
@pytest.mark.parametrize("first", range(100, 1100, 50))
def test_a_thousand_schedules_with_deaths_and_joins_under_codecs(
    faults: Faults, first: int
) -> None:
    for seed in range(first, first + 50):
        assert_that_it_is_told(outlive(seed, faults, CODECS[seed % len(CODECS)]))


@pytest.mark.slow
@pytest.mark.parametrize("faults", [Faults(), BAD, LATE], ids=["calm", "bad", "late"])
@pytest.mark.parametrize("first", range(100, 1100, 50))
def test_a_thousand_schedules_with_deaths_and_joins(faults: Faults, first: int) -> None:
    for seed in range(first, first + 50):
        assert_that_it_is_told(outlive(seed, faults))


def test_ssp_bounds_how_far_workers_are_apart() -> None:
    for seed in range(10):
        world = World(seed, sync=Ssp(1), faults=BAD)
        world.run()
        assert_each_unit_once(world)
        (staleness,) = [data for name, data in world.events if name == "staleness"]
        assert max(lag for lag, _ in staleness["lag"]) <= 1
        assert torch.equal(world.weights[0], world.replay())


def test_a_scheduler_that_is_started_again_goes_on_from_its_book() -> None:
    for seed in range(10):
        world = World(seed, faults=BAD)
        for moment in (3.0, 9.0, 20.0):
            world.network.at(moment, world.restart_scheduler)
        world.run()
        assert_each_unit_once(world)
        assert_all_equal(world)
        torch.testing.assert_close(world.weights[0], expected_mean(world), rtol=1e-12, atol=1e-12)
        assert torch.equal(world.weights[0], world.replay())


@pytest.mark.parametrize("graph", GRAPH_NAMES)
def test_workers_that_all_ask_at_the_same_time_meet_all_the_same(graph: str) -> None:
    world = World(0, workers=6, graph=graph, faults=Faults(delay_s=0.1), steps=20, even=True)
    world.run()
    met = sum(walker.gossiper.exchanges for walker in world.walkers.values())
    assert met > 0.4 * 6 * 20


def test_a_host_with_an_offer_out_holds_lower_ones_and_declines_higher_ones() -> None:
    host = Host(Packing(blueprint()), repeat_s=1.0, give_up_s=60.0)
    offer = Outgoing(Packing(blueprint()), OFFER, 0, first_weights(), [], 0.0)
    low, high = (0, ""), (1 << 32, "z")
    mail = [each for piece in offer.send() for each in host.handle("a", piece, 0.0, low)]
    assert [type(message) for _, message in mail] == [Declined]
    mail = [each for piece in offer.send() for each in host.handle("b", piece, 0.0, high)]
    assert [type(message) for _, message in mail] == [Received]
    assert [name for name, _, _ in host.held(OFFER)] == ["b"]


def test_an_answer_is_given_once_and_repeated_until_it_has_come() -> None:
    packing = Packing(blueprint())
    host = Host(packing, repeat_s=1.0, give_up_s=60.0)
    offer = Outgoing(packing, OFFER, 3, first_weights(), [], 0.0)
    for piece in [*offer.send(), *offer.send()]:
        host.handle("a", piece, 0.0, None)
    assert len(host.held(OFFER)) == 1
    host.answer("a", packing.copy(first_weights()), [], 0.0)
    for piece in offer.send():
        assert not host.handle("a", piece, 0.5, None)
    assert not host.held(OFFER)
    assert [type(message) for _, message in host.tick(2.0)] == [Query]
    lacks = Received(content=ANSWER, number=3, missing=[1])
    (again,) = host.handle("a", lacks, 2.0, None)
    assert isinstance(again[1], Parcel)
    assert again[1].piece == 1
    host.handle("a", Received(content=ANSWER, number=3), 2.0, None)
    assert not host.tick(9.0)


def test_a_piece_of_another_model_is_refused_and_changes_nothing() -> None:
    host = Host(Packing(blueprint()), repeat_s=1.0, give_up_s=60.0)
    with pytest.raises(Malformed):
        host.handle("a", Parcel(content=OFFER, number=0, piece=0, pieces=9), 0.0, None)
    assert not host.held(OFFER)
    assert not host.tick(100.0)


def test_logs_that_cannot_be_are_found() -> None:
    logs = {"a": [Entry("begin", 0, 0)], "b": [Entry(APPLIED, -1, 0, "a", 0)]}
    with pytest.raises(AllfuseError, match="never came to that"):
        list(in_order(logs, lambda lease: 1, lambda lease: True))
    backwards = {"a": [Entry("begin", 0, 0), Entry(LENT, 0, 2, "b", 0), Entry(LENT, 0, 1, "b", 1)]}
    with pytest.raises(AllfuseError, match="was at step 2"):
        list(in_order(backwards, lambda lease: 3, lambda lease: True))
