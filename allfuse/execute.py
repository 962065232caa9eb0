"""Runs a schedule on a link: moves the data."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from allfuse.base.tensors import share
from allfuse.link import Link, Work
from allfuse.topology import Layout, Piece, Topology, Turn

SEGMENT_BYTES = 4_000_000  # of a block: while one is added up, the next one travels
SHORT_SEGMENT_BYTES = 500_000  # where a topology's phases would leave links idle
MOST_SEGMENTS = 64


class Arrival(NamedTuple):
    """What a receive brings, and where it goes."""

    work: Work
    piece: Piece
    target: Tensor
    arrived: Tensor


def segments_of(topology: Topology, block_bytes: int) -> int:
    """Into how many segments a block is cut that follow each other through the phases."""
    size = SHORT_SEGMENT_BYTES if topology.pipelines else SEGMENT_BYTES
    return max(1, min(MOST_SEGMENTS, block_bytes // size))


Gather: TypeAlias = Callable[[Tensor], Tensor]


class Plot(NamedTuple):
    """This peer's part of a schedule."""

    chunks: int
    turns: tuple[Turn, ...]


@lru_cache(maxsize=256)
def plot(topology: Topology, layout: Layout, peer: int, round: int, seed: int) -> Plot:
    """What a peer does in a round of a topology."""
    schedule = topology.schedule(layout, round, seed)
    return Plot(schedule.chunks, schedule.turns(peer))


def run(
    plot: Plot,
    link: Link,
    block: Tensor,
    operation: str,
    segments: int = 1,
    gather: Gather | None = None,
) -> None:
    """Fuse a contiguous block over the link's peers, in place. Returns when this peer is done.

    Segment s does phase p in tick s + p: all transfers of a tick go at once, and sums are taken as
    they arrive. With `gather` what would be summed is collected, and `gather(values)` makes one of
    the values (n, k) of all peers. All peers must call it with equal sizes and segments. Memory:
    what arrives in a tick to be added, collected or mixed.

    Raises:
        PeerLost, BadMessage: from the link.
    """
    flat = block.reshape(-1)
    parts = [flat[slice(*share(flat.numel(), segments, s))] for s in range(segments)]
    for tick in range(len(plot.turns) + segments - 1):
        sends: list[Work] = []
        arrivals: list[Arrival] = []
        for s in range(max(0, tick - len(plot.turns) + 1), min(segments, tick + 1)):
            turn = plot.turns[tick - s]
            for piece in turn.receives:
                target = _cut(parts[s], piece, plot.chunks)
                if target.numel():
                    buffer = target if piece.op == "copy" else torch.empty_like(target)
                    work = link.receive(buffer, piece.peer, operation)
                    arrivals.append(Arrival(work, piece, target, buffer))
            for piece in turn.sends:
                source = _cut(parts[s], piece, plot.chunks)
                if source.numel():
                    sends.append(link.send(source, piece.peer, operation))
        if gather is not None:
            arrivals = _gather(arrivals, link, gather)
        _take_in(arrivals, sends)


def _gather(arrivals: list[Arrival], link: Link, gather: Gather) -> list[Arrival]:
    """Fuse what came to be collected; the other arrivals are left."""
    places: dict[int, list[Arrival]] = {}
    left: list[Arrival] = []
    for arrival in arrivals:
        if arrival.piece.op == "add":
            places.setdefault(arrival.target.data_ptr(), []).append(arrival)
        else:
            left.append(arrival)
    for collected in places.values():
        target = collected[0].target
        values = {link.rank: target}
        for arrival in collected:
            arrival.work.wait()
            values[arrival.piece.peer] = arrival.arrived
        target.copy_(gather(torch.stack([values[rank] for rank in range(link.size)])))
    return left


def _cut(part: Tensor, piece: Piece, chunks: int) -> Tensor:
    """The elements of a segment that a piece covers."""
    size = part.numel()
    return part[size * piece.start // chunks : size * piece.stop // chunks]


def _take_in(arrivals: list[Arrival], sends: list[Work]) -> None:
    """Wait for a tick's transfers and apply what comes, in the order of the schedule.

    What is mixed waits for the sends: it changes what they send.
    """
    own: dict[int, float] = {}
    for arrival in arrivals:
        arrival.work.wait()
        if arrival.piece.op == "add":
            arrival.target.add_(arrival.arrived)
        elif arrival.piece.op == "mix":
            place = arrival.target.data_ptr()
            own[place] = own.get(place, 1.0) - arrival.piece.weight
    for work in sends:
        work.wait()
    for arrival in arrivals:
        if arrival.piece.op == "mix":
            weight = own.pop(arrival.target.data_ptr(), None)
            if weight is not None:
                arrival.target.mul_(weight)
            arrival.target.add_(arrival.arrived, alpha=arrival.piece.weight)
