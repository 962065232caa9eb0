"""Runs a schedule on a link: moves the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from allfuse.base.errors import BadMessage
from allfuse.base.keys import mix
from allfuse.base.tensors import share
from allfuse.codec import MessageCodec
from allfuse.link import Link, Work
from allfuse.topology import Layout, Piece, Topology, Turn

SEGMENT_BYTES = 50_000_000  # of a block, so that memory stays bounded
TWO_SEGMENTS_BYTES = 1_000_000  # from here on: while one is added up, the other travels
SHORT_SEGMENT_BYTES = 500_000  # where a topology's phases would leave links idle
MOST_SEGMENTS = 64

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


def segments_of(topology: Topology, block_bytes: int) -> int:
    """Into how many segments a block of so many bytes on the way is cut, that follow each other
    through the phases."""
    size = SHORT_SEGMENT_BYTES if topology.pipelines else SEGMENT_BYTES
    least = 1 if block_bytes < TWO_SEGMENTS_BYTES else 2
    return max(least, min(MOST_SEGMENTS, block_bytes // size))


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How the values of a block are encoded, and where what is lost by it is kept.

    error: (k,), one for each value of the block; what this peer loses is added to it. seed: of
    codecs that draw, of its own for each peer and round.
    """

    codec: MessageCodec
    error: Tensor
    seed: int


def run(
    plot: Plot,
    link: Link,
    block: Tensor,
    operation: str,
    segments: int = 1,
    *,
    gather: Gather | None = None,
    encoding: Encoding | None = None,
    tail: int = 0,
) -> None:
    """Fuse a contiguous block over the link's peers, in place. Returns when this peer is done.

    Segment s does phase p in tick s + p: all transfers of a tick go at once, and sums are taken as
    they arrive. With `gather` what would be summed is collected, and `gather(values)` makes one of
    the values (n, k) of all peers. With `encoding` each chunk travels as a message: whoever adds to
    it decodes, adds and encodes again, and keeps the error; who holds the sum of a chunk encodes
    it once, takes what that decodes to for its own, and all others pass the message on: all end
    equal. The last `tail` elements are summed as they are, beside the first segment.

    All peers must call it with equal sizes and segments. Memory: what arrives in a tick to be
    added, collected or mixed.

    Raises:
        PeerLost, BadMessage: from the link, and for messages that cannot be decoded.
    """
    flat = block.reshape(-1)
    lanes = _make_lanes(plot.chunks, flat[: len(flat) - tail], segments, gather, encoding, link)
    if tail:
        lanes[0].append(Lane(flat[len(flat) - tail :], plot.chunks))
    for tick in range(len(plot.turns) + segments - 1):
        under_way = range(max(0, tick - len(plot.turns) + 1), min(segments, tick + 1))
        moves = [(plot.turns[tick - s], lane) for s in under_way for lane in lanes[s]]
        arrivals: list[Arrival] = []
        for turn, lane in moves:
            for piece in turn.receives:
                if (buffer := lane.room(piece)).numel():
                    work = link.receive(buffer, piece.peer, operation)
                    arrivals.append(Arrival(work, piece, lane, buffer))
        messages = [(lane.message(piece), piece) for turn, lane in moves for piece in turn.sends]
        sends = [link.send(m, piece.peer, operation) for m, piece in messages if m.numel()]
        _take_in(arrivals, sends, link, operation)


def _make_lanes(
    chunks: int,
    values: Tensor,
    segments: int,
    gather: Gather | None,
    encoding: Encoding | None,
    link: Link,
) -> list[list[Lane]]:
    """The segments of a block, each in a list of its own."""
    lanes: list[list[Lane]] = []
    for s in range(segments):
        part = slice(*share(values.numel(), segments, s))
        if encoding is None:
            lanes.append([Lane(values[part], chunks, gather)])
        else:
            error = encoding.error[part]
            seed = mix(encoding.seed, link.rank, s)
            lanes.append([CodedLane(values[part], chunks, gather, encoding.codec, error, seed)])
    return lanes


