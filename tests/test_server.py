"""A server and the worker's side of it: what is staged, ordered, sent and written to disk.

The scheduler is played by hand; tests/test_roles.py has the real one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from allfuse.base.errors import AllfuseError, CheckpointError
from allfuse.link.post import Malformed
from allfuse.roles import cutting
from allfuse.roles.blueprint import Blueprint
from allfuse.roles.client import Client
from allfuse.roles.elementwise import PER_ELEMENT
from allfuse.roles.messages import (
    SCHEDULER,
    Again,
    Applied,
    Ask,
    Finished,
    Found,
    Give,
    Join,
    Lease,
    Mail,
    Message,
    Orders,
    Push,
    Refused,
    Repush,
    Serve,
    Staged,
    Weights,
    Welcome,
    open_letter,
)
from allfuse.roles.pool import Pool
from allfuse.roles.server import Server
from allfuse.roles.shard import Shard
from allfuse.roles.snapshots import KEPT, Snapshots
from allfuse.roles.stage import Numbers


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 bytes, so that small models come in many."""
    whole = cutting.cut_pieces
    monkeypatch.setattr(cutting, "cut_pieces", lambda blocks, spans: whole(blocks, spans, 100))


class Net(nn.Module):
    """Odd sizes, a 0-d and an empty parameter, and a buffer."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(7, 5).to(dtype))
        self.b = nn.Parameter(torch.randn(13).to(dtype))
        self.c = nn.Parameter(torch.tensor(0.5, dtype=dtype))
        self.d = nn.Parameter(torch.empty(0, 3, dtype=dtype))
        self.register_buffer("mean", torch.zeros(3, dtype=dtype))


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net(dtype)


def draw(model: nn.Module, seed: int) -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=chance).to(p.dtype)
        for name, p in model.named_parameters()
    }


Make = Callable[[Any], torch.optim.Optimizer]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


class Rig:
    """Servers and workers; what they say arrives at once, except what the scheduler is told."""

    def __init__(
        self,
        servers: int = 2,
        workers: int = 1,
        *,
        make: Make = sgd,
        dtype: torch.dtype = torch.float32,
        codec: str = "identity",
        folder: Path | None = None,
    ) -> None:
        self.model, self.folder = net(dtype), folder
        self.blueprint = Blueprint.of_gradients(
            make(self.model.parameters()),
            self.model.named_parameters(),
            self.model.named_buffers(),
            codec=codec,
        )
        self.told: list[tuple[str, Message]] = []
        self.servers = {
            f"s{index}": Server(index, servers, birth=index, place=f"s{index}", folder=folder)
            for index in range(servers)
        }
        self.clients: dict[str, Client] = {}
        self.lose: Callable[[str, str, Message], bool] = lambda to, sender, message: False
        for number in range(workers):
            self.join(f"w{number}")
        self.sequence = -1

    def join(self, name: str) -> Client:
        plain = self.blueprint.plain()
        join = Join(
            name=name, host="h", fingerprint="f", steps_per_epoch=9, steps=None, epochs=1,
            blueprint=plain,
        )  # fmt: skip
        client = Client(join, self.blueprint, len(self.servers))
        client.replica.load({**dict(self.model.named_parameters()), "mean": self.model.mean})
        self.clients[name] = client
        return client

    def find(self) -> None:
        plain = self.blueprint.plain()
        found = Found(blueprint=plain, servers=len(self.servers), sequence=self.sequence)
        for name in self.servers:
            self.tell(name, found)

    def start(self) -> None:
        """All weights are given by the first worker and read by all."""
        self.find()
        for number, (name, client) in enumerate(self.clients.items()):
            self.post(name, client.tick(0.0))
            places = list(self.servers)
            self.tell(name, Welcome(number=number, places=places, gives_weights=number == 0))
        self.order([], to=list(self.clients))

    def tell(self, to: str, message: Message) -> None:
        """The scheduler says something."""
        self.deliver(to, SCHEDULER, message)

    def post(self, sender: str, mail: list[Mail]) -> None:
        for to, message in mail:
            self.deliver(to, sender, message)

    def deliver(self, to: str, sender: str, message: Message) -> None:
        if self.lose(to, sender, message):
            return
        if to == SCHEDULER:
            self.told.append((sender, message))
            return
        machine: Any = self.servers.get(to) or self.clients[to]
        self.post(to, machine.handle(sender, open_letter(message.letter()), 0.0))

    def order(
        self,
        leases: list[list[Any]],
        to: Sequence[str] = (),
        save: bool = False,
    ) -> None:
        self.sequence += 1
        entry = [leases, list(to), [], save]
        for name in self.servers:
            self.tell(name, Orders(first=self.sequence, entries=[entry]))

    def lease(self, worker: str, number: int, sequence: int | None = None, clock: int = -1) -> None:
        message = Lease(
            lease=number, clock=number if clock < 0 else clock, first_step=0, steps=1, part=0,
            parts=1, sequence=self.sequence if sequence is None else sequence, done=0,
        )  # fmt: skip
        self.tell(worker, message)

    def work(self, worker: str, gradients: dict[str, Tensor], count: float = 1.0) -> None:
        """One update, its gradients from the last to the first."""
        client = self.clients[worker]
        client.begin(0.0)
        for name in reversed(list(gradients)):
            self.post(worker, client.push({name: gradients[name]}, 0.0))
        self.post(worker, client.finish(0.0, loss=1.0, count=count, rows=1, seconds=0.1))

    def cycle(self, number: int, gradients: dict[str, Tensor], worker: str = "w0") -> None:
        """A lease from begin to end, applied by itself."""
        self.lease(worker, number)
        self.work(worker, gradients)
        self.order([[number, 1.0]], to=[worker])

    def weights(self) -> dict[str, Tensor]:
        """What servers hold, put together by name."""
        flats = [torch.zeros(b.elements, dtype=b.dtype) for b in self.blueprint.blocks]
        for server in self.servers.values():
            assert server.shard is not None
            for number, piece in enumerate(server.shard.pieces):
                for span, values in zip(piece, server.shard.read(number), strict=True):
                    flats[span.block][span.start : span.stop] = values
        return cutting.view_all(self.blueprint.blocks, flats)

    def finished(self) -> list[Finished]:
        return [message for _, message in self.told if isinstance(message, Finished)]


def plain_steps(
    make: Make, steps: list[dict[str, Tensor]], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    model = net(dtype)
    optimizer = make(model.parameters())
    for gradients in steps:
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


MAKES: dict[str, Make] = {
    "sgd": sgd,
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "groups": lambda p: torch.optim.AdamW(
        [{"params": (whole := list(p))[:2], "weight_decay": 0.1}, {"params": whole[2:], "lr": 0.02}]
    ),
}


@pytest.mark.parametrize("servers", [1, 2, 3, 5, 53])  # 49 numbers
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_updates_through_servers_are_those_of_a_plain_loop(servers: int, make: Make) -> None:
    rig = Rig(servers, make=make, dtype=torch.float64)
    steps = [draw(rig.model, step) for step in range(4)]
    rig.start()
    for number, gradients in enumerate(steps):
        rig.cycle(number, gradients)
    expected = plain_steps(make, steps, torch.float64)
    client = rig.clients["w0"]
    for name, values in expected.items():
        torch.testing.assert_close(rig.weights()[name], values, rtol=1e-12, atol=1e-12)
        assert torch.equal(client.replica.tensors[name], rig.weights()[name])
    assert [finished.lease for finished in rig.finished()] == [-1, 0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_shorter_types_come_to_the_same_within_their_rounding(dtype: torch.dtype) -> None:
    rig = Rig(3, dtype=dtype)
    steps = [draw(rig.model, step) for step in range(3)]
    rig.start()
    for number, gradients in enumerate(steps):
        rig.cycle(number, gradients)
    near = 8 * torch.finfo(dtype).eps
    for name, values in plain_steps(sgd, steps, dtype).items():
        torch.testing.assert_close(rig.weights()[name], values, rtol=near, atol=near)


def test_several_leases_of_one_order_count_by_their_weights() -> None:
    rig = Rig(2, workers=3, dtype=torch.float64)
    rig.start()
    drawn = [draw(rig.model, number) for number in range(3)]
    for number, name in enumerate(rig.clients):
        rig.lease(name, number, sequence=0)
        rig.work(name, drawn[number])
    rig.order([[2, 0.5], [0, 0.25], [1, 0.25]], to=["w1"])
    mean = {
        name: 0.5 * drawn[2][name] + 0.25 * drawn[0][name] + 0.25 * drawn[1][name]
        for name in drawn[0]
    }
    for name, values in plain_steps(sgd, [mean], torch.float64).items():
        torch.testing.assert_close(rig.weights()[name], values, rtol=1e-12, atol=1e-12)


def test_a_schedule_of_the_learning_rate_travels_with_the_updates() -> None:
    rig = Rig(2, dtype=torch.float64)
    model = net(torch.float64)
    optimizer = sgd(model.parameters())
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    rig.start()
    for number in range(3):
        gradients = draw(model, number)
        rig.clients["w0"].options = rig.blueprint.changed_options(optimizer)
        rig.cycle(number, gradients)
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
        optimizer.step()
        schedule.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(rig.weights()[name], parameter.detach(), rtol=1e-12, atol=1e-12)


def test_a_gradient_that_never_comes_is_zero() -> None:
    rig = Rig(2)
    rig.start()
    gradients = draw(rig.model, 0)
    rig.lease("w0", 0)
    rig.work("w0", {"b": gradients["b"]})
    rig.order([[0, 1.0]])
    assert torch.equal(rig.weights()["a"], rig.model.a)
    assert not torch.equal(rig.weights()["b"], rig.model.b)


def test_buffers_become_the_mean_of_what_workers_made_of_them() -> None:
    rig = Rig(3, workers=2)
    rig.start()
    for number, (name, client) in enumerate(rig.clients.items()):
        rig.lease(name, number, sequence=0)
        client.begin(0.0)
        client.replica.tensors["mean"].fill_(number + 1.0)
        rig.post(name, client.finish(0.0, loss=1.0, count=1.0, rows=1, seconds=0.0))
    rig.order([[0, 0.25], [1, 0.75]], to=["w0", "w1"])
    for number, (name, client) in enumerate(rig.clients.items(), 2):
        rig.lease(name, number)
        client.begin(0.0)
        assert client.replica.tensors["mean"].tolist() == [1.75] * 3


def site_blueprint(model: nn.Module, options: dict[str, Any]) -> Blueprint:
    return Blueprint.of_changes(model.named_parameters(), model.named_buffers(), options=options)


def test_changes_of_sites_are_averaged_and_stepped_by_the_outer_optimizer() -> None:
    rig = Rig(2, workers=2, dtype=torch.float64)
    rig.blueprint = site_blueprint(rig.model, {"lr": 0.7, "momentum": 0.9, "nesterov": True})
    rig.clients.clear()
    rig.join("w0")
    rig.join("w1")
    rig.start()
    outer = net(torch.float64)
    optimizer = torch.optim.SGD(outer.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    lease = 0
    for clock in range(3):
        for name, client in rig.clients.items():
            rig.lease(name, lease, sequence=rig.sequence, clock=clock)
            client.begin(0.0)
            for key, change in draw(rig.model, lease).items():
                client.replica.tensors[key].sub_(change)
            rig.post(name, client.finish(0.0, loss=1.0, count=1.0, rows=1, seconds=0.0))
            lease += 1
        rig.order([[lease - 2, 0.5], [lease - 1, 0.5]], to=["w0", "w1"])
        both = draw(rig.model, lease - 2), draw(rig.model, lease - 1)
        for name, parameter in outer.named_parameters():
            parameter.grad = (both[0][name] + both[1][name]) / 2
        optimizer.step()
    for name, parameter in outer.named_parameters():
        torch.testing.assert_close(rig.weights()[name], parameter.detach(), rtol=1e-9, atol=1e-9)


# Exactly once.


def test_orders_are_carried_out_once_each_and_in_turn() -> None:
    rig = Rig(1)
    rig.start()
    rig.lease("w0", 0)
    rig.work("w0", draw(rig.model, 0))
    server = rig.servers["s0"]
    late = Orders(first=2, entries=[[[], [], [], False]])
    rig.tell("s0", late)
    assert server.applied == 0
    now = Orders(first=1, entries=[[[[0, 1.0]], [], [], False]])
    rig.tell("s0", now)
    once = {name: values.clone() for name, values in rig.weights().items()}
    rig.tell("s0", now)
    rig.tell("s0", Orders(first=0, entries=[[[], [], [], False], [[[0, 1.0]], [], [], False]]))
    assert server.applied == 1
    assert all(torch.equal(rig.weights()[name], values) for name, values in once.items())
    applied = [message.sequence for _, message in rig.told if isinstance(message, Applied)]
    assert applied == [0, 0, 1, 1, 1]


def test_pieces_that_come_twice_or_after_their_order_change_nothing() -> None:
    rig = Rig(2)
    pushes: list[tuple[str, str, Message]] = []

    def note(to: str, sender: str, message: Message) -> bool:
        if isinstance(message, Push):
            pushes.append((to, sender, message))
        return False

    rig.lose = note
    rig.start()
    rig.cycle(0, draw(rig.model, 0))
    for to, sender, message in [*pushes, *reversed(pushes)]:
        rig.deliver(to, sender, message)
    zeros = {name: torch.zeros_like(p) for name, p in rig.model.named_parameters()}
    rig.cycle(1, zeros)
    once = plain_steps(sgd, [draw(rig.model, 0), zeros])
    for name, values in once.items():
        torch.testing.assert_close(rig.weights()[name], values)


def test_an_order_of_what_is_not_held_stops_the_server_and_says_why() -> None:
    rig = Rig(1)
    rig.start()
    with pytest.raises(AllfuseError, match="apply lease 5 at sequence 1, which it does not hold"):
        rig.order([[5, 1.0]])
    assert rig.servers["s0"].applied == 0


def test_a_dropped_lease_is_never_taken_again() -> None:
    rig = Rig(1)
    rig.start()
    rig.lease("w0", 0)
    rig.work("w0", draw(rig.model, 0))
    for name in rig.servers:
        rig.tell(name, Orders(first=1, entries=[[[], [], [0], False]]))
    with pytest.raises(AllfuseError, match="does not hold"):
        rig.tell("s0", Orders(first=2, entries=[[[[0, 1.0]], [], [], False]]))


def test_weights_on_their_way_are_of_their_version_while_servers_go_on() -> None:
    rig = Rig(2)
    held: list[tuple[str, str, Message]] = []
    rig.start()
    rig.lose = lambda to, sender, message: (
        isinstance(message, Weights) and held.append((to, sender, message)) is None
    )
    rig.order([], to=["w0"])
    values = {id(message): [t.clone() for t in message.tensors] for _, _, message in held}
    rig.lease("w0", 0, sequence=0)
    rig.work("w0", draw(rig.model, 0))
    rig.order([[0, 1.0]])
    assert not torch.equal(rig.weights()["a"], rig.model.a)
    for _, _, message in held:
        assert all(map(torch.equal, message.tensors, values[id(message)]))


def test_a_step_copies_only_what_somebody_still_reads() -> None:
    rig = Rig(1, make=MAKES["adam"])
    shard = Shard(rig.blueprint, 0, 1)
    drawn = [tuple(torch.ones(span.elements) for span in piece) for piece in shard.pieces]

    def step() -> tuple[int, int]:
        shard.update(0, [(1.0, drawn[0])], [])
        captured = shard.capture(0)
        return captured["0/weights"].data_ptr(), captured["0/state/exp_avg"].data_ptr()

    assert step() == step()
    held = shard.capture(0)
    before = {name: tensor.clone() for name, tensor in held.items()}
    places = step()
    assert places[0] != held["0/weights"].data_ptr()
    assert places[1] != held["0/state/exp_avg"].data_ptr()
    assert all(torch.equal(held[name], before[name]) for name in before)
    assert step() == places


def test_memory_is_used_again_once_nobody_reads_it() -> None:
    pool = Pool(10, torch.float32)
    first = pool.take()
    place, read = first.data_ptr(), memoryview(first.numpy())
    del first
    other = pool.take()
    assert other.data_ptr() != place
    read.release()
    del read
    assert pool.take().data_ptr() == place


# What gets lost is said again.


def test_a_worker_sends_again_only_what_a_server_lacks() -> None:
    rig = Rig(2)
    rig.start()
    lost: list[Message] = []
    sent: list[Message] = []

    def lose(to: str, sender: str, message: Message) -> bool:
        if isinstance(message, Push):
            sent.append(message)
            if to == "s1" and message.piece == 1 and not lost:
                lost.append(message)
                return True
        return False

    rig.lose = lose
    rig.lease("w0", 0)
    rig.work("w0", draw(rig.model, 0))
    assert [finished.lease for finished in rig.finished()] == [-1]
    count = len(sent)
    rig.post("w0", rig.clients["w0"].tick(1.5))
    assert sent[count:] == lost
    assert rig.finished()[-1].lease == 0


def test_whoever_hears_nothing_says_its_last_message_again_ever_more_rarely() -> None:
    rig = Rig(1)
    client = rig.clients["w0"]
    said = [now / 10 for now in range(400) if client.tick(now / 10)]
    assert said == [0.0, 1.0, 3.0, 7.0, 15.0, 23.0, 31.0, 39.0]


def test_weights_that_do_not_come_are_asked_for() -> None:
    rig = Rig(2)
    rig.start()
    rig.lose = lambda to, sender, message: isinstance(message, Weights) and message.piece == 0
    rig.cycle(0, draw(rig.model, 0))
    rig.lease("w0", 1)
    client = rig.clients["w0"]
    assert not client.is_ready
    asked = [message for _, message in client.tick(1.5)]
    assert asked == [Again(lease=1, sequence=1), Again()]
    rig.lose = lambda to, sender, message: False
    rig.order([], to=["w0"])
    assert not client.is_ready
    rig.lease("w0", 1)
    assert client.is_ready
    assert torch.equal(client.replica.tensors["a"], rig.weights()["a"])


def test_a_worker_works_from_the_newest_version_alone() -> None:
    rig = Rig(2)
    rig.start()
    held: list[tuple[str, str, Message]] = []
    rig.lose = lambda to, sender, message: (
        isinstance(message, Weights) and held.append((to, sender, message)) is None
    )
    rig.cycle(0, draw(rig.model, 0))
    rig.lease("w0", 1)
    rig.order([], to=["w0"])
    rig.lease("w0", 1)
    rig.lose = lambda to, sender, message: False
    for each in reversed(held):  # the newer version comes first
        rig.deliver(*each)
    client = rig.clients["w0"]
    assert client.is_ready
    assert client.replica.sequence == 2


def test_weights_that_come_while_one_works_wait() -> None:
    rig = Rig(1, workers=2)
    rig.start()
    rig.lease("w0", 0)
    rig.lease("w1", 1)
    client = rig.clients["w1"]
    client.begin(0.0)
    before = client.replica.tensors["a"].clone()
    rig.work("w0", draw(rig.model, 0))
    rig.order([[0, 1.0]], to=["w1"])
    assert torch.equal(client.replica.tensors["a"], before)
    rig.lease("w1", 2)  # the first was revoked
    assert torch.equal(client.replica.tensors["a"], rig.weights()["a"])


def test_what_is_pushed_for_a_revoked_lease_goes_nowhere() -> None:
    rig = Rig(2)
    rig.start()
    client = rig.clients["w0"]
    rig.lease("w0", 0)
    client.begin(0.0)
    rig.post("w0", client.push({"a": torch.ones(7, 5)}, 0.0))
    rig.lease("w0", 1)
    assert not client.is_working
    assert client.push({"b": torch.ones(13)}, 0.0) == []
    assert client.finish(0.0, loss=0.0, count=1.0, rows=1, seconds=0.0) == []
    assert client.is_ready
    rig.work("w0", draw(rig.model, 0))
    rig.order([[1, 1.0]])
    for name, values in plain_steps(sgd, [draw(rig.model, 0)]).items():
        torch.testing.assert_close(rig.weights()[name], values)


def test_a_lease_of_the_version_that_is_held_begins_from_it_again() -> None:
    rig = Rig(2)
    rig.blueprint = site_blueprint(rig.model, {"lr": 1.0})
    rig.join("w0")
    rig.start()
    client = rig.clients["w0"]
    for number in range(2):
        rig.lease("w0", number, sequence=0, clock=0)
        client.begin(0.0)
        assert torch.equal(client.replica.tensors["a"], rig.model.a)
        client.replica.tensors["a"].sub_(number + 1.0)
        rig.post("w0", client.finish(0.0, loss=0.0, count=1.0, rows=1, seconds=0.0))
    rig.order([[0, 0.5], [1, 0.5]])
    torch.testing.assert_close(rig.weights()["a"], rig.model.a - 1.5)


def test_weights_are_given_again_by_another_where_the_giver_dies() -> None:
    rig = Rig(2, workers=2)
    rig.find()
    other = rig.clients["w1"]
    other.replica.load({name: t + 1 for name, t in other.replica.tensors.items()})
    for number, (name, client) in enumerate(rig.clients.items()):
        rig.post(name, client.tick(0.0))
        rig.lose = lambda to, sender, message: (
            sender == "w0" and to == "s1" and isinstance(message, Give) and message.piece > 0
        )
        rig.tell(name, Welcome(number=number, places=["s0", "s1"], gives_weights=True))
    assert [sender for sender, message in rig.told if isinstance(message, Finished)] == ["w1"]
    rig.lose = lambda to, sender, message: False
    rig.order([], to=["w1"])
    rig.post("w0", rig.clients["w0"].tick(9.0))  # what the dead one said may still be on its way
    torch.testing.assert_close(rig.weights()["a"], rig.model.a.detach() + 1)
    torch.testing.assert_close(rig.weights()["d"], rig.model.d.detach())


# Servers that die.


def test_a_server_restored_from_its_snapshot_goes_on_from_there(tmp_path: Path) -> None:
    rig = Rig(2, make=MAKES["adam"], folder=tmp_path)
    rig.start()
    rig.lease("w0", 0)
    rig.work("w0", draw(rig.model, 0))
    rig.order([[0, 1.0]], to=["w0"], save=True)
    assert [m.saved for _, m in rig.told if isinstance(m, Applied)][-2:] == [1, 1]
    rig.cycle(1, draw(rig.model, 1))
    rig.lease("w0", 2)
    rig.work("w0", draw(rig.model, 2))
    fresh = rig.servers["s1"] = Server(1, 2, birth=77, place="s1", folder=tmp_path)
    ((_, serve),) = fresh.tick(0.0)
    assert serve == Serve(index=1, birth=77, applied=1, place="s1")
    rig.find()  # as of sequence 2: one update is lost
    assert fresh.applied == 2
    rig.tell("w0", Repush(lease=2, places=["s0", "s1"]))
    assert rig.finished()[-1].births == [0, 77]
    rig.order([[2, 1.0]], to=["w0"])
    whole = plain_steps(MAKES["adam"], [draw(rig.model, number) for number in range(3)])
    missed = plain_steps(MAKES["adam"], [draw(rig.model, number) for number in (0, 2)])
    flat = [torch.cat([each[n].reshape(-1) for n in "abcd"]) for each in (whole, missed)]
    (half,) = {shard[0].stop for shard in cutting.cut_shards(rig.blueprint.blocks, 2)[:1]}
    weights = torch.cat([rig.weights()[n].reshape(-1) for n in "abcd"])
    torch.testing.assert_close(weights[:half], flat[0][:half])
    torch.testing.assert_close(weights[half:], flat[1][half:])


def test_a_server_without_a_snapshot_is_given_the_newest_weights_of_a_worker() -> None:
    rig = Rig(2)
    rig.start()
    rig.cycle(0, draw(rig.model, 0))
    before = {name: values.clone() for name, values in rig.weights().items()}
    rig.lease("w0", 1)
    rig.clients["w0"].begin(0.0)
    fresh = rig.servers["s1"] = Server(1, 2, birth=77, place="s1")
    assert fresh.tick(0.0)[0][1].applied == -1  # type: ignore[attr-defined]
    rig.find()
    rig.tell("w0", Welcome(number=0, places=["s0", "s1"], gives_weights=True))
    assert fresh.applied == 1
    assert rig.finished()[-1].births == [0, 77]
    for name, values in before.items():
        assert torch.equal(rig.weights()[name], values)


def test_a_job_that_starts_again_takes_the_snapshot_that_all_servers_have(tmp_path: Path) -> None:
    rig = Rig(1, folder=tmp_path)
    rig.start()
    at: list[Tensor] = []
    for number in range(3):
        rig.lease("w0", number)
        rig.work("w0", draw(rig.model, number))
        rig.order([[number, 1.0]], to=["w0"], save=True)
        at.append(rig.weights()["a"].clone())
    server = rig.servers["s0"] = Server(0, 1, birth=5, place="s0", folder=tmp_path)
    assert server.applied == 3
    rig.tell("s0", Refused(reason="the others are of 2"))
    assert server.applied == 2
    rig.sequence = 2
    rig.find()
    assert torch.equal(rig.weights()["a"], at[1])
    assert Snapshots(tmp_path, 0, 1).all() == [1, 2]
    rig.servers["s0"] = Server(0, 1, birth=6, place="s0", folder=tmp_path)
    for _ in range(2):
        rig.tell("s0", Refused(reason="of another job"))
    assert rig.servers["s0"].refusal == "of another job"
    assert rig.servers["s0"].tick(0.0) == []


@pytest.mark.parametrize("name", PER_ELEMENT)
def test_the_state_of_every_optimizer_survives_a_snapshot(name: str, tmp_path: Path) -> None:
    model = net()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1)
    blueprint = Blueprint.of_gradients(optimizer, model.named_parameters())
    shards = [Shard(blueprint, 1, 2), Shard(blueprint, 1, 2)]
    chance = torch.Generator().manual_seed(0)

    def step(shard: Shard, drawn: list[Tensor]) -> None:
        for number, values in enumerate(drawn):
            shard.update(number, [(1.0, (values,))], [])

    snapshots = Snapshots(tmp_path, 1, 2)
    for number in range(4):
        sizes = [piece[0].elements for piece in shards[0].pieces]
        drawn = [torch.randn(size, generator=chance) for size in sizes]
        step(shards[0], drawn)
        if number == 1:
            snapshots.save(shards[0], 7)
            snapshots.load(shards[1], 7)
        if number > 1:
            step(shards[1], drawn)
    for piece in range(len(shards[0].pieces)):
        first, second = (shard.capture(piece) for shard in shards)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


class Later(Executor):
    """Does what it is given when it is told to."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = []

    def submit(self, work: Callable[..., Any], /, *args: Any) -> Future[Any]:  # type: ignore[override]
        self.waiting.append((Future(), work, args))
        return self.waiting[-1][0]

    def work(self) -> None:
        for future, work, args in self.waiting:
            try:
                future.set_result(work(*args))
            except CheckpointError as error:
                future.set_exception(error)
        self.waiting.clear()


