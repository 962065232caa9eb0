"""Numbers of tensors that do not lie in a file as plain bytes end to end.

Those with strides and those in pieces are taken out of files that are mapped into memory for as
long as that lasts.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from allfuse.base.errors import MergeError
from allfuse.merge.entries import Adapted, Box, Pieced, Strided, boxes, plain_strides
from allfuse.merge.header import ITEM_BYTES, Entry
from allfuse.merge.padding import Padded, read_padded
from allfuse.store.tensorfile import DTYPES

if TYPE_CHECKING:
    from allfuse.merge.blocks import Files

    Read = Callable[[Files, Any, int, int], Tensor]

TILE = 32
"""Rows of an adapter's change that are computed at once, always from a multiple of it on, so that
each number is computed in the same way whichever rows are asked for."""


def read_strided(files: Files, entry: Strided, begin: int, count: int) -> Tensor:
    values: Any = _mapped(files, entry).flat[begin : begin + count]  # a copy
    return torch.from_numpy(values).view(DTYPES[entry.dtype])


def read_pieced(files: Files, entry: Pieced, begin: int, count: int) -> Tensor:
    values: Any = np.empty(count, _kind(entry))
    at = 0
    for box in boxes(entry.shape, begin, count):
        sizes = [end - start for start, end in box]
        part = values[at : at + prod(sizes)].reshape(sizes)
        for piece in entry.pieces:
            own = tuple(zip(piece.offsets, piece.entry.shape, strict=True))
            common = [
                (max(start, offset), min(end, offset + size))
                for (start, end), (offset, size) in zip(box, own, strict=True)
            ]
            if all(start < end for start, end in common):
                taken = _mapped(files, piece.entry)[_slices(common, piece.offsets)]
                part[_slices(common, [start for start, _ in box])] = taken
        at += part.size
    return torch.from_numpy(values).view(DTYPES[entry.dtype])


def read_adapted(files: Files, entry: Adapted, begin: int, count: int) -> Tensor:
    """In float32. The same bits however a tensor is cut into blocks: the change is computed by
    whole tiles, and each operation on it is one rounding of each number."""
    (rows, rank), columns = entry.left.shape, entry.right.shape[1]
    values = files.read(entry.base, begin, count).float()
    if not count:
        return values
    start = begin // columns // TILE * TILE
    tiles = -(-(begin + count) // (columns * TILE)) - start // TILE
    right = files.read(entry.right, 0, entry.right.count).float().view(rank, columns)
    left = torch.zeros(tiles * TILE, rank)
    own = min(len(left), rows - start)
    left[:own] = files.read(entry.left, start * rank, own * rank).float().view(own, rank)
    change = torch.cat([tile @ right for tile in left.split(TILE)]).view(-1)
    skipped = begin - start * columns
    return values.add_(change[skipped : skipped + count].mul_(entry.scale))


KINDS: dict[type[Entry], Read] = {
    Strided: read_strided,
    Pieced: read_pieced,
    Adapted: read_adapted,
    Padded: read_padded,
}


def _kind(entry: Entry) -> str:
    """A type of NumPy of the same size, to move numbers as they are."""
    return f"u{ITEM_BYTES[entry.dtype]}"


def _mapped(files: Files, entry: Entry) -> Any:
    """A tensor where it lies in its file, as whole numbers of its type's size.

    Raises:
        MergeError: the file cannot be read, or has become shorter.
    """
    strides = entry.strides if isinstance(entry, Strided) else plain_strides(entry.shape)
    item = ITEM_BYTES[entry.dtype]
    try:
        whole = mmap.mmap(files.descriptor(entry.file), 0, prot=mmap.PROT_READ)
        steps = [stride * item for stride in strides]
        return np.ndarray(entry.shape, _kind(entry), whole, entry.begin, steps)
    except (OSError, ValueError, TypeError) as error:
        raise MergeError(
            f"{entry.file} ends within {entry.name}; it was changed meanwhile"
        ) from error


def _slices(box: Box | list[tuple[int, int]], offsets: Any) -> tuple[slice, ...]:
    """A box, counted from these offsets."""
    return tuple(
        slice(start - offset, end - offset)
        for (start, end), offset in zip(box, offsets, strict=True)
    )
