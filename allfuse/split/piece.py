"""Where a rank's part of a tensor lies in the whole."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Box:
    """A block of numbers: where it begins in the whole, and in the rank's own part; its size."""

    there: tuple[int, ...]
    here: tuple[int, ...]
    size: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A rank's part of a tensor: blocks of the whole that together fill a tensor of its own.

    Attributes:
        whole, own: shapes.
        boxes: which blocks.
    """

    whole: tuple[int, ...]
    own: tuple[int, ...]
    boxes: tuple[Box, ...]

    def take(self, whole: Tensor) -> Tensor:
        """The rank's part of a whole tensor, in new memory.

        A tensor of as many numbers in another shape (laid flat) gives one in that way.
        """
        flat = whole.shape != self.whole
        whole = whole.reshape(self.whole)
        own = whole.new_empty(self.own)
        self.load(own, whole)
        return own.reshape(-1) if flat else own

    def load(self, own: Tensor, whole: Tensor) -> None:
        """Copy the rank's part of a whole tensor, which may be of another type or lie elsewhere: in
        a file, of which only these bytes are read."""
        for box in self.boxes:
            own[_slices(box.here, box.size)] = whole[_slices(box.there, box.size)]

    def put(self, own: Tensor, whole: Tensor) -> None:
        """Copy the rank's part to its place in a whole tensor, in any of its shapes."""
        own, whole = own.reshape(self.own), whole.view(self.whole)
        for box in self.boxes:
            whole[_slices(box.there, box.size)] = own[_slices(box.here, box.size)]

    def plain(self) -> list[Any]:
        """As lists of numbers, for files."""
        boxes = [[list(box.there), list(box.here), list(box.size)] for box in self.boxes]
        return [list(self.whole), list(self.own), boxes]

    @classmethod
    def of(cls, plain: list[Any]) -> Piece:
        """The piece that lists of numbers say.

        Raises:
            ValueError, TypeError: they say none.
        """
        whole, own, told = plain
        boxes = tuple(Box(*(tuple(map(int, part)) for part in box)) for box in told)
        piece = cls(tuple(map(int, whole)), tuple(map(int, own)), boxes)
        for box in piece.boxes:
            for shape, begin in ((piece.whole, box.there), (piece.own, box.here)):
                sizes = zip(begin, box.size, shape, strict=True)
                if not all(at >= 0 and size > 0 and at + size <= most for at, size, most in sizes):
                    raise ValueError(f"a block from {begin} of {box.size} in {shape}")
        if sum(prod(box.size) for box in piece.boxes) != prod(piece.own):
            raise ValueError(f"blocks that do not fill {piece.own}")
        return piece


def cut_piece(
    whole: tuple[int, ...], dim: int, parts: tuple[int, ...], runs: list[tuple[int, int]]
) -> Piece:
    """A piece of a tensor in which parts lie one after the other along a dim: of each a run, from
    where to where."""
    starts = [0, *accumulate(parts)]
    lengths = [stop - start for start, stop in runs]
    own = tuple(sum(lengths) if at == dim else size for at, size in enumerate(whole))
    boxes = []
    for number, ((start, _), length) in enumerate(zip(runs, lengths, strict=True)):
        there, here, size = [0] * len(whole), [0] * len(whole), list(whole)
        there[dim] = starts[number] + start
        here[dim] = sum(lengths[:number])
        size[dim] = length
        boxes.append(Box(tuple(there), tuple(here), tuple(size)))
    return Piece(whole, own, tuple(boxes))


def whole_piece(shape: tuple[int, ...]) -> Piece:
    """That of a rank which has all of a tensor."""
    return Piece(shape, shape, (Box((0,) * len(shape), (0,) * len(shape), shape),))


def join(pieces: list[tuple[Piece, Tensor]]) -> Tensor:
    """The whole of what all ranks of a replica have.

    Raises:
        ValueError: something of it is missing.
    """
    shape = pieces[0][0].whole
    flat = pieces[0][1].shape != pieces[0][0].own
    whole = pieces[0][1].new_empty(shape)
    covered = torch.zeros(shape, dtype=torch.bool)
    for piece, own in pieces:
        piece.put(own, whole)
        for box in piece.boxes:
            covered[_slices(box.there, box.size)] = True
    if not covered.all():
        raise ValueError(f"parts of a tensor of shape {shape} are missing")
    return whole.reshape(-1) if flat else whole


def _slices(begin: tuple[int, ...], size: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(at, at + length) for at, length in zip(begin, size, strict=True))
