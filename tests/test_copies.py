"""Copies of shards on other servers: a server that is killed loses no update."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from allfuse.base.errors import PlanError
from allfuse.link.post import Malformed
from allfuse.plan import as_plan
from allfuse.roles.messages import SCHEDULER, Copy, Fetch, Message, Part, Partners
from allfuse.roles.server import Server
from allfuse.roles.stage import Numbers
from allfuse.roles.terms import terms_of
from allfuse.sync import Asp, Bsp, Ssp, Sync
from tests.simulated import Faults
from tests.test_roles import MAKES, Teller, World, small_pieces

__all__ = ["small_pieces"]

WILD = Faults(drop=0.02, double=0.1, delay_s=0.5)


class Ringed(World):
    """A job whose servers keep copies; `kill` ends one of them, and starts it again."""

    def __init__(self, sync: Sync, **options: Any) -> None:
        super().__init__(sync, **options)
        self.killed = 0

    def servers(self) -> list[Server]:
        found = [self.network.machines.get(f"s{n}") for n in range(self.terms.servers)]
        return [each for each in found if isinstance(each, Server)]

    @property
    def is_kept(self) -> bool:
        """Every shard is as a whole where it is kept."""
        copies = [copy for server in self.servers() for copy in server.ring.copies.values()]
        wanted = self.terms.servers * self.terms.replicas
        births = {server.index: server.birth for server in self.servers()}
        return len(copies) == wanted and all(
            copy.is_whole and copy.birth == births[copy.index] for copy in copies
        )

    def kill(self, index: int, *, tells: bool) -> None:
        self.killed += 1
        self.network.remove(f"s{index}", tells=tells)
        self.add_server(index)

    def check_copies(self) -> None:
        """Copies that have come as far as their server are the same, bit for bit."""
        shards = {server.index: server for server in self.servers()}
        compared = 0
        for server in self.servers():
            for copy in server.ring.copies.values():
                own = shards[copy.index]
                if not copy.is_whole or copy.sequence != own.applied:
                    continue
                assert own.shard is not None
                for piece in range(len(own.shard.pieces)):
                    ours, kept = own.shard.capture(piece), copy.shard.capture(piece)
                    assert ours.keys() == kept.keys()
                    assert all(torch.equal(ours[name], kept[name]) for name in ours)
                compared += 1
        assert compared


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("sync", [Bsp(), Ssp(2), Asp()], ids=str)
@pytest.mark.parametrize(("servers", "replicas"), [(2, 1), (3, 1), (3, 2)])
def test_a_killed_server_loses_no_update_on_whatever_network(
    sync: Sync, seed: int, servers: int, replicas: int
) -> None:
    """All that workers saw, and the end, is what the book says, bit for bit."""
    world = Ringed(
        sync, seed=seed, faults=WILD, servers=servers, replicas=replicas, make=MAKES["adam"]
    )
    chance = random.Random(seed)

    def kill() -> None:
        if world.teller.scheduler.outcome is not None:
            return
        if world.is_kept:
            world.kill(chance.randrange(servers), tells=chance.random() < 0.8)
        world.network.at(world.network.now_s + 3 * chance.random(), kill)

    world.network.at(2.0, kill)
    world.run().check()
    assert world.killed
    assert [event["lost"] for event in world.told("server_restored")] == [0] * world.killed
    assert all(rebirth.whole for rebirth in world.book.rebirths())
    world.check_copies()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sync", [Bsp(), Asp()], ids=str)
def test_servers_that_die_together_are_said_to_have_lost_what_they_lost(
    sync: Sync, seed: int
) -> None:
    world = Ringed(sync, seed=seed, faults=WILD, servers=2, replicas=1)
    chance = random.Random(seed)

    def kill() -> None:
        if world.teller.scheduler.outcome is None:
            world.kill(0, tells=chance.random() < 0.8)
            world.kill(1, tells=chance.random() < 0.8)

    world.network.at(6.0 + 6 * chance.random(), kill)
    world.run()
    world.auditor.check(5, 3)
    assert all(values.isfinite().all() for values in world.weights.values())
    restored = world.told("server_restored")
    assert {event["shard"] for event in restored} == {0, 1}
    born = [(rebirth.shard, rebirth.sequence) for rebirth in world.book.rebirths()]
    assert len(born) == len(restored)
    assert all(
        event["lost"] == 0 or (event["shard"], -1) in born for event in restored
    )  # there were no snapshots


@pytest.mark.parametrize("sync", [Bsp(), Asp()], ids=str)
def test_copies_follow_a_scheduler_that_is_started_again(sync: Sync) -> None:
    world = Ringed(sync, faults=Faults(delay_s=0.2), servers=2, replicas=1)

    def kill() -> None:
        assert world.is_kept
        world.kill(1, tells=True)
        old = world.teller
        world.teller = Teller(world.terms, world.book)
        world.teller.events = old.events
        world.network.machines.pop(SCHEDULER)
        world.network.add(SCHEDULER, world.teller)

    world.network.at(5.0, kill)
    world.run().check()
    assert [event["lost"] for event in world.told("server_restored")] == [0]


class Hasty(Server):
    """Says that it holds what no copy has."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.ring.keepers.hold = lambda lease, sequence: True  # type: ignore[method-assign]
        self.ring.pass_on = lambda lease, piece, stage: iter(())  # type: ignore[method-assign]