def test_a_snapshot_is_of_its_sequence_though_the_server_goes_on(tmp_path: Path) -> None:
    rig = Rig(1, make=MAKES["adam"])
    later = Later()
    server = rig.servers["s0"]
    server.snapshots = Snapshots(tmp_path, 0, 1, later)
    rig.start()
    rig.cycle(0, draw(rig.model, 0))
    weights = {name: values.clone() for name, values in rig.weights().items()}
    rig.order([], to=["w0"], save=True)
    rig.cycle(1, draw(rig.model, 1))
    assert server.saved == -1
    rig.told.clear()
    later.work()
    rig.post("s0", server.tick(0.0))
    assert ("s0", Applied(sequence=3, saved=2)) in rig.told
    rig.servers["s0"] = Server(0, 1, birth=5, place="s0", folder=tmp_path)
    rig.find()
    for name, values in weights.items():
        assert torch.equal(rig.weights()[name], values)


def test_a_snapshot_that_cannot_be_written_is_told_and_the_next_one_tried(tmp_path: Path) -> None:
    rig = Rig(1)
    later = Later()
    server = rig.servers["s0"]
    server.snapshots = Snapshots(tmp_path / "servers", 0, 1, later)
    rig.start()
    rig.order([], save=True)
    (tmp_path / "servers").touch()
    later.work()
    ((_, told), *_) = server.tick(0.0)
    assert isinstance(told, Applied)
    assert (told.saved, told.failed) == (-1, 1)
    assert "servers" in told.reason
    (tmp_path / "servers").unlink()
    rig.order([], save=True)
    later.work()
    ((_, told), *_) = server.tick(9.0)
    assert isinstance(told, Applied)
    assert told.saved == 2


