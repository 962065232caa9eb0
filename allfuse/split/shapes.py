"""Shapes of what a forward pass computes, for any number of rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from allfuse.split.record import Recording


class Shapes:
    """Shapes of the values of a forward pass for any number of rows.

    Args:
        one, other: recordings of the same pass over batches of these numbers of rows.
        dtypes: of the values, where they are not those of `one`.
        pieces: of values that each rank has a piece of: the dim that is cut, and its size here.
    """

    def __init__(
        self,
        one: Recording,
        rows: int,
        other: Recording,
        other_rows: int,
        dtypes: Sequence[torch.dtype] | None = None,
        pieces: Mapping[int, tuple[int, int]] | None = None,
    ) -> None:
        self.one, self.other, self.rows, self.other_rows = one, other, rows, other_rows
        self.dtypes, self.pieces = dtypes or one.dtypes, pieces or {}

    def of(self, value: int, rows: int) -> tuple[int, ...]:
        pairs = zip(self.one.shapes[value], self.other.shapes[value], strict=True)
        scale = self.other_rows - self.rows
        shape = [a + (b - a) * (rows - self.rows) // scale for a, b in pairs]
        if value in self.pieces:
            dim, size = self.pieces[value]
            shape[dim] = size
        return tuple(shape)

    def empty(self, value: int, rows: int, device: torch.device) -> Tensor:
        """A tensor like a value, without contents."""
        return torch.empty(self.of(value, rows), dtype=self.dtypes[value], device=device)

    def bytes(self, value: int, rows: int) -> int:
        """What a value holds."""
        return math.prod(self.of(value, rows)) * self.dtypes[value].itemsize
