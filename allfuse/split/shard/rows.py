"""Which rows of a tensor a rank keeps, and how those of several tensors lie end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from allfuse.base.torch_private import foreach_copy
from allfuse.split.piece import Box, Piece


def rows_of(length: int, n: int, index: int) -> tuple[int, int]:
    """First row, and the one after the last, of rank `index` of n, as torch.chunk cuts them.

    >>> [rows_of(10, 4, index) for index in range(4)], rows_of(1, 2, 1)
    ([(0, 3), (3, 6), (6, 9), (9, 10)], (1, 1))
    """
    each = -(-length // n)
    return min(index * each, length), min((index + 1) * each, length)


def own_rows(whole: Tensor, n: int, index: int) -> Tensor:
    """A rank's rows of a tensor, as a view. A single number is in every part."""
    if not whole.dim():
        return whole
    first, stop = rows_of(whole.shape[0], n, index)
    return whole[first:stop]


def shard_piece(piece: Piece, n: int, index: int) -> Piece:
    """A rank's rows of a tensor that is a piece of a whole itself. Single numbers stay whole."""
    if not piece.own:
        return piece
    first, stop = rows_of(piece.own[0], n, index)
    boxes = []
    for box in piece.boxes:
        begin, end = max(box.here[0], first), min(box.here[0] + box.size[0], stop)
        if begin < end:
            there = (box.there[0] + begin - box.here[0], *box.there[1:])
            here = (begin - first, *box.here[1:])
            boxes.append(Box(there, here, (end - begin, *box.size[1:])))
    return Piece(piece.whole, (stop - first, *piece.own[1:]), tuple(boxes))


@dataclass(frozen=True)
class Row:
    """A tensor among those of a `Rows`: its shape, and where in each rank's part it begins.

    A rank's part has `length` places for it, also where the rank has fewer rows.
    """

    shape: tuple[int, ...]
    begin: int
    length: int

    @property
    def stop(self) -> int:
        return self.begin + self.length


class Rows:
    """Tensors of these shapes, of each of which every one of n ranks has some rows.

    A rank's part of all is a vector of `length` numbers: its rows of the first, then those of the
    second. What few ranks have less of is filled up, so that all parts are equally long. Numbers
    without rows are in every part.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], n: int) -> None:
        self.n, self.rows = n, []
        begin = 0
        for shape in shapes:
            length = -(-shape[0] // n) * prod(shape[1:]) if shape else 1
            self.rows.append(Row(tuple(shape), begin, length))
            begin += length
        self.length = begin

    def own(self, part: Tensor, index: int) -> list[Tensor]:
        """A rank's rows of each tensor, as views of its part."""
        found = []
        for row in self.rows:
            shape = row.shape
            if shape:
                first, stop = rows_of(shape[0], self.n, index)
                shape = (stop - first, *shape[1:])
            found.append(part[row.begin : row.begin + prod(shape)].view(shape))
        return found

    def join(self, parts: Tensor, whole: Sequence[Tensor]) -> None:
        """Fill whole tensors from the parts of all ranks, of shape (n, length)."""
        sources, targets = [], []
        for row, tensor in zip(self.rows, whole, strict=True):
            flat, numbers = tensor.view(-1), prod(row.shape)
            full = numbers // row.length if row.shape and row.length else 0
            if full:
                sources.append(parts[:full, row.begin : row.stop])
                targets.append(flat[: full * row.length].view(full, row.length))
            if rest := numbers - full * row.length:
                sources.append(parts[full, row.begin : row.begin + rest])
                targets.append(flat[full * row.length :])
        if targets:
            foreach_copy(targets, sources)

    def cut(self, whole: Sequence[Tensor | None], parts: Tensor) -> None:
        """The other way round: the rows of whole tensors to the parts of their ranks. None: 0."""
        sources, targets = [], []
        for row, tensor in zip(self.rows, whole, strict=True):
            place = parts[:, row.begin : row.stop]
            if tensor is None:
                place.zero_()
            elif not row.shape:
                place.copy_(tensor)
            else:
                flat = tensor.reshape(-1)
                full = flat.numel() // row.length if row.length else 0
                if full:
                    targets.append(place[:full])
                    sources.append(flat[: full * row.length].view(full, row.length))
                if full < self.n:
                    rest = flat[full * row.length :]
                    place[full:].zero_()
                    targets.append(place[full, : rest.numel()])
                    sources.append(rest)
        if targets:
            foreach_copy(targets, sources)