def test_old_snapshots_are_removed_and_those_of_other_models_refused(tmp_path: Path) -> None:
    rig = Rig(1)
    snapshots = Snapshots(tmp_path, 0, 1)
    shard = Shard(rig.blueprint, 0, 1)
    for sequence in range(1, 6):
        snapshots.save(shard, sequence)
    assert snapshots.all() == [3, 4, 5]
    assert len(list(tmp_path.iterdir())) == KEPT
    other = Shard(Rig(1, make=MAKES["adam"]).blueprint, 0, 1)
    with pytest.raises(CheckpointError, match="not the shard of this model"):
        snapshots.load(other, 5)
    snapshots.path(5).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        snapshots.load(shard, 5)


# Codecs, both ways.


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4", "topk(0.1)", "sign"])
def test_what_a_codec_loses_of_updates_comes_later(codec: str) -> None:
    """The sum of what was applied and what is left is the sum of all gradients."""
    rig = Rig(2, make=lambda p: torch.optim.SGD(p, lr=1.0), dtype=torch.float64, codec=codec)
    rig.start()
    total = {name: torch.zeros_like(p) for name, p in rig.model.named_parameters()}
    for number in range(6):
        gradients = draw(rig.model, number)
        rig.cycle(number, gradients)
        for name, values in gradients.items():
            total[name] += values
    rig.lease("w0", 6)
    residuals = rig.clients["w0"].updates.residuals
    for name, values in total.items():
        moved = rig.model.get_parameter(name).detach() - rig.weights()[name]
        torch.testing.assert_close(moved + residuals[name], values, rtol=1e-9, atol=1e-9)
    assert any(bool(residuals[name].any()) for name in total)


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4", "topk(0.1)", "sign"])
def test_what_a_codec_loses_of_weights_comes_later(codec: str) -> None:
    rig = Rig(2, make=MAKES["adam"], codec=codec)
    bases: list[int] = []

    def note(to: str, sender: str, message: Message) -> bool:
        if isinstance(message, Weights):
            bases.append(message.base)
        return False

    rig.lose = note
    rig.start()
    for number in range(4):
        rig.cycle(number, draw(rig.model, number))
    client = rig.clients["w0"]
    client.options = [{"lr": 0.0}, {}]
    apart = []
    for number in range(4, 60):
        rig.cycle(number, {})
        gaps = [client.replica.tensors[n] - w for n, w in rig.weights().items() if n != "d"]
        apart.append(max(float(gap.abs().max()) for gap in gaps))
    assert apart[0] > 0
    assert apart[-1] < 1e-3 * apart[0] or apart[-1] < 1e-6
    assert max(bases[-4:]) > 0  # they were differences