def test_a_server_that_says_too_early_that_it_holds_an_update_is_found_out() -> None:
    """The checks above can fail."""
    world = Ringed(Asp(), servers=2, replicas=1, server=Hasty)

    def kill() -> None:
        if world.servers()[1].applied >= 6:
            world.kill(1, tells=True)
        else:
            world.network.at(world.network.now_s + 0.02, kill)

    world.network.at(1.0, kill)
    world.run()
    assert [event["lost"] > 0 for event in world.told("server_restored")] == [True]


@pytest.mark.parametrize("codec", ["int8", "topk(0.2)"])
def test_copies_of_encoded_updates_are_the_same(codec: str) -> None:
    world = Ringed(Asp(), faults=WILD, servers=2, replicas=1, codec=codec)

    def kill() -> None:
        if world.is_kept:
            world.kill(0, tells=True)
        else:
            world.network.at(world.network.now_s + 0.1, kill)

    world.network.at(6.0, kill)
    world.run()
    world.auditor.check(5, 3)
    world.check_copies()
    assert [event["lost"] for event in world.told("server_restored")] == [0]
    (rebirth,) = world.book.rebirths()
    assert rebirth.whole


def check_readers(world: Ringed) -> int:
    """What servers take workers to hold is what those hold, bit for bit; how much was compared."""
    replicas = {worker.name: worker.client.replica for worker in world.workers}
    compared = 0
    for server in world.servers():
        bases = {} if server.shard is None else server._readers._bases
        for (worker, _), base in bases.items():
            for piece, values in base.pieces.items() if base.is_held else ():
                place = server.index, piece
                if replicas[worker]._versions.get(place) != base.sequence:
                    continue  # it has newer ones, which are no differences to these
                held = replicas[worker].copy(*place)
                assert all(map(torch.equal, held, values)), (worker, place, base.sequence)
                compared += 1
    return compared


