"""Scheduler, servers and workers together, on a simulated network: what is learned is what the
book says, whatever the network does."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from allfuse.roles import cutting
from allfuse.roles.blueprint import Blueprint
from allfuse.roles.book import Book
from allfuse.roles.client import Client
from allfuse.roles.messages import SCHEDULER, Join, Lease, Mail, Message, open_letter
from allfuse.roles.order import Order
from allfuse.roles.scheduler import Scheduler
from allfuse.roles.server import Server
from allfuse.roles.shard import Shard
from allfuse.roles.terms import Terms
from allfuse.sync import Asp, Bsp, Ssp, Sync
from tests.simulated import Auditor, Faults, Network

WILD = Faults(drop=0.1, double=0.1, delay_s=0.5)
SHAPES = {"a": (7, 3), "b": (5,), "c": (), "d": (0, 4), "e": (11,)}
STEPS = 5

Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
Weights = dict[str, Tensor]

MAKES: dict[str, Make] = {
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.05),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.05, weight_decay=0.1),
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = cutting.cut_pieces
    monkeypatch.setattr(cutting, "cut_pieces", lambda blocks, spans: whole(blocks, spans, 100))


def first_weights(dtype: torch.dtype) -> Weights:
    chance = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=chance, dtype=torch.float64).to(dtype)
        for name, shape in SHAPES.items()
    }


def gradient_of(weights: Weights, step: int, part: int) -> Weights:
    """Of half the squared distance to a target that each unit has of its own."""
    chance = torch.Generator().manual_seed(100 * step + part)
    return {
        name: weights[name]
        - torch.randn(shape, generator=chance, dtype=torch.float64).to(weights[name])
        for name, shape in SHAPES.items()
    }


def count_of(part: int) -> float:
    return 1.0 + part


def rate_of(step: int) -> float:
    return 0.1 / (1 + step)


def make_optimizer(make: Make, weights: Weights) -> tuple[torch.optim.Optimizer, Weights]:
    """Two groups, with options of their own."""
    held = {name: torch.nn.Parameter(values.clone()) for name, values in weights.items()}
    groups = [{"params": [held["a"], held["e"]]}, {"params": [held["b"], held["c"], held["d"]]}]
    optimizer = make(groups)
    optimizer.param_groups[1]["lr"] /= 2
    return optimizer, held


class Worker:
    """A client that learns; its gradients are final one by one, over a random time.

    seen: of each lease, the version and a copy of the weights that it began from.
    """

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.wake_s: float | None = None
        self.seen: dict[int, tuple[int, Weights]] = {}
        self.made: dict[int, Weights] = {}
        self.left = False
        world_join = Join(
            name=name, host="h", fingerprint="f", steps_per_epoch=STEPS, steps=None, epochs=1,
            blueprint=world.blueprint.plain(), clip=world.clip,
        )  # fmt: skip
        self.client = Client(world_join, world.blueprint, world.terms.servers)
        self.client.replica.load(first_weights(world.dtype))
        self._lease: Lease | None = None
        self._to_push: list[str] = []

    def handle(self, sender: str, message: Message, now_s: float) -> Mail:
        mail = self.client.handle(sender, open_letter(message.letter()), now_s)
        return mail + self._go_on(now_s)

    def lost(self, name: str, now_s: float) -> Mail:
        return self.client.lost(name, now_s)

    def tick(self, now_s: float) -> Mail:
        return self.client.tick(now_s) + self._work(now_s) + self._go_on(now_s)

    def _go_on(self, now_s: float) -> Mail:
        client = self.client
        if client.is_over and not self.left:
            client.replica.settle()
            self.left = True
        if self.left:
            return client.leave()
        if client.is_ready:
            self._lease = lease = client.begin(now_s)
            weights = {name: values.clone() for name, values in client.replica.tensors.items()}
            self.seen[lease.lease] = lease.sequence, weights
            self.made[lease.lease] = gradient_of(weights, lease.first_step, lease.part)
            self._to_push = list(self.made[lease.lease])
            client.options = self.world.options(lease.first_step)
            self.wake_s = now_s + self.world.random.random()
        return []

    def _work(self, now_s: float) -> Mail:
        """The gradient of one tensor, or the end of the lease."""
        client, lease = self.client, self._lease
        if not client.is_working or lease is None:
            return []
        self.wake_s = now_s + self.world.random.random() / 4
        if self._to_push:
            name = self._to_push.pop()
            return client.push({name: self.made[lease.lease][name]}, now_s)
        self.wake_s = None
        return client.finish(now_s, loss=1.0, count=count_of(lease.part), rows=1, seconds=1.0)


class Teller:
    """The scheduler as a machine; its events are kept."""

    def __init__(self, terms: Terms, book: Book) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.scheduler = Scheduler(terms, book, self._emit)

    def _emit(self, name: str, /, **data: Any) -> None:
        self.events.append((name, data))

    def handle(self, sender: str, message: Message, now_s: float) -> Mail:
        return self.scheduler.handle(sender, open_letter(message.letter()), now_s)

    def lost(self, name: str, now_s: float) -> Mail:
        return self.scheduler.lost(name, now_s)

    def tick(self, now_s: float) -> Mail:
        return self.scheduler.tick(now_s)


class World:
    """A whole job on a network."""

    def __init__(
        self,
        sync: Sync,
        *,
        parts: int = 3,
        servers: int = 2,
        replicas: int = 0,
        seed: int = 0,
        faults: Faults | None = None,
        make: Make = MAKES["momentum"],
        dtype: torch.dtype = torch.float64,
        codec: str = "identity",
        folder: Path | None = None,
        server: type[Server] = Server,
        schedule: bool = False,
        min: int | None = None,
        clip: float | None = None,
    ) -> None:
        self.clip = clip
        self.dtype, self.folder, self.server, self.schedule = dtype, folder, server, schedule
        self.random = random.Random(seed)
        self.optimizer, held = make_optimizer(make, first_weights(dtype))
        self.blueprint = Blueprint.of_gradients(
            self.optimizer,
            held.items(),
            codec=codec,  # type: ignore[arg-type]
        )
        self.terms = Terms(
            parts=parts,
            sync=sync,
            servers=servers,
            replicas=replicas,
            min=min,
            max=2 * parts,
            snapshot_s=3.0,
        )
        self.book = Book(":memory:")
        self.auditor = Auditor(sync.bound)
        self.network = Network(seed, faults, watch=self.auditor.watch)
        self.teller = Teller(self.terms, self.book)
        self.network.add(SCHEDULER, self.teller)
        self.births = iter(range(1000))
        self.workers: list[Worker] = []
        for index in range(servers):
            self.add_server(index)
        for number in range(parts):
            self.add_worker(f"w{number}")

    def options(self, step: int) -> list[dict[str, Any]]:
        """Of a schedule of the learning rate, which is made of steps alone."""
        return [{"lr": rate_of(step)}, {}] if self.schedule else []

    def add_server(self, index: int) -> Server:
        server = self.server(
            index, self.terms.servers, birth=next(self.births), place=f"s{index}",
            replicas=self.terms.replicas, folder=self.folder,
        )  # fmt: skip
        self.network.add(f"s{index}", server)
        return server

    def add_worker(self, name: str) -> Worker:
        worker = Worker(self, name)
        self.workers.append(worker)
        self.network.add(name, worker)
        return worker

    def run(self) -> World:
        self.network.run(lambda: self.teller.scheduler.is_over)
        outcome = self.teller.scheduler.outcome
        assert outcome is not None
        assert not outcome.failed, outcome.reason
        return self

    @property
    def weights(self) -> Weights:
        """What the workers ended with, which is the same for all."""
        ended = [worker.client.replica.tensors for worker in self.workers if worker.left]
        assert ended
        for other in ended[1:]:
            assert all(torch.equal(ended[0][name], other[name]) for name in other)
        return ended[0]

    def told(self, name: str) -> list[dict[str, Any]]:
        return [data for each, data in self.teller.events if each == name]

    # The book, executed serially.

    def replay(self) -> list[Weights]:
        """The weights of each version, made in this process from what the book records."""
        shards = [Shard(self.blueprint, n, self.terms.servers) for n in range(self.terms.servers)]
        flats = [torch.zeros(b.elements, dtype=b.dtype) for b in self.blueprint.blocks]
        views = cutting.view_all(self.blueprint.blocks, flats)
        for name, values in first_weights(self.dtype).items():
            views[name].copy_(values)
        for shard in shards:
            for number, piece in enumerate(shard.pieces):
                shard.put(number, tuple(flats[s.block][s.start : s.stop] for s in piece))
        versions: list[Weights] = []
        for sequence in range(self.book.newest()[0] + 1):
            commits = self.book.commits(sequence, sequence)
            pushes = []
            for commit in commits:
                _, lease = self.auditor.leases[commit.lease]
                made = gradient_of(versions[commit.read], lease.first_step, lease.part)
                pushes.append((commit.weight, self._lay_out(made)))
                options = self.options(lease.first_step)
            for shard in shards:
                for number, piece in enumerate(shard.pieces):
                    if pushes:
                        given = [
                            (weight, tuple(flat[s.block][s.start : s.stop] for s in piece))
                            for weight, flat in pushes
                        ]
                        shard.update(number, given, options)
                    for span, values in zip(piece, shard.read(number), strict=True):
                        flats[span.block][span.start : span.stop] = values
            versions.append({name: values.clone() for name, values in views.items()})
        return versions

    def _lay_out(self, tensors: Weights) -> list[Tensor]:
        return [
            torch.cat([tensors[name].reshape(-1) for name in block.names])
            for block in self.blueprint.blocks
        ]

    def check(self) -> None:
        """Every unit was learned once, and whatever was read was of its version, bit for bit."""
        self.auditor.check(STEPS, self.terms.parts)
        versions = self.replay()
        for worker in self.workers:
            for sequence, weights in worker.seen.values():
                for name, values in weights.items():
                    assert torch.equal(values, versions[sequence][name]), (worker.name, sequence)
        assert all(torch.equal(self.weights[name], versions[-1][name]) for name in SHAPES)


def plain_loop(
    make: Make,
    parts: int,
    *,
    schedule: bool = False,
    dtype: torch.dtype = torch.float64,
    clip: float | None = None,
) -> Weights:
    optimizer, held = make_optimizer(make, first_weights(dtype))
    total = sum(count_of(part) for part in range(parts))
    for step in range(STEPS):
        values = {name: parameter.detach() for name, parameter in held.items()}
        made = [gradient_of(values, step, part) for part in range(parts)]
        for name, parameter in held.items():
            mean = sum(count_of(part) * made[part][name] for part in range(parts)) / total
            assert isinstance(mean, Tensor)
            parameter.grad = mean.to(dtype)
        if schedule:
            optimizer.param_groups[0]["lr"] = rate_of(step)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(held.values(), clip)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in held.items()}


@pytest.mark.parametrize("schedule", [False, True], ids=["", "schedule"])
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("servers", [1, 2, 3, 5])
def test_bsp_over_servers_equals_a_plain_loop(make: Make, servers: int, schedule: bool) -> None:
    world = World(Bsp(), servers=servers, make=make, schedule=schedule).run()
    for name, values in plain_loop(make, 3, schedule=schedule).items():
        torch.testing.assert_close(world.weights[name], values, rtol=1e-11, atol=1e-11)
    world.check()


@pytest.mark.parametrize("faults", [None, WILD])
def test_servers_clip_the_sum_of_gradients_whatever_the_network_does(faults: Faults | None) -> None:
    world = World(Bsp(), servers=3, clip=2.0, faults=faults).run()
    expected = plain_loop(MAKES["momentum"], 3, clip=2.0)
    for name, values in world.weights.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-9, atol=1e-12)
    unclipped = plain_loop(MAKES["momentum"], 3)
    assert not torch.allclose(unclipped["a"], expected["a"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bsp_in_shorter_types_equals_a_plain_loop_within_their_rounding(dtype: torch.dtype) -> None:
    world = World(Bsp(), servers=3, dtype=dtype).run()
    near = 32 * torch.finfo(dtype).eps
    for name, values in plain_loop(MAKES["momentum"], 3, dtype=dtype).items():
        torch.testing.assert_close(world.weights[name], values, rtol=near, atol=near)
    world.check()


@pytest.mark.parametrize("seed", range(3))
def test_ssp_0_gives_the_bits_of_bsp_whatever_the_network_does(seed: int) -> None:
    quiet = World(Bsp(), seed=9).run()
    wild = World(Ssp(0), seed=seed, faults=WILD).run()
    for name, values in quiet.weights.items():
        assert torch.equal(values, wild.weights[name])


SYNCS: list[Sync] = [Bsp(), Ssp(1), Ssp(3), Asp(), Asp(scaled=True)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sync", SYNCS, ids=str)
def test_the_recorded_order_replayed_serially_gives_the_same_bits(sync: Sync, seed: int) -> None:
    """Under messages that are lost, come twice, late and in another order."""
    World(sync, seed=seed, faults=WILD, servers=1 + seed % 3, make=MAKES["adam"]).run().check()


class EarlyServer(Server):
    """Applies what is staged as soon as it may, and calls the weights those of the order."""

    def _carry_out_one(self, sequence: int, order: Order) -> Iterator[tuple[str, Message]]:
        assert self.shard is not None
        if self.index == 1:
            for lease, bundle in list(self._stage._bundles.items()):
                if not self._stage.missing(lease) and lease not in dict(order.leases):
                    for piece, values in bundle.pieces.items():
                        self.shard.update(piece, [(1.0, values)], [])
        yield from super()._carry_out_one(sequence, order)


def test_a_server_that_applies_early_is_caught() -> None:
    """The check above can fail: versions are mixed where one server runs ahead."""
    world = World(Asp(), server=EarlyServer).run()
    with pytest.raises(AssertionError):
        world.check()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sync", [Bsp(), Ssp(2), Asp()], ids=str)
def test_workers_that_die_and_come_leave_every_update_whole_or_out(sync: Sync, seed: int) -> None:
    world = World(sync, seed=seed, faults=WILD, min=1)
    network, chance = world.network, random.Random(seed)

    def kill() -> None:
        alive = [worker for worker in world.workers if network.machines.get(worker.name) is worker]
        if world.teller.scheduler.outcome is None and len(alive) > 1:
            network.remove(chance.choice(alive).name, tells=chance.random() < 0.8)

    for number in range(3):
        network.at(4.0 + 5 * number, kill)
        network.at(6.0 + 5 * number, lambda number=number: come(number))

    def come(number: int) -> None:
        if world.teller.scheduler.outcome is None:
            world.add_worker(f"x{number}")

    world.run().check()
    assert world.told("loss")


def test_first_weights_are_given_again_where_the_giver_dies() -> None:
    world = World(Bsp(), faults=Faults(delay_s=0.3))

    def die() -> None:
        world.network.remove("w0")
        world.add_worker("w9")

    world.network.at(0.5, die)
    world.run().check()
    assert [loss["worker"] for loss in world.told("loss")] == ["w0"]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sync", [Bsp(), Asp()], ids=str)
@pytest.mark.parametrize("keeps", [True, False], ids=["snapshot", "nothing"])
def test_a_server_that_comes_again_says_what_it_lost_and_the_job_goes_on(
    sync: Sync, seed: int, keeps: bool, tmp_path: Path
) -> None:
    world = World(sync, seed=seed, faults=WILD, folder=tmp_path if keeps else None)
    applied: list[int] = []

    def die() -> None:
        if world.teller.scheduler.outcome is None:
            world.network.remove("s1")
            applied.append(world.add_server(1).applied)

    for when_s in (7.0, 13.0):
        world.network.at(when_s, die)
    world.run()
    world.auditor.check(STEPS, 3)
    restored = [event for event in world.told("server_restored") if event["shard"] == 1]
    assert len(restored) == len(applied)
    updates = {-1: 0}
    for order in world.book.orders(0, world.book.newest()[0]):
        updates[order.sequence] = order.updates
    for event, before in zip(restored, applied, strict=True):
        assert event["lost"] == updates[event["sequence"]] - updates[before]
    seen: dict[int, Weights] = {}
    for worker in world.workers:
        for sequence, weights in worker.seen.values():
            first = seen.setdefault(sequence, weights)
            assert all(torch.equal(first[name], weights[name]) for name in SHAPES)
    assert all(values.isfinite().all() for values in world.weights.values())


@pytest.mark.parametrize("codec", ["int8", "bf16", "topk(0.2)"])
@pytest.mark.parametrize("sync", [Ssp(1), Asp()], ids=str)
def test_codecs_lose_nothing_of_updates_over_time(sync: Sync, codec: str) -> None:
    """What was applied and what is left add up to all gradients that were learned."""
    world = World(
        sync, faults=WILD, codec=codec, make=lambda groups: torch.optim.SGD(groups, lr=1.0)
    )
    world.run()
    world.auditor.check(STEPS, 3)
    total = {name: torch.zeros_like(v) for name, v in first_weights(world.dtype).items()}
    left = {name: torch.zeros_like(v) for name, v in total.items()}
    for worker in world.workers:
        for lease, made in worker.made.items():
            assert lease in world.auditor.committed
            for name, values in made.items():
                total[name] += values
        for name, values in worker.client.updates.residuals.items():
            left[name] += values
    flats = {name: values.clone() for name, values in first_weights(world.dtype).items()}
    for name, values in held_by_servers(world).items():
        rate = 1.0 if name in "ae" else 0.5
        moved = (flats[name] - values) / rate
        torch.testing.assert_close(moved + left[name], total[name], rtol=1e-9, atol=1e-9)
    assert any(bool(values.any()) for values in left.values())


def held_by_servers(world: World) -> Weights:
    flats = [torch.zeros(b.elements, dtype=b.dtype) for b in world.blueprint.blocks]
    for index in range(world.terms.servers):
        server: Any = world.network.machines[f"s{index}"]
        for number, piece in enumerate(server.shard.pieces):
            for span, values in zip(piece, server.shard.read(number), strict=True):
                flats[span.block][span.start : span.stop] = values
    return cutting.view_all(world.blueprint.blocks, flats)


def test_orders_are_all_that_moves_servers() -> None:
    """Two servers that got the same orders in other schedules hold the same bits."""
    worlds = [World(Bsp(), seed=seed, faults=WILD, servers=2).run() for seed in (1, 2)]
    first, second = (held_by_servers(world) for world in worlds)
    assert all(torch.equal(first[name], second[name]) for name in SHAPES)