def test_differences_are_sent_only_to_what_a_worker_is_known_to_hold() -> None:
    rig = Rig(1, codec="int8")
    bases: list[int] = []
    rig.lose = lambda to, sender, message: (
        isinstance(message, Weights) and bases.append(message.base) is None and lossy
    )
    lossy = False
    rig.start()
    rig.cycle(0, draw(rig.model, 0))
    assert set(bases) == {-1, 0}
    bases.clear()
    lossy = True
    rig.cycle(1, draw(rig.model, 1))  # the weights of sequence 2 are lost
    assert set(bases) == {1}
    bases.clear()
    lossy = False
    rig.lease("w0", 2)
    rig.order([], to=["w0"])
    assert set(bases) == {-1}
    rig.lease("w0", 2)
    for name, values in rig.weights().items():
        assert torch.equal(rig.clients["w0"].replica.tensors[name], values)


def test_workers_in_step_share_messages_and_hold_the_same() -> None:
    rig = Rig(1, workers=2, codec="int8")
    found: list[Weights] = []
    rig.start()
    for clock in range(3):
        for number, name in enumerate(rig.clients):
            rig.lease(name, 2 * clock + number, sequence=rig.sequence)
            rig.work(name, draw(rig.model, number))
        rig.lose = lambda to, sender, message: (
            isinstance(message, Weights) and found.append(message) is not None
        )
        rig.order([[2 * clock, 0.5], [2 * clock + 1, 0.5]], to=["w0", "w1"])
        first, second = (client.replica.tensors for client in rig.clients.values())
        assert all(torch.equal(first[name], second[name]) for name in first)
    addresses = {tensor.data_ptr() for message in found[-2:] for tensor in message.tensors}
    assert len(addresses) == len(found[-1].tensors)