@pytest.mark.parametrize(
    "seed", [3, pytest.param(4, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)]
)
def test_a_server_made_from_a_copy_knows_what_workers_hold_of_encoded_weights(seed: int) -> None:
    """What the one before it has sent already may have come, or not: it does not send it anew, as
    whoever has the other message would take it for the same."""
    world = Ringed(Asp(), seed=seed, faults=WILD, servers=2, replicas=1, codec="int8")
    chance = random.Random(seed)
    compared: list[int] = []

    def kill() -> None:
        if world.teller.scheduler.outcome is None:
            if world.is_kept:
                world.kill(chance.randrange(2), tells=chance.random() < 0.8)
            world.network.at(world.network.now_s + 2 * chance.random(), kill)

    def look() -> None:
        compared.append(check_readers(world))
        if world.teller.scheduler.outcome is None:
            world.network.at(world.network.now_s + 0.05, look)

    world.network.at(2.0, kill)
    world.network.at(2.0, look)
    world.run()
    world.auditor.check(5, 3)
    assert sum(compared)
    assert any(rebirth.sequence < rebirth.born for rebirth in world.book.rebirths())


def test_without_copies_servers_say_nothing_to_each_other() -> None:
    world = World(Asp(), faults=WILD, servers=2)
    kinds: set[type[Message]] = set()
    watch = world.network._watch
    assert watch is not None

    def note(sender: str, to: str, message: Message) -> None:
        kinds.add(type(message))
        watch(sender, to, message)

    world.network._watch = note
    world.run().check()
    assert not kinds & {Copy, Fetch, Part, Partners}
    server: Any = world.network.machines["s0"]
    for message in (
        Copy(shard=1, worker="w", lease=0, sequence=0, piece=0, pieces=1, options=[]),
        Fetch(shard=0, birth=1, number=1),
        Part(shard=1, birth=0, number=0, answer=[], sequence=0, part=0, parts=1, piece=0, lease=-1),
    ):
        with pytest.raises(Malformed):
            server.handle("s1", message, 0.0)


def test_what_is_no_part_of_a_shard_changes_no_copy() -> None:
    world = Ringed(Bsp(), servers=2, replicas=1)
    world.run()
    server: Any = world.network.machines["s0"]
    copy = server.ring.copies[1]
    before = {name: values.clone() for name, values in copy.shard.capture(0).items()}
    bad = {"shard": 1, "worker": "w", "lease": 99, "sequence": 0, "pieces": 9, "options": []}
    with pytest.raises(Malformed):
        server.handle("s1", Copy(piece=0, tensors=(torch.zeros(3),), **bad), 0.0)
    part = {"shard": 1, "birth": 5, "number": 5, "answer": [], "sequence": 0, "part": 0, "parts": 1}
    server.handle("s1", Part(piece=0, lease=-1, **part), 0.0)
    after = copy.shard.capture(0)
    assert copy.is_whole
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(Malformed):
        server.handle(SCHEDULER, Partners(places=["a"], births=[1], whole=[True]), 0.0)


def test_runs_of_numbers_join_to_one_set() -> None:
    chance = random.Random(0)
    for _ in range(200):
        sets = [{chance.randrange(30) for _ in range(chance.randrange(12))} for _ in range(2)]
        first, second = Numbers(), Numbers()
        for numbers, own in zip((first, second), sets, strict=True):
            for number in own:
                numbers.add(number)
        first.join(second.runs)
        assert {number for number in range(30) if number in first} == sets[0] | sets[1]
        for run, following in zip(first.runs, first.runs[1:], strict=False):
            assert run[1] + 1 < following[0]
    with pytest.raises(Malformed):
        first.join([[3, 1]])


def test_a_plan_says_how_many_copies() -> None:
    plan = as_plan("data(4, topology=central(servers=2, replicas=1), sync=asp)")
    assert terms_of(plan, 60.0).replicas == 1
    assert str(plan) == "data(4, topology=central(servers=2, replicas=1), sync=asp)"
    assert terms_of(as_plan("data(4, topology=central(servers=2))"), 60.0).replicas == 0


@pytest.mark.parametrize("text", ["servers=2, replicas=2", "replicas=1", "servers=2, replicas=-1"])
def test_copies_need_other_servers(text: str) -> None:
    with pytest.raises(PlanError, match=r"nearest|central\(servers="):
        as_plan(f"data(4, topology=central({text}))")