class Lane:
    """A segment of a block on its way: what is sent of it, and what becomes of what arrives."""

    def __init__(self, values: Tensor, chunks: int, gather: Gather | None = None) -> None:
        self.values, self.chunks, self.gather = values, chunks, gather

    def cut(self, start: int, stop: int) -> Tensor:
        """The elements of some chunks."""
        size = self.values.numel()
        return self.values[size * start // self.chunks : size * stop // self.chunks]

    def own(self, piece: Piece) -> Tensor:
        return self.cut(piece.start, piece.stop)

    def collects(self, piece: Piece) -> bool:
        """Whether what arrives waits until all is there."""
        return piece.op == "collect" or (piece.op == "add" and self.gather is not None)

    def message(self, piece: Piece) -> Tensor:
        """What is sent; empty where there is nothing to send."""
        return self.own(piece)

    def room(self, piece: Piece) -> Tensor:
        """Where a message is received."""
        own = self.own(piece)
        return own if piece.op == "copy" else torch.empty_like(own)

    def read(self, piece: Piece, message: Tensor) -> Tensor:
        """The values that a message says; those of a copy are in place then."""
        return message


class CodedLane(Lane):
    """A segment that is encoded on its way, chunk by chunk.

    sent: the messages of chunks whose values are final here, which are passed on as they are.
    """

    def __init__(
        self,
        values: Tensor,
        chunks: int,
        gather: Gather | None,
        codec: MessageCodec,
        error: Tensor,
        seed: int,
    ) -> None:
        super().__init__(values, chunks, gather)
        self.codec, self.error, self.seed = codec, error, seed
        self.sent: dict[int, Tensor] = {}

    def _held(self, piece: Piece) -> list[int]:
        """The chunks of a piece that have elements."""
        return [c for c in range(piece.start, piece.stop) if self.cut(c, c + 1).numel()]

    def message(self, piece: Piece) -> Tensor:
        final = piece.op == "copy" or self.collects(piece)
        messages = [self._encode(chunk, final) for chunk in self._held(piece)]
        if not messages:
            return self.room(piece)
        return messages[0] if len(messages) == 1 else torch.cat(messages)

    def _encode(self, chunk: int, final: bool) -> Tensor:
        """The message of a chunk; one that is final stays the same, and this peer's value too."""
        if chunk in self.sent:
            return self.sent[chunk]
        values = self.cut(chunk, chunk + 1)
        message = self.codec.encode(values, mix(self.seed, chunk, final))
        decoded = torch.empty_like(values)
        self.codec.decode(message, decoded)
        start = self.values.numel() * chunk // self.chunks
        self.error[start : start + values.numel()].add_(values).sub_(decoded)
        if final:
            self.sent[chunk] = message
            values.copy_(decoded)
        return message

    def room(self, piece: Piece) -> Tensor:
        return self.values.new_empty(sum(self._sizes(piece)), dtype=torch.uint8)

    def _sizes(self, piece: Piece) -> list[int]:
        return [self.codec.encoded_bytes(self.cut(c, c + 1).numel()) for c in self._held(piece)]

    def read(self, piece: Piece, message: Tensor) -> Tensor:
        own = self.own(piece)
        found = own if piece.op == "copy" else torch.empty_like(own)
        place = 0
        for chunk, part in zip(self._held(piece), message.split(self._sizes(piece)), strict=True):
            size = self.cut(chunk, chunk + 1).numel()
            self.codec.decode(part, found[place : place + size])
            place += size
            if piece.op == "copy":
                self.sent[chunk] = part
        return found


class Arrival(NamedTuple):
    """What a receive brings, and where it goes."""

    work: Work
    piece: Piece
    lane: Lane
    message: Tensor

    def values(self, link: Link, operation: str) -> Tensor:
        """Wait for it, and read it."""
        self.work.wait()
        try:
            return self.lane.read(self.piece, self.message)
        except (ValueError, IndexError, RuntimeError) as error:
            peer = link.members[self.piece.peer]
            raise BadMessage(
                f"rank {peer} sent what cannot be decoded ({error})",
                rank=link.members[link.rank],
                peer=peer,
                operation=operation,
                step=link.step,
                seconds=0.0,
            ) from None


def _take_in(arrivals: list[Arrival], sends: list[Work], link: Link, operation: str) -> None:
    """Wait for a tick's transfers and apply what comes, in the order of the schedule.

    What is collected or mixed waits for the sends: it changes what they send.
    """
    collected: dict[int, list[tuple[Arrival, Tensor]]] = {}
    mixed: dict[int, list[tuple[Arrival, Tensor]]] = {}
    for arrival in arrivals:
        values = arrival.values(link, operation)
        target = arrival.lane.own(arrival.piece)
        if arrival.lane.collects(arrival.piece):
            collected.setdefault(target.data_ptr(), []).append((arrival, values))
        elif arrival.piece.op == "mix":
            mixed.setdefault(target.data_ptr(), []).append((arrival, values))
        elif arrival.piece.op == "add":
            target.add_(values)
    for work in sends:
        work.wait()
    for group in collected.values():
        lane, piece = group[0][0].lane, group[0][0].piece
        target = lane.own(piece)
        by_rank = {link.rank: target} | {each.piece.peer: values for each, values in group}
        fused = (lane.gather or _sum)(torch.stack([by_rank[rank] for rank in sorted(by_rank)]))
        target.copy_(fused)
    for group in mixed.values():
        target = group[0][0].lane.own(group[0][0].piece)
        target.mul_(1.0 - sum(each.piece.weight for each, _ in group))
        for each, values in group:
            target.add_(values, alpha=each.piece.weight)


def _sum(values: Tensor) -> Tensor:
    """In the order of peers: (n, k) to (k,)."""
    total = values[0].clone()
    for value in values[1:]:
        total += value
    return total
