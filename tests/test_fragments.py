"""Weights that sites and servers exchange fragment by fragment, at staggered steps."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import allfuse as af
from allfuse.base.errors import PlanError
from allfuse.job import Job
from allfuse.launcher.thread import launch_threads
from allfuse.link.post import Malformed
from allfuse.plan import as_plan
from allfuse.roles import messages as say
from allfuse.roles.blueprint import Blueprint
from allfuse.roles.book import Book
from allfuse.roles.ledger import Ledger
from allfuse.roles.messages import SCHEDULER, Join, Mail
from allfuse.roles.replica import Replica
from allfuse.roles.rotation import ALL, Rotation, Turn
from allfuse.roles.server import Server
from allfuse.roles.shard import Shard
from allfuse.roles.terms import Terms
from allfuse.store.checkpoint import Checkpoints
from allfuse.sync import Asp, Bsp, Ssp, Sync
from allfuse.training.loop import train_job
from allfuse.training.served import read_state
from tests.crews import small_job, train_crew, train_crew_into
from tests.simulated import Auditor, Faults, Network
from tests.test_roles import (
    SHAPES,
    WILD,
    Teller,
    Weights,
    Worker,
    World,
    first_weights,
    small_pieces,
)
from tests.test_verify_ordered import check, is_equal_bit_for_bit

__all__ = ["small_pieces"]

STEPS, EVERY, FRAGMENTS = 12, 4, 2


# State machines on a network in virtual time.


def learn(weights: Weights, first_step: int, steps: int, part: int) -> None:
    """Steps of a site, in place: towards a target that each unit has of its own."""
    for step in range(first_step, first_step + steps):
        chance = torch.Generator().manual_seed(100 * step + part)
        for name, shape in SHAPES.items():
            target = torch.randn(shape, generator=chance, dtype=torch.float64)
            weights[name].sub_((weights[name] - target) * 0.1)


class SiteWorker(Worker):
    """A client whose lease is some steps of its own."""

    def _go_on(self, now_s: float) -> Mail:
        before, mail = self._lease, super()._go_on(now_s)
        if self._lease is not before and self._lease is not None:
            lease, self._to_push = self._lease, []
            learn(self.client.replica.tensors, lease.first_step, lease.steps, lease.part)
        return mail


class SiteWorld(World):
    """A job of sites that exchange fragments with servers."""

    def __init__(
        self,
        sync: Sync,
        *,
        parts: int = 3,
        seed: int = 0,
        faults: Faults | None = None,
        replicas: int = 0,
        min: int | None = None,
    ) -> None:
        self.dtype, self.folder, self.server, self.schedule = torch.float64, None, Server, False
        self.random, self.clip = random.Random(seed), None
        share = 1.0 if sync.bound == 0 else 1.0 / parts
        self.blueprint = Blueprint.of_changes(
            first_weights(self.dtype).items(),
            options={"lr": 0.7 * share, "momentum": 0.9, "nesterov": True},
            fragments=FRAGMENTS,
        )
        self.terms = Terms(
            parts=parts,
            every=EVERY,
            fragments=FRAGMENTS,
            sync=sync,
            servers=2,
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
        for index in range(2):
            self.add_server(index)
        for number in range(parts):
            self.add_worker(f"w{number}")

    def add_worker(self, name: str) -> Worker:
        worker = SiteWorker(self, name)
        join = Join(
            name=name, host="h", fingerprint="f", steps_per_epoch=STEPS, steps=None, epochs=1,
            blueprint=self.blueprint.plain(),
        )  # fmt: skip
        worker.client._join = join
        self.workers.append(worker)
        self.network.add(name, worker)
        return worker

    def replay(self) -> list[Weights]:
        """The weights of each version, from what the book says and the leases that were handed
        out; and `begun`, what each lease began with."""
        shards = [Shard(self.blueprint, n, 2) for n in range(2)]
        self._put(shards, first_weights(self.dtype))
        self.begun: dict[int, Weights] = {}
        live: dict[str, Weights] = {}
        start: dict[str, tuple[int, Weights]] = {}
        read: dict[str, Weights] = {}
        versions: list[Weights] = []
        for sequence in range(self.book.newest()[0] + 1):
            commits, changes = self.book.commits(sequence, sequence), {}
            for commit in sorted(commits, key=lambda commit: commit.lease):
                worker, lease = self.auditor.leases[commit.lease]
                own, base = live.setdefault(worker, {}), read.setdefault(worker, {})
                clock, first = start.get(worker, (-1, {}))
                if lease.clock == clock:  # a second part of a batch, by the same worker
                    own.update({name: values.clone() for name, values in first.items()})
                for name in self.names(lease.takes):
                    own[name] = versions[commit.read][name].clone()
                    base[name] = versions[commit.read][name]
                self.begun[commit.lease] = {name: values.clone() for name, values in own.items()}
                start[worker] = lease.clock, self.begun[commit.lease]
                learn(own, lease.first_step, lease.steps, lease.part)
                names = self.names(lease.fragment)
                changes[commit.lease] = {name: base[name] - own[name] for name in names}
            pushes = [(commit.weight, changes[commit.lease]) for commit in commits if commit.weight]
            if pushes:
                self._step(shards, pushes)
            versions.append({name: values.clone() for name, values in self._read(shards).items()})
        return versions

    def check(self) -> None:
        """Every unit was learned once; what leases began with, and the end, are what the book says,
        bit for bit."""
        self.auditor.check(STEPS, self.terms.parts)
        versions = self.replay()
        for worker in self.workers:
            for lease, (_, weights) in worker.seen.items():
                for name, values in self.begun.get(lease, {}).items():
                    assert torch.equal(values, weights[name]), (worker.name, lease, name)
        assert all(torch.equal(self.weights[name], versions[-1][name]) for name in SHAPES)

    def names(self, fragment: int) -> list[str]:
        blocks = self.blueprint.blocks
        return [n for b in blocks if fragment in (ALL, b.fragment) for n in b.names]

    def _put(self, shards: list[Shard], weights: Weights) -> None:
        flats = self._lay_out(weights)
        for shard in shards:
            for number, piece in enumerate(shard.pieces):
                shard.put(number, tuple(flats[s.block][s.start : s.stop] for s in piece))

    def _read(self, shards: list[Shard]) -> Weights:
        blocks = self.blueprint.blocks
        flats = [torch.zeros(b.elements, dtype=b.dtype) for b in blocks]
        for shard in shards:
            for number, piece in enumerate(shard.pieces):
                for span, values in zip(piece, shard.read(number), strict=True):
                    flats[span.block][span.start : span.stop] = values
        found: Weights = {}
        for block, flat in zip(blocks, flats, strict=True):
            found |= block.views(flat)
        return found

    def _step(self, shards: list[Shard], pushes: list[tuple[float, Weights]]) -> None:
        zeros = {name: torch.zeros(shape, dtype=self.dtype) for name, shape in SHAPES.items()}
        laid = [(weight, self._lay_out({**zeros, **change})) for weight, change in pushes]
        here = {b.fragment for b in self.blueprint.blocks if b.names[0] in pushes[0][1]}
        for shard in shards:
            for number, piece in enumerate(shard.pieces):
                if piece.fragment in here:
                    given = [
                        (weight, tuple(flat[s.block][s.start : s.stop] for s in piece))
                        for weight, flat in laid
                    ]
                    shard.update(number, given, [])


SYNCS: list[Sync] = [Bsp(), Ssp(1), Asp(), Asp(scaled=True)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sync", SYNCS, ids=str)
def test_fragments_come_to_what_the_book_says_whatever_the_network_does(
    sync: Sync, seed: int
) -> None:
    """Under messages that are lost, come twice, late and in another order."""
    SiteWorld(sync, seed=seed, faults=WILD).run().check()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sync", [Bsp(), Ssp(2), Asp()], ids=str)
def test_workers_that_die_between_fragments_and_come_leave_every_update_whole_or_out(
    sync: Sync, seed: int
) -> None:
    world = SiteWorld(sync, seed=seed, faults=WILD, min=1)
    network, chance = world.network, random.Random(seed)

    def kill() -> None:
        alive = [worker for worker in world.workers if network.machines.get(worker.name) is worker]
        if world.teller.scheduler.outcome is None and len(alive) > 1:
            network.remove(chance.choice(alive).name, tells=chance.random() < 0.8)

    def come(number: int) -> None:
        if world.teller.scheduler.outcome is None:
            world.add_worker(f"x{number}")

    for number in range(3):
        network.at(3.0 + 4 * number, kill)
        network.at(4.0 + 4 * number, lambda number=number: come(number))
    world.run().check()
    assert world.told("loss")


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_server_loses_no_fragment_where_another_keeps_a_copy(seed: int) -> None:
    """Updates of one fragment are passed on, and stand for whole ones."""
    world = SiteWorld(Asp(), seed=seed, faults=Faults(0.02, 0.1, 0.5), replicas=1)
    servers: list[Server] = []

    def kill() -> None:
        found = [world.network.machines[f"s{index}"] for index in range(2)]
        servers[:] = [each for each in found if isinstance(each, Server)]
        if all(copy.is_whole for each in servers for copy in each.ring.copies.values()):
            world.network.remove(f"s{seed % 2}")
            world.add_server(seed % 2)
        else:
            world.network.at(world.network.now_s + 0.1, kill)

    world.network.at(4.0, kill)
    world.run().check()
    assert [event["lost"] for event in world.told("server_restored")] == [0]


@pytest.mark.parametrize("sync", [Bsp(), Asp()], ids=str)
def test_a_scheduler_that_is_started_again_knows_whose_turn_it_is(sync: Sync) -> None:
    world = SiteWorld(sync, faults=Faults(delay_s=0.2))

    def restart() -> None:
        old, world.teller = world.teller, Teller(world.terms, world.book)
        world.teller.events = old.events
        world.network.machines.pop(SCHEDULER)
        world.network.add(SCHEDULER, world.teller)

    world.network.at(5.0, restart)
    world.run().check()


def test_each_fragment_travels_once_in_every_h_steps_and_all_at_the_end() -> None:
    """Both ways: of what is held, no more than a fragment at once, but for the first and the last
    weights."""
    pushed: list[tuple[int, int]] = []
    sent: list[set[int]] = []
    world = SiteWorld(Bsp(), parts=1)
    watch = world.network._watch
    assert watch is not None

    def note(sender: str, to: str, message: say.Message) -> None:
        if isinstance(message, say.Push) and to == "s0":
            pushed.append((message.lease, message.fragment))
        if isinstance(message, say.Weights) and sender == "s0":
            server: Any = world.network.machines["s0"]
            if message.piece == 0 or len(sent) <= message.sequence:
                sent.append(set())
            sent[-1].add(server.shard.pieces[message.piece].fragment)
        watch(sender, to, message)

    world.network._watch = note
    world.run().check()
    turns = STEPS * FRAGMENTS // EVERY
    assert list(dict.fromkeys(pushed)) == [
        (turn, turn % FRAGMENTS if turn < turns - 1 else ALL) for turn in range(turns)
    ]
    both = set(range(FRAGMENTS))
    assert sent == [both, *({turn % FRAGMENTS} for turn in range(turns - 1)), both]


# The parts.


def blueprint(fragments: int, **options: Any) -> Blueprint:
    buffers = [("mean", torch.zeros(6, dtype=torch.float64))]
    weights = first_weights(torch.float64)
    return Blueprint.of_changes(
        weights.items(), buffers, options={"lr": 1.0}, fragments=fragments, **options
    )


@pytest.mark.parametrize("servers", [1, 2, 5])
def test_each_server_holds_an_even_share_of_each_fragment_in_pieces_of_its_own(
    servers: int,
) -> None:
    made = blueprint(3)
    shards = [Shard(made, index, servers) for index in range(servers)]
    for fragment in range(3):
        sizes = [
            sum(
                span.elements
                for piece in shard.pieces
                if piece.fragment == fragment
                for span in piece
            )
            for shard in shards
        ]
        own = sum(block.elements for block in made.blocks if block.fragment == fragment)
        assert sum(sizes) == own
        assert max(sizes) - min(sizes) <= 1
    for shard in shards:
        assert [piece.fragment for piece in shard.pieces] == sorted(
            p.fragment for p in shard.pieces
        )
        for piece in shard.pieces:
            assert {made.blocks[span.block].fragment for span in piece} <= {piece.fragment}


def test_a_blueprint_in_fragments_comes_back_from_plain_values() -> None:
    made = blueprint(3)
    assert Blueprint.from_plain(made.plain()) == made
    assert made.fragments == 3
    assert made.digest != blueprint(1).digest
    bad = made.plain()
    bad["groups"][1]["fragment"] = "1"
    with pytest.raises(Malformed):
        Blueprint.from_plain(bad)
    with pytest.raises(PlanError, match="of whole tensors, and there are 6"):
        blueprint(7)


@pytest.mark.parametrize(("every", "fragments"), [(4, 2), (7, 3), (5, 5), (6, 1)])
def test_blocks_end_where_a_fragment_is_due(every: int, fragments: int) -> None:
    """At the steps where sites in step have their rounds."""
    ledger = Ledger(2, every, 3 * every, fragments=fragments)
    ends = []
    while (unit := ledger.take()) is not None:
        if unit.part == 0:
            assert ledger.first_step(unit) == (ends[-1] if ends else 0)
            ends.append(ledger.first_step(unit) + ledger.steps(unit))
    due = [
        turn * every + every * (n + 1) // fragments for turn in range(3) for n in range(fragments)
    ]
    assert ends == due


def test_a_site_weighs_what_it_learned_from_since_it_brought_the_fragment_last() -> None:
    rotation = Rotation(3)
    assert rotation.takes("w") == ALL
    for clock in range(4):
        fragment = rotation.brings(clock, is_late=False)
        behind = rotation.behind("w", clock, fragment, 10.0**clock)
        assert behind == sum(10.0**before for before in range(max(0, clock - 2), clock + 1))
        rotation.add("w", clock, Turn(clock, fragment, 10.0**clock))
        assert rotation.takes("w") == fragment == clock % 3
    assert rotation.brings(4, is_late=True) == ALL
    rotation.add("w", 4, Turn(4, ALL, 1.0))
    assert rotation.behind("w", 5, 2, 7.0) == 7.0
    assert rotation.behind("new", 5, 2, 7.0) == 7.0


def test_a_piece_of_another_fragment_than_its_update_is_refused() -> None:
    world = SiteWorld(Asp()).run()
    server: Any = world.network.machines["s0"]
    piece = server.shard.pieces[0]
    push = say.Push(
        lease=999, sequence=0, piece=0, pieces=len(server.shard.pieces), options=[],
        fragment=piece.fragment + 1, tensors=server.shard.read(0),
    )  # fmt: skip
    with pytest.raises(Malformed, match="of fragment 1"):
        server.handle("w0", push, 0.0)


# Training, on threads.


def of_96(**changes: Any) -> Job:
    """Even shares in all batches."""
    x, y = small_job().train
    return small_job(train=(x[:96], y[:96]), batch_size=16, **changes)


@pytest.mark.parametrize(
    ("plan", "steps"),
    [
        ("site(2, every=4, fragments=2{})", 12),
        ("site(2, every=5, fragments=3, outer=nesterov{})", 15),
        ("site(2, every=6, fragments=4, outer=momentum{})", 12),
    ],
)
def test_sites_over_servers_equal_sites_in_step_fragment_by_fragment(plan: str, steps: int) -> None:
    job = of_96(stop=af.Stop(steps=steps))
    over = train_crew(job, plan.format(", topology=central(servers=2)")).result
    (result, _) = launch_threads(lambda: train_job(job), 2, plan=plan.format(""))
    for name, value in result.weights.items():
        torch.testing.assert_close(over.weights[name], value, rtol=1e-9, atol=1e-11)
    whole = train_crew(job, f"site(2, every={steps}, topology=central(servers=2))").result
    assert not torch.allclose(whole.weights["0.weight"], over.weights["0.weight"], atol=1e-3)


@pytest.mark.parametrize(
    "plan",
    [
        "site(2, every=5, fragments=3, outer=nesterov, topology=central(servers=2))",
        "site(2, every=4, fragments=2, delay=1, sync=asp)",
        "site(3, every=3, fragments=3, outer=momentum, sync=asp, codec=int8)",
        "site(3, every=7, fragments=2, delay=2, outer=nesterov, sync=ssp(2), codec=topk(0.2))",
        "site(2, every=4, fragments=4, sync=asp(scaled=true))",
    ],
)
def test_verify_replays_fragments_bit_for_bit(plan: str) -> None:
    report = check(plan, steps=12)
    assert is_equal_bit_for_bit(report), report.lines()
    assert report.promise == "replayed"


def test_a_fragment_that_is_not_taken_in_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    settle = Replica.settle
    monkeypatch.setattr(
        Replica,
        "settle",
        lambda self, own=0.0, fragment=ALL: settle(self, own, fragment) if fragment != 1 else None,
    )
    assert not check("site(2, every=4, fragments=2, sync=asp)", steps=12).ok


@pytest.mark.parametrize("how", ["delay=1, topology=central(servers=2)", "sync=asp"])
def test_every_sample_is_used_once_whatever_fragment_it_came_to_first(how: str) -> None:
    told = train_crew(small_job(), f"site(2, every=4, fragments=2, {how})")
    commits = told.all("commit")
    assert sum(commit["rows"] for commit in commits) == 2 * 97
    assert set(Counter((c["block"], c["part"]) for c in commits).values()) == {1}
    assert told.result.steps == 14


@pytest.mark.parametrize("pace", ["every=4", "every=4, fragments=2", "every=4, delay=1"])
def test_what_is_measured_is_the_version_that_servers_hold(pace: str, tmp_path: Path) -> None:
    """Once where it is due; a checkpoint holds just these weights, though a site has others."""
    scores: list[tuple[int, float]] = []
    x, y = small_job().train
    job = small_job(
        train=(x[:96], y[:96]),
        batch_size=16,
        validation=(x[:96], y[:96]),
        metrics={"sum": lambda outputs, batch: float(outputs.sum())},
        evaluate_every=4,
        save_every=4,
        stop=af.Stop(steps=12),
        hooks=[af.on("evaluated", lambda _, e: scores.append((e.step, e.data["metrics"]["sum"])))],
    )
    plan = f"site(2, {pace}, topology=central(servers=2))"
    train_crew_into(tmp_path / "run", job, plan)
    checkpoints, found = Checkpoints(tmp_path / "run" / "checkpoints"), {}
    for step in checkpoints.steps():
        state, _ = read_state(checkpoints, step)
        model = job.model()
        model.load_state_dict(state["models"]["model"])
        with torch.no_grad():
            found[step] = float(model(x[:96]).sum()) / 6  # batches
    assert [step for step, _ in scores if step < 12] == [4, 8]
    assert "not_saved" not in (tmp_path / "run" / "events.jsonl").read_text()
    for step, score in scores:
        assert score == pytest.approx(found[step], rel=1e-6)


def test_a_run_in_fragments_goes_on_from_its_folder_under_any_plan(tmp_path: Path) -> None:
    plan = "site(2, every=4, fragments=2, outer=nesterov, topology=central(servers=2))"
    first = train_crew_into(tmp_path / "run", small_job(stop=af.Stop(steps=6)), plan)
    assert first.result.steps == 6
    told = train_crew_into(tmp_path / "run", small_job(), plan, resume=True)
    assert told.result.steps == 14
    state, _ = read_state(Checkpoints(tmp_path / "run" / "checkpoints"), 14)
    assert set(state["outer"]) == set(told.result.weights)
    after = launch_threads(
        lambda: train_job(small_job(stop=af.Stop(steps=16)), out=tmp_path / "run", resume=True),
        2,
        plan="site(2, every=4, fragments=3)",
    )
    assert after[0].steps == 16


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("site(2, every=6, fragments=3, delay=2, sync=asp)", "below every / fragments, 6 / 3"),
        ("site(2, every=6, fragments=6, delay=1, sync=ssp(1))", "below every / fragments, 6 / 6"),
    ],
)
def test_what_servers_cannot_stagger_is_refused_in_words(text: str, why: str) -> None:
    with pytest.raises(PlanError, match=why) as caught:
        as_plan(text)
    assert as_plan(caught.value.nearest).outer is not None


def test_a_worker_that_was_lost_and_comes_again_begins_with_all_weights_anew() -> None:
    world = SiteWorld(Asp(), seed=3, min=1)
    network, worker = world.network, world.workers[0]
    before: list[int] = []

    def go() -> None:
        if len(worker.seen) < 2:
            network.at(network.now_s + 0.1, go)
            return
        before.extend(worker.seen)
        network.remove(worker.name)
        network.at(network.now_s + 1.0, lambda: network.add(worker.name, worker))

    network.at(0.1, go)
    world.run().check()
    leases = [world.auditor.leases[lease][1] for lease in worker.seen]
    assert [lease.takes for lease in leases[: len(before)]] == [ALL, 0]
    assert leases[len(before)].takes == ALL
