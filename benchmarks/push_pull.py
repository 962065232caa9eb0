"""Push and pull of 20 MB through 1 and 2 desks against bare ZeroMQ between the same processes.

One worker and the desks are processes of their own, with 1 thread each. A push is 20 MB to the
desks, an equal part to each, until each has said that it has it; a pull is the same the other way,
after the worker has asked. Bare ZeroMQ moves the same bytes by the same kinds of socket, a DEALER
for each desk and a ROUTER in it, without copies: as one message to each desk, and in pieces as
letters are. All sides take turns; what a desk does with the bytes is not part of it.
"""

from __future__ import annotations

import functools
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path

import harness
import torch
import torch.distributed as dist
import zmq
from step import join

import allfuse as af
from allfuse.base.tensors import tensor_bytes
from allfuse.link.endpoint import Endpoint
from allfuse.link.post import Caller, Desk, Letter, wait_any
from allfuse.link.wire import Wire

TOTAL_BYTES = 20_000_000
PIECE_BYTES = 4_000_000
CALLS = 5  # in a turn
ROUNDS = 20
TIMEOUT_S = 60.0
DESKS = (1, 2)
Course = dict[str, list[harness.Turns]]  # the turns of each process, by contender


class Way(ABC):
    """What moves the bytes. Rank 0 is the worker, the others are desks.

    Args:
        piece_bytes: of a message.
    """

    def __init__(self, rank: int, desks: int, piece_bytes: int) -> None:
        self.rank, self.desks = rank, desks
        self.part = torch.zeros(TOTAL_BYTES // desks // 4)
        self.pieces = self.part.split(piece_bytes // 4)

    def push(self) -> None:
        if self.rank:
            self.take(self.part.nbytes)
            self.send([self.part[:1]])
        else:
            self.send(self.pieces)
            self.take(4)

    def pull(self) -> None:
        if self.rank:
            self.take(4)
            self.send(self.pieces)
        else:
            self.send([self.part[:1]])
            self.take(self.part.nbytes)

    @abstractmethod
    def send(self, pieces: Iterable[torch.Tensor]) -> None:
        """To the worker, or to every desk."""

    @abstractmethod
    def take(self, amount: int) -> None:
        """So many bytes of the worker, or of every desk."""

    @abstractmethod
    def close(self) -> None: ...


def share_places(rank: int, port: int) -> list[int]:
    """Where the desks listen, in every process."""
    ports = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(ports, torch.tensor([port]))
    return [int(each) for each in ports[1:]]


class Post(Way):
    """Letters."""

    def __init__(self, rank: int, desks: int, encrypt: bool) -> None:
        super().__init__(rank, desks, PIECE_BYTES)
        post = Wire(Endpoint(loopback=True, token=b"of the benchmark", encrypt=encrypt))
        self.desk: Desk | None = post.desk() if rank else None
        port = int(self.desk.place.rpartition(":")[2]) if self.desk else 0
        ports = share_places(rank, port)
        self.callers: list[Caller] = []
        if not rank:
            self.callers = [post.call(f"127.0.0.1:{each}", "worker") for each in ports]

    def send(self, pieces: Iterable[torch.Tensor]) -> None:
        for number, piece in enumerate(pieces):
            letter = Letter("push", {"lease": 1, "piece": number}, (piece,))
            for end in self.callers:
                end.send(letter)
            if self.desk is not None and not self.desk.send("worker", letter):
                raise RuntimeError("the worker is gone")

    def take(self, amount: int) -> None:
        if self.desk is not None:
            while amount:
                amount -= count(letter for _, letter in self.desk.receive(TIMEOUT_S))
            return
        left = dict.fromkeys(range(len(self.callers)), amount)
        while any(left.values()):
            if not wait_any(self.callers, TIMEOUT_S):
                raise RuntimeError("a desk is gone")
            for number, caller in enumerate(self.callers):
                left[number] -= count(caller.receive(0)) if left[number] else 0

    def close(self) -> None:
        for end in (*self.callers, self.desk):
            if end is not None:
                end.close()


def count(letters: Iterable[Letter]) -> int:
    """Bytes of tensors; the letters are thrown away, as frames are."""
    return sum(tensor.nbytes for letter in letters for tensor in letter.tensors)


class Bare(Way):
    """ROUTER and DEALER, and nothing of allfuse."""

    def __init__(self, rank: int, desks: int, piece_bytes: int) -> None:
        super().__init__(rank, desks, piece_bytes)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.sockets = []
        if rank:
            router = self.context.socket(zmq.ROUTER)
            share_places(rank, router.bind_to_random_port("tcp://127.0.0.1"))
            self.sockets.append(router)
            return
        for port in share_places(rank, 0):
            dealer = self.context.socket(zmq.DEALER)
            dealer.set(zmq.ROUTING_ID, b"worker")
            dealer.connect(f"tcp://127.0.0.1:{port}")
            self.sockets.append(dealer)

    def send(self, pieces: Iterable[torch.Tensor]) -> None:
        for piece in pieces:
            for socket in self.sockets:
                frame = zmq.Frame(tensor_bytes(piece), copy_threshold=0)
                socket.send_multipart([b"worker", frame] if self.rank else [frame], copy=False)

    def take(self, amount: int) -> None:
        for socket in self.sockets:
            left = amount
            while left:
                left -= len(socket.recv_multipart(copy=False)[-1])

    def close(self) -> None:
        self.context.destroy(0)


def measure(folder: str, quick: bool) -> dict[str, Course]:
    """Runs in all ranks: what a call takes in each process, by push and pull and by contender."""
    rank = join(f"{folder}/meeting")
    desks = dist.get_world_size() - 1
    ways: dict[str, Way] = {
        "allfuse": Post(rank, desks, encrypt=False),
        "encrypted": Post(rank, desks, encrypt=True),
        "bare": Bare(rank, desks, TOTAL_BYTES),
        "bare pieces": Bare(rank, desks, PIECE_BYTES),
    }
    calls, rounds = (1, 2) if quick else (CALLS, ROUNDS)

    def turn(call: Callable[[], None]) -> None:
        for _ in range(calls):
            call()

    found: dict[str, Course] = {}
    for what in ("push", "pull"):
        turns = {name: functools.partial(turn, getattr(way, what)) for name, way in ways.items()}
        harness.interleave(turns, 1, dist.barrier)
        own = harness.interleave(turns, rounds, dist.barrier)
        told: list[dict[str, harness.Turns]] = [{} for _ in range(desks + 1)]
        dist.all_gather_object(told, {name: each.each(calls) for name, each in own.items()})
        found[what] = {name: [each[name] for each in told] for name in ways}
    for way in ways.values():
        way.close()
    return found


def figures(desks: int, found: dict[str, Course]) -> list[harness.Figure]:
    """Throughput over that of the better of both ways of bare ZeroMQ."""
    told = []
    where = f"{desks} desk{'s' if desks > 1 else ''}"
    for what, course in found.items():
        best = min(
            ("bare", "bare pieces"), key=lambda name: harness.quartiles(course[name][0].wall_s)[1]
        )
        bare = course[best][0].wall_s
        for name in ("allfuse", "encrypted"):
            ours = course[name][0].wall_s
            work = harness.quartiles(harness.ratios(spent(course[name]), spent(course[best])))[1]
            rate = TOTAL_BYTES / 1e9 / harness.quartiles(ours)[1]
            told.append(
                harness.figure(
                    f"{name}: {what} through {where}, throughput over bare ZeroMQ's",
                    harness.ratios(bare, ours),
                    target=0.8 if name == "allfuse" else None,
                    better="higher",
                    floor=f"{harness.milliseconds(ours)} and {harness.milliseconds(bare)}; "
                    f"{rate:.2g} GB/s; processor time of all processes over its {work:.2f}",
                )
            )
            told.append(
                harness.figure(
                    f"{name}: {what} through {where}, processor seconds of desks per GB",
                    per_gigabyte(course[name]),
                    unit="s",
                    floor=f"bare ZeroMQ {harness.quartiles(per_gigabyte(course[best]))[1]:.2g} s",
                )
            )
    return told


def spent(turns: list[harness.Turns]) -> list[float]:
    """Processor seconds of some processes together, one value a round."""
    return [sum(values) for values in zip(*(each.cpu_s for each in turns), strict=True)]


def per_gigabyte(turns: list[harness.Turns]) -> list[float]:
    """Processor seconds of all desks together."""
    return [seconds / TOTAL_BYTES * 1e9 for seconds in spent(turns[1:])]


def main() -> None:
    options = harness.parse_options(__doc__)
    told = []
    for desks in DESKS:
        with tempfile.TemporaryDirectory() as folder:
            work = functools.partial(measure, str(Path(folder)), options.quick)
            told += figures(desks, af.launch(work, workers=1 + desks, threads=1))
    harness.report("push_pull", told, options)


if __name__ == "__main__":
    main()
