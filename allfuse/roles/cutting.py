"""How what servers hold lies in memory: tensors end to end in blocks, in shards and pieces."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

PIECE_BYTES = 4_000_000
GRAIN = 64
"""Elements. Processors step so many at once, or a divisor of it, and what is left over at the end
by another path that rounds otherwise. Cut at multiples of it, all but the end of a block come to
the same bits wherever it is cut."""
FINE_BYTES = 1 << 16
"""What is smaller is cut between any two elements."""


class Span(NamedTuple):
    """Elements start..stop of a block."""

    block: int
    start: int
    stop: int

    @property
    def elements(self) -> int:
        return self.stop - self.start


class Piece(tuple[Span, ...]):
    """What travels as one, in the order of blocks.

    fragment: of the weights, that it is part of. ranks: of a worker, that have it: those of its
    blocks. The first of them pushes it.
    """

    fragment: int
    ranks: tuple[int, ...]

    def __new__(
        cls, spans: Iterable[Span] = (), fragment: int = 0, ranks: tuple[int, ...] = (0,)
    ) -> Piece:
        piece = super().__new__(cls, spans)
        piece.fragment, piece.ranks = fragment, ranks
        return piece


@dataclass(frozen=True)
class Block:
    """Tensors of one group and one type that the same ranks of a worker have, end to end.
    fragment: that of the group."""

    group: int
    dtype: torch.dtype
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    fragment: int = 0
    ranks: tuple[int, ...] = (0,)

    @property
    def sizes(self) -> list[int]:
        return [prod(shape) for shape in self.shapes]

    @property
    def elements(self) -> int:
        return sum(self.sizes)

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Each tensor of the block in a flat one (elements,)."""
        parts = zip(self.names, flat.split(self.sizes), self.shapes, strict=True)
        return {name: part.view(shape) for name, part, shape in parts}


def find_places(blocks: Sequence[Block]) -> dict[str, Span]:
    """Where each tensor lies, by its name."""
    found: dict[str, Span] = {}
    for number, block in enumerate(blocks):
        at = 0
        for name, size in zip(block.names, block.sizes, strict=True):
            found[name] = Span(number, at, at + size)
            at += size
    return found


def cut_shards(
    blocks: Sequence[Block], servers: int, fragment: int | None = None
) -> list[list[Span]]:
    """The spans of each server: all blocks, or those of a fragment, end to end, cut at equal bytes.

    Shards differ by less than two elements in size, or two grains where they are of `FINE_BYTES` or
    more. Some are empty where there are more servers than elements.
    """
    own = [block for block in blocks if fragment is None or block.fragment == fragment]
    total = sum(block.bytes for block in own)
    grain = GRAIN if total >= servers * FINE_BYTES else 1
    shards = []
    for index in range(servers):
        low, high = total * index // servers, total * (index + 1) // servers
        spans, at = [], 0
        for number, block in enumerate(blocks):
            if fragment is not None and block.fragment != fragment:
                continue
            first, last = (
                _at_grain(min(max(edge - at, 0), block.bytes) // block.dtype.itemsize, block, grain)
                for edge in (low, high)
            )
            if last > first:
                spans.append(Span(number, first, last))
            at += block.bytes
        shards.append(spans)
    return shards


def _at_grain(place: int, block: Block, grain: int) -> int:
    return place if place == block.elements else place - place % grain


def cut_pieces(
    blocks: Sequence[Block], spans: Iterable[Span], most_bytes: int = PIECE_BYTES
) -> list[Piece]:
    """A shard in pieces of at most so many bytes, each of which the same ranks have. There is at
    least one, which may be empty."""
    pieces: list[list[Span]] = [[]]
    ranks: list[tuple[int, ...]] = [(0,)]
    room = most_bytes
    grain = GRAIN if most_bytes >= FINE_BYTES else 1
    for span in spans:
        block, start = blocks[span.block], span.start
        size = block.dtype.itemsize
        if pieces[-1] and ranks[-1] != block.ranks:
            pieces.append([])
            ranks.append(block.ranks)
            room = most_bytes
        ranks[-1] = block.ranks
        while start < span.stop:
            stop = min(span.stop, start + room // size)
            if stop < span.stop:
                stop = _at_grain(stop, block, grain)
            if stop <= start:
                pieces.append([])
                ranks.append(block.ranks)
                room = most_bytes
                continue
            pieces[-1].append(Span(span.block, start, stop))
            room -= (stop - start) * size
            start = stop
    return [Piece(piece, ranks=own) for piece, own in zip(pieces, ranks, strict=True)]


def cut(blocks: Sequence[Block], servers: int) -> list[list[Piece]]:
    """The pieces of each server, fragment by fragment: each fragment is shared out evenly."""
    shards: list[list[Piece]] = [[] for _ in range(servers)]
    for fragment in sorted({block.fragment for block in blocks} or {0}):
        for own, spans in zip(shards, cut_shards(blocks, servers, fragment), strict=True):
            own += [Piece(each, fragment, each.ranks) for each in cut_pieces(blocks, spans)]
    return shards


def cut_at_grains(blocks: Sequence[Block], servers: int) -> list[bool]:
    """Of each block, whether it is cut at multiples of `GRAIN` only."""
    found = [True] * len(blocks)
    for pieces in cut(blocks, servers):
        for number, _, stop in (span for piece in pieces for span in piece):
            found[number] &= stop == blocks[number].elements or stop % GRAIN == 0
    return found


def view_all(blocks: Sequence[Block], flats: Sequence[Tensor]) -> dict[str, Tensor]:
    """All tensors by name, in the flat tensors of the blocks; none of a block whose flat tensor is
    empty, since it is not here."""
    found: dict[str, Tensor] = {}
    for block, flat in zip(blocks, flats, strict=True):
        if flat.numel() == block.elements:
            found |= block.views(flat)
    return found


def overlaps(
    blocks: Sequence[Block], shards: Sequence[Sequence[Piece]]
) -> Mapping[str, list[tuple[int, int]]]:
    """Which pieces hold something of a tensor, as (server, piece), by the tensor's name."""
    homes: list[list[tuple[int, int, int, int]]] = [[] for _ in blocks]
    for server, pieces in enumerate(shards):
        for number, piece in enumerate(pieces):
            for span in piece:
                homes[span.block].append((span.start, span.stop, server, number))
    found: dict[str, list[tuple[int, int]]] = {}
    for name, place in find_places(blocks).items():
        found[name] = [
            (server, number)
            for start, stop, server, number in homes[place.block]
            if start < place.stop and place.start < stop
        ]
    return found
