"""Ranks that share a model, each of which talks to the servers for what it has of that."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import pytest
import torch
from crews import run_crew, train_crew
from test_split_served import SERVED, alone, made
from test_training_split import assert_near
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from allfuse.base.errors import PeerLost
from allfuse.job import Stop
from allfuse.launcher import current_world
from allfuse.link.mailroom import Fault, random_faults
from allfuse.roles.blueprint import Blueprint
from allfuse.roles.client import Client
from allfuse.roles.hand import Hand
from allfuse.roles.limbs import name_of, worker_of
from allfuse.roles.messages import (
    SCHEDULER,
    Found,
    Join,
    Lease,
    Message,
    Orders,
    Weights,
    Welcome,
)
from allfuse.roles.server import Server
from allfuse.split.piece import cut_piece, whole_piece
from allfuse.training import outflow
from allfuse.training.apart import Apart
from allfuse.training.leased import LeasedCourse
from allfuse.training.loop import train_job


class Wide(nn.Module):
    """Nearly all of it is cut, and its activations are small."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 2048), nn.ReLU(), nn.Linear(2048, 6)) for _ in range(3)
        )
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        result: Tensor = self.out(x)
        return result


class Meter(TorchDispatchMode):
    """Counts the memory of all tensors that one thread makes, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def peaks_of(plan: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    """What each rank of each group took of memory at most, from when it took part in a run to when
    that was over."""
    found: dict[int, list[int]] = {rank: [] for rank in range(ranks)}
    here = threading.local()
    begin, close_step = Apart.begin, LeasedCourse.close_step

    def begun(self: Apart, *about: Any, **more: Any) -> None:
        here.meter = Meter()
        here.meter.__enter__()
        begin(self, *about, **more)

    def closed(self: LeasedCourse) -> None:
        close_step(self)
        if self.apart.is_over and here.meter is not None:
            here.meter.__exit__(None, None, None)
            found[self.place.rank].append(here.meter.peak)
            here.meter = None

    monkeypatch.setattr(Apart, "begin", begun)
    monkeypatch.setattr(LeasedCourse, "close_step", closed)
    job = made(model=lambda: Wide().double(), stop=Stop(steps=3), clip=None)
    told = train_crew(job, plan)
    assert not [each for each in told.results if isinstance(each, BaseException)]
    return found


@pytest.mark.parametrize(
    "outer",
    ["data(1, topology=central(servers=2))", "site(1, every=2, topology=central(servers=2))"],
)
def test_the_rank_that_speaks_for_a_worker_holds_no_more_than_the_others(
    outer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gathered there it held the whole weights besides, twice or three times."""
    ranks = 4
    peaks = peaks_of(f"{outer} * tensor({ranks})", ranks, monkeypatch)
    whole = sum(p.nbytes for p in Wide().double().parameters())
    first, others = max(peaks[0]), max(max(peaks[rank]) for rank in range(1, ranks))
    assert first < 1.15 * others
    assert first < 7 * whole / ranks  # weights twice, gradients, momentum, an update