def test_what_a_revoked_update_would_have_lost_is_not_kept() -> None:
    rig = Rig(1, codec="int8")
    rig.start()
    client = rig.clients["w0"]
    rig.lease("w0", 0)
    client.begin(0.0)
    client.push(draw(rig.model, 0), 0.0)
    rig.lease("w0", 1)
    assert not any(bool(left.any()) for left in client.updates.residuals.values())


# What is wrong changes nothing.


def bad_pushes() -> dict[str, dict[str, Any]]:
    tensors = (torch.zeros(25),)
    return {
        "another type": {"tensors": (torch.zeros(25, dtype=torch.float64),)},
        "another size": {"tensors": (torch.zeros(24),)},
        "another shape": {"tensors": (torch.zeros(5, 5),)},
        "no tensor": {"tensors": ()},
        "a message without a codec": {"tensors": (torch.zeros(100, dtype=torch.uint8),)},
        "a piece that is not": {"tensors": tensors, "piece": 9},
        "a negative piece": {"tensors": tensors, "piece": -1},
        "another count": {"tensors": tensors, "pieces": 7},
        "a negative lease": {"tensors": tensors, "lease": -2},
        "too many groups": {"tensors": tensors, "options": [{}, {}, {}]},
        "a strange option": {"tensors": tensors, "options": [{"params": 1}, {}]},
        "an option that is text": {"tensors": tensors, "options": [{"lr": "0.1"}, {}]},
    }


