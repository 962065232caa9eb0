"""Tensors that do not lie in a file as plain bytes end to end. Loads no torch.

`blocks.Files.read` gives numbers of each kind; who asks need not know which it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from allfuse.merge.header import Entry

Box = tuple[tuple[int, int], ...]
"""A part of a tensor: where it begins and ends in each dim."""


@dataclass(frozen=True)
class Strided(Entry):
    """A tensor whose numbers lie in another order, with gaps, or once for several places.

    Attributes:
        strides: numbers from one place to the next, in each dim.
    """

    strides: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A part of a tensor that is a tensor in a file. offsets: where it begins, in each dim."""

    offsets: tuple[int, ...]
    entry: Entry


@dataclass(frozen=True)
class Pieced(Entry):
    """A tensor in pieces, in one file or several. `file` is the one that says so."""

    pieces: tuple[Piece, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(file for piece in self.pieces for file in piece.entry.files))


@dataclass(frozen=True)
class Adapted(Entry):
    """base + scale * left @ right, left (rows, r) and right (r, columns), which is computed in
    float32 when it is read.

    `dtype` is that of the base, which a result is written in.
    """

    base: Entry
    left: Entry
    right: Entry
    scale: float

    @property
    def bytes(self) -> int:
        return self.base.bytes + self.left.bytes + self.right.bytes

    @property
    def files(self) -> tuple[Path, ...]:
        parts = (self.base, self.left, self.right)
        return tuple(dict.fromkeys(file for part in parts for file in part.files))


def plain_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Those of a tensor whose numbers lie end to end, the last dim first.

    >>> plain_strides([2, 3, 4])
    (12, 4, 1)
    """
    steps = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return tuple(steps)


def placed(
    name: str, dtype: str, shape: tuple[int, ...], file: Path, begin: int, strides: tuple[int, ...]
) -> Entry:
    """A tensor in a file: plain bytes where its strides say so."""
    plain = plain_strides(shape)
    differ = any(
        size > 1 and own != usual for size, own, usual in zip(shape, strides, plain, strict=True)
    )
    if differ and 0 not in shape:
        return Strided(name, dtype, shape, file, begin, strides)
    return Entry(name, dtype, shape, file, begin)


def transposed(entry: Entry) -> Entry:
    """A matrix in a file with its dims exchanged, where its bytes are."""
    (rows, columns), strides = entry.shape, plain_strides(entry.shape)
    if isinstance(entry, Strided):
        strides = entry.strides
    return placed(
        entry.name, entry.dtype, (columns, rows), entry.file, entry.begin, (strides[1], strides[0])
    )


def boxes(shape: Sequence[int], begin: int, count: int) -> Iterator[Box]:
    """The boxes that numbers [begin, begin + count) of a flattened tensor are, in their order.

    >>> list(boxes([3, 2], 1, 4))
    [((0, 1), (1, 2)), ((1, 2), (0, 2)), ((2, 3), (0, 1))]
    """
    if not shape:
        yield ()
        return
    inner = prod(shape[1:])
    while count:
        row, within = divmod(begin, inner)
        rows = 0 if within else count // inner
        if rows:
            taken = rows * inner
            yield ((row, row + rows), *((0, size) for size in shape[1:]))
        else:
            taken = min(inner - within, count)
            for rest in boxes(shape[1:], within, taken):
                yield ((row, row + 1), *rest)
        begin, count = begin + taken, count - taken
