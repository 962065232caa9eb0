"""The socket link against bare ZeroMQ between the same two processes: latency and throughput.

Both sides take turns, with 1 thread each. A round trip is 4 KB there and 4 KB back. Throughput is
of one tensor from rank 0 to rank 1, until rank 0 hears that rank 1 has it: bare ZeroMQ pushes the
tensor's memory as one message without a copy, and pulls a message that it does not copy anywhere.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import harness
import torch
import torch.distributed as dist
import zmq
from step import join

import allfuse as af
from allfuse.base.tensors import tensor_bytes
from allfuse.link import Link

TRIP_BYTES = 4_000
TRIPS = 200  # in a turn
SIZES = (1_000_000, 10_000_000, 100_000_000)  # bytes
TURN_BYTES = 5e7  # that a turn moves, over several calls
ROUNDS = 20


class Bare:
    """ZeroMQ between two ranks without a link: push and pull, and a pair for answers."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.bulk = self.context.socket(zmq.PULL if rank else zmq.PUSH)
        self.pair = self.context.socket(zmq.PAIR)
        ports = torch.zeros(2, dtype=torch.int64)
        for number, socket in enumerate((self.bulk, self.pair)):
            if rank:
                ports[number] = socket.bind_to_random_port("tcp://127.0.0.1")
        dist.broadcast(ports, 1)
        for number, socket in enumerate((self.bulk, self.pair)):
            if not rank:
                socket.connect(f"tcp://127.0.0.1:{ports[number]}")

    def trip(self, message: bytes) -> None:
        if self.rank == 0:
            self.pair.send(message)
        self.pair.recv()
        if self.rank == 1:
            self.pair.send(message)

    def move(self, block: torch.Tensor) -> None:
        if self.rank == 0:
            self.bulk.send(tensor_bytes(block), copy=False)
            self.pair.recv()
        else:
            self.bulk.recv(copy=False)
            self.pair.send(b"")


def trip(link: Link, block: torch.Tensor) -> None:
    if link.rank == 0:
        link.send(block, 1, "there").wait()
        link.receive(block, 1, "back").wait()
    else:
        link.receive(block, 0, "there").wait()
        link.send(block, 0, "back").wait()


def move(link: Link, block: torch.Tensor, answer: torch.Tensor) -> None:
    if link.rank == 0:
        sending = link.send(block, 1, "there")
        link.receive(answer, 1, "back").wait()
        sending.wait()
    else:
        link.receive(block, 0, "there").wait()
        link.send(answer, 0, "back").wait()


def measure(folder: str, quick: bool) -> dict[str, dict[str, harness.Turns]]:
    """Runs in both ranks: seconds of a call on each side, by what is measured."""
    from allfuse.launcher import current_world
    from allfuse.link.endpoint import Endpoint
    from allfuse.link.socket import SocketLink

    rank = join(f"{folder}/meeting")
    world = current_world()
    assert world is not None
    links = {
        name: SocketLink(
            world.board, rank, name, (0, 1), endpoint=Endpoint(loopback=True, encrypt=encrypt)
        )
        for name, encrypt in (("allfuse", False), ("encrypted", True))
    }
    bare = Bare(rank)
    block = torch.zeros(TRIP_BYTES // 4)
    contenders: dict[str, Callable[[], None]] = {
        name: functools.partial(trip, link, block) for name, link in links.items()
    }
    contenders["bare"] = functools.partial(bare.trip, bytes(TRIP_BYTES))
    found = {"trip": timed(contenders, 5 if quick else TRIPS, quick)}
    for size in SIZES[:1] if quick else SIZES:
        block, answer = torch.zeros(size // 4), torch.zeros(1)
        contenders = {
            name: functools.partial(move, link, block, answer) for name, link in links.items()
        }
        contenders["bare"] = functools.partial(bare.move, block)
        found[f"{size / 1e6:g} MB"] = timed(contenders, max(1, int(TURN_BYTES / size)), quick)
    for link in links.values():
        link.close()
    bare.context.destroy(0)
    return found


def timed(
    contenders: dict[str, Callable[[], None]], calls: int, quick: bool
) -> dict[str, harness.Turns]:
    """What a call takes, from turns of so many."""

    def turn(call: Callable[[], None]) -> None:
        for _ in range(calls):
            call()

    turns = {name: functools.partial(turn, call) for name, call in contenders.items()}
    harness.interleave(turns, 1, dist.barrier)
    found = harness.interleave(turns, 2 if quick else ROUNDS, dist.barrier)
    return {name: each.each(calls) for name, each in found.items()}


def figures(found: dict[str, dict[str, harness.Turns]]) -> list[harness.Figure]:
    told = []
    for what, turns in found.items():
        bare = turns["bare"].wall_s
        for name in ("allfuse", "encrypted"):
            ours = turns[name].wall_s
            beside = f"{harness.milliseconds(ours)}, bare ZeroMQ {harness.milliseconds(bare)}"
            if what == "trip":
                told.append(
                    harness.figure(
                        f"{name}: round trip of 4 KB",
                        ours,
                        target=3e-4 if name == "allfuse" else None,
                        unit="s",
                        floor=beside,
                    )
                )
                continue
            rate = int(what.split()[0]) / 1e3 / statistics.median(ours)
            told.append(
                harness.figure(
                    f"{name}: throughput of {what} over bare ZeroMQ's",
                    harness.ratios(bare, ours),
                    target=0.8 if name == "allfuse" and what == "100 MB" else None,
                    better="higher",
                    floor=f"{beside}; {rate:.2g} GB/s",
                )
            )
    return told


def main() -> None:
    options = harness.parse_options(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        work = functools.partial(measure, str(Path(folder)), options.quick)
        found = af.launch(work, workers=2, threads=1)
    harness.report("socket_link", figures(found), options)


if __name__ == "__main__":
    main()