@pytest.mark.parametrize("why", bad_pushes())
def test_a_push_that_does_not_fit_is_malformed_and_changes_nothing(why: str) -> None:
    rig = Rig(1)
    rig.start()
    good = {"lease": 0, "sequence": 0, "piece": 0, "pieces": 3, "options": []}
    bad = Push(**{**good, **bad_pushes()[why]})
    server = rig.servers["s0"]
    with pytest.raises(Malformed):
        server.handle("w0", bad, 0.0)
    assert server.handle("w0", Ask(lease=0), 0.0) == [
        ("w0", Staged(lease=0, birth=0, missing=[0, 1, 2]))
    ]
    server.handle("w0", Push(**good, tensors=(torch.zeros(25),)), 0.0)
    ((_, staged),) = server.handle("w0", Ask(lease=0), 0.0)
    assert staged == Staged(lease=0, birth=0, missing=[1, 2])


@pytest.mark.parametrize(
    "entry",
    [
        [],
        [[], [], []],
        [[[0]], [], [], False],
        [[[0, "1"]], [], [], False],
        [[], [1], [], False],
        [[], [], ["0"], False],
        [[], [], [], 1],
        [0, [], [], False],
    ],
)
def test_an_order_that_does_not_fit_is_malformed_and_changes_nothing(entry: list[Any]) -> None:
    rig = Rig(1)
    rig.start()
    good = [[], [], [], False]
    with pytest.raises(Malformed):
        rig.tell("s0", Orders(first=1, entries=[good, entry]))
    assert rig.servers["s0"].applied == 0