class Gate(torch.autograd.Function):
    """Lets gradients through once its rank has pushed something."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pushed: dict[int, threading.Event]) -> Tensor:  # type: ignore[override]
        ctx.pushed = pushed
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        world = current_world()
        assert world is not None
        assert ctx.pushed[world.rank].wait(5.0), "nothing was pushed while backward waited"
        return gradient, None


@pytest.mark.parametrize("split", ["tensor(2)", "shard(2)"])
def test_gradients_leave_each_rank_while_backward_runs(
    split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the last layers are on their way before those of the first are made."""
    pushed, push = {rank: threading.Event() for rank in range(2)}, Hand.push

    def tell(self: Hand, gradients: Any, options: Any, scale: float = 1.0) -> None:
        push(self, gradients, options, scale)
        assert self.client is not None
        pushed[self.client.replica.rank].set()

    monkeypatch.setattr(Hand, "push", tell)
    monkeypatch.setattr(outflow, "CHUNK_BYTES", 1)

    def layers(*sizes: int) -> nn.Module:
        first, hidden, last = sizes
        return nn.Sequential(nn.Linear(first, hidden), nn.ReLU(), nn.Linear(hidden, last))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = layers(6, 16, 8), layers(8, 16, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden: Tensor = Gate.apply(self.first(x), pushed)
            out: Tensor = self.last(hidden)
            return out

    job = made(model=lambda: Net().double(), stop=Stop(steps=1), clip=None)
    plan = f"data(1, topology=central(servers=2), sync=asp) * {split}"
    assert train_crew(job, plan).result.steps == 1
    assert all(event.is_set() for event in pushed.values())


def counted(outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """A mean over some samples only, of which ranks have different numbers."""
    chosen = batch[1] > 0
    losses = torch.nn.functional.cross_entropy(outputs, batch[1], reduction="none")
    return (losses * chosen).sum(), chosen.sum()


@pytest.mark.parametrize("split", ["tensor(2)", "shard(2)"])
def test_a_loss_over_counted_things_comes_to_the_same(
    split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outflow, "CHUNK_BYTES", 1)
    job = made(loss=counted, clip=None, accumulate=2)
    assert_near(train_crew(job, f"{SERVED} * {split}").result.weights, alone(job).weights)


def test_limbs_come_to_the_same_under_lost_doubled_and_late_letters() -> None:
    faults = random_faults(7, drop=0.03, double=0.1, swap=0.1, delay=0.1, delay_s=0.02)
    job = made(stop=Stop(steps=4))
    told = train_crew(job, f"{SERVED} * tensor(2)", faults)
    ends = [result.weights for result in told.results if not result.elsewhere and result.weights]
    assert ends
    for weights in ends:
        assert_near(weights, alone(job).weights)


@pytest.mark.parametrize("lost", range(4))
def test_weights_that_only_another_rank_lost_are_asked_for_again_at_the_end_too(lost: int) -> None:
    """The first rank has all, and there is no more work: it still asks for the other one."""

    def faults(sender: str, receiver: str, kind: str, nth: int) -> Fault:
        is_limb = worker_of(receiver) != receiver
        return Fault(copies=0 if is_limb and kind == "weights" and nth == lost else 1)

    job = made(stop=Stop(steps=1))
    told = train_crew(job, "data(1, topology=central(servers=1)) * tensor(2)", faults)
    assert_near(told.result.weights, alone(job).weights)


def test_weights_that_never_come_to_a_rank_end_the_wait() -> None:
    def faults(sender: str, receiver: str, kind: str, nth: int) -> Fault:
        return Fault(copies=0 if worker_of(receiver) != receiver and kind == "weights" else 1)

    job, plan = made(stop=Stop(steps=1)), "data(1, topology=central(servers=1)) * tensor(2)"
    told = run_crew(lambda: train_job(job), plan, faults, timeout_s=2.0)
    for result in told.results:
        assert isinstance(result, PeerLost)
        assert result.operation == "wait for the weights of a lease"


# Without a network: two clients of one worker, and a server.


def cut_blueprint() -> Blueprint:
    """A matrix of which two ranks have rows, and a vector that both have."""
    parameters = {"matrix": nn.Parameter(torch.ones(4, 3)), "vector": nn.Parameter(torch.ones(5))}
    whole = Blueprint.of_gradients(SGD(parameters.values(), lr=1.0), parameters.items())
    rows = [cut_piece((4, 3), 0, (4,), [run]) for run in ((0, 1), (1, 4))]
    return whole.parted({"matrix": rows, "vector": [whole_piece((5,))] * 2})


def test_a_cut_blueprint_says_once_what_each_rank_has_and_pushes() -> None:
    blueprint = cut_blueprint()
    assert Blueprint.from_plain(blueprint.plain()) == blueprint
    held = {each.name: (each.shape, each.ranks) for each in blueprint.tensors}
    assert held == {
        "matrix:0": ((1, 3), (0,)),
        "matrix:1": ((3, 3), (1,)),
        "vector": ((5,), (0, 1)),
    }
    assert list(blueprint.parts) == ["matrix", "vector"]


def join_of(blueprint: Blueprint) -> Join:
    return Join(
        name="w", host="h", fingerprint="f", steps_per_epoch=1, steps=1, epochs=None,
        blueprint=blueprint.plain(),
    )  # fmt: skip


def pair() -> tuple[Client, Client]:
    """The clients of two ranks of a worker of one server, at place "s"."""
    blueprint = cut_blueprint()
    first, limb = (Client(join_of(blueprint), blueprint, 1, rank=rank) for rank in range(2))
    for client in (first, limb):
        client.replica.load({n: torch.ones_like(t) for n, t in client.replica.tensors.items()})
    first.handle(SCHEDULER, Welcome(number=0, places=["s"], gives_weights=False), 0.0)
    return first, limb


def lease_of(number: int, sequence: int) -> Lease:
    return Lease(
        lease=number, clock=number, sequence=sequence, first_step=0, steps=1, part=0, parts=1,
        done=0, due=[],
    )  # fmt: skip


def weights_for(client: Client, sequence: int, value: float) -> list[Weights]:
    """What a server sends a rank."""
    (pieces,) = client.replica.shards
    return [
        Weights(
            sequence=sequence, piece=number, pieces=len(pieces),
            tensors=tuple(torch.full((span.elements,), value) for span in piece),
        )
        for number, piece in enumerate(pieces)
        if client.replica.rank in piece.ranks
    ]  # fmt: skip


def test_each_rank_has_memory_for_what_it_has_and_pushes_what_is_its_to_push() -> None:
    first, limb = pair()
    assert set(first.replica.tensors) == {"matrix:0", "vector"}
    assert set(limb.replica.tensors) == {"matrix:1", "vector"}
    assert set(first.updates.sheet.tensors) == {"matrix:0", "vector"}
    assert set(limb.updates.sheet.tensors) == {"matrix:1"}


def test_a_limb_begins_what_the_first_rank_was_told_with_weights_of_that_version() -> None:
    first, limb = pair()
    limb.follow(first.heard, lease_of(0, 3), -1, 0.0)
    for message in weights_for(limb, 3, 2.0):
        assert not limb.is_ready
        limb.handle("s", message, 0.0)
    assert limb.is_ready
    limb.hold()
    for message in weights_for(limb, 4, 9.0):  # somebody asked again meanwhile
        limb.handle("s", message, 0.0)
    limb.begin(0.0)
    assert all(bool((value == 2.0).all()) for value in limb.replica.tensors.values())


def test_a_limb_that_held_on_in_vain_takes_newer_weights() -> None:
    first, limb = pair()
    limb.follow(first.heard, lease_of(0, 3), -1, 0.0)
    for message in weights_for(limb, 3, 2.0):
        limb.handle("s", message, 0.0)
    limb.hold()
    for message in weights_for(limb, 4, 9.0):
        limb.handle("s", message, 0.0)
    limb.release()
    assert not limb.is_ready
    limb.follow([], lease_of(0, 4), -1, 0.0)
    assert limb.is_ready


def test_a_server_holds_an_update_once_all_ranks_brought_theirs_and_tells_who_speaks() -> None:
    blueprint = cut_blueprint()
    first, limb = pair()
    server = Server(0, 1, birth=7, place="s")

    server.handle(SCHEDULER, Found(blueprint=blueprint.plain(), servers=1, sequence=-1), 0.0)
    names = {0: name_of("w", 0), 1: name_of("w", 1)}
    assert [worker_of(name) for name in names.values()] == ["w", "w"]

    def carry(client: Client, mail: list[tuple[str, Message]]) -> list[tuple[str, Message]]:
        return [
            told
            for to, message in mail
            if to == "s"
            for told in server.handle(names[client.replica.rank], message, 0.0)
        ]

    gives = Welcome(number=0, places=["s"], gives_weights=True)
    for client in (first, limb):
        for place, given in client.handle(SCHEDULER, gives, 0.0):
            assert place == "s"
            for name, told in server.handle(names[client.replica.rank], given, 0.0):
                for _, piece in client.handle("s", told, 0.0):
                    server.handle(name, piece, 0.0)
    order = Orders(first=0, entries=[[[], ["w"], [], False]])
    sent = [(to, m) for to, m in server.handle(SCHEDULER, order, 0.0) if isinstance(m, Weights)]
    assert {to for to, _ in sent} == set(names.values())
    for client in (first, limb):
        client.follow([], lease_of(0, 0), -1, 0.0)
        for to, message in sent:
            if to == names[client.replica.rank]:
                client.handle("s", message, 0.0)
        client.begin(0.0)
    done: dict[str, Any] = {"loss": 1.0, "count": 1.0, "rows": 1, "seconds": 0.1}
    ones = {name: torch.ones_like(t) for name, t in first.updates.sheet.tensors.items()}
    told = carry(first, [*first.push(ones, 0.0), *first.finish(0.0, **done)])
    assert not told  # the limb's rows are missing
    ones = {name: torch.ones_like(t) for name, t in limb.updates.sheet.tensors.items()}
    told = carry(limb, [*limb.push(ones, 0.0), *limb.finish(0.0, **done)])
    assert {to for to, _ in told} == set(names.values())