def test_workers_give_no_orders_and_servers_take_nothing_strange() -> None:
    rig = Rig(1)
    rig.start()
    server, client = rig.servers["s0"], rig.clients["w0"]
    for message in (
        Orders(first=1, entries=[[[], [], [], False]]),
        Found(blueprint={}, servers=1, sequence=7),
        Applied(sequence=1),
    ):
        with pytest.raises(Malformed):
            server.handle("w0", message, 0.0)
        with pytest.raises(Malformed):
            client.handle("s0", message, 0.0)
        with pytest.raises(Malformed):
            client.handle(SCHEDULER, message, 0.0)
    assert server.applied == 0
    assert client.handle("nobody", Staged(lease=0, birth=1), 0.0) == []


def test_weights_of_another_shape_are_malformed_and_change_nothing() -> None:
    rig = Rig(1)
    rig.start()
    client = rig.clients["w0"]
    before = client.replica.tensors["a"].clone()
    for change in (
        {"tensors": (torch.ones(7),)},
        {"tensors": (torch.ones(25).double(),)},
        {"piece": 3},
        {"pieces": 2},
        {"base": 0},
    ):
        fields: dict[str, Any] = {
            "sequence": 5,
            "piece": 0,
            "pieces": 3,
            "tensors": (torch.ones(25),),
        }
        with pytest.raises(Malformed):
            client.handle("s0", Weights(**{**fields, **change}), 0.0)
    assert client.replica.sequence == 0
    assert torch.equal(client.replica.tensors["a"], before)


def test_another_model_or_number_of_servers_is_malformed() -> None:
    rig = Rig(1)
    rig.start()
    other = Rig(1, make=MAKES["adam"]).blueprint.plain()
    for found in (
        Found(blueprint=other, servers=1, sequence=0),
        Found(blueprint=rig.blueprint.plain(), servers=2, sequence=0),
        Found(blueprint={"tensors": 1}, servers=1, sequence=0),
    ):
        with pytest.raises(Malformed):
            rig.tell("s0", found)


def test_numbers_are_a_set_that_stays_small_where_they_come_nearly_in_order() -> None:
    numbers, plain = Numbers(), set()
    chance = torch.Generator().manual_seed(0)
    for number in (torch.arange(500) + torch.randint(0, 9, (500,), generator=chance)).tolist():
        numbers.add(number)
        plain.add(number)
        assert [each in numbers for each in range(520)] == [each in plain for each in range(520)]
    for number in range(520):
        numbers.add(number)
    assert len(numbers._first) == 1
