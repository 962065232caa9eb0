"""Shapes of what a forward pass computes, for any number of rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from allfuse.split.record import Recording


class Shapes:
    """Shapes of the values of a forward pass for any number of rows.

    Args:
        one, other: recordings of the same pass over batches of these numbers of rows.
    """

    def __init__(self, one: Recording, rows: int, other: Recording, other_rows: int) -> None:
        self.one, self.other, self.rows, self.other_rows = one, other, rows, other_rows

    def of(self, value: int, rows: int) -> tuple[int, ...]:
        pairs = zip(self.one.shapes[value], self.other.shapes[value], strict=True)
        scale = self.other_rows - self.rows
        return tuple(a + (b - a) * (rows - self.rows) // scale for a, b in pairs)

    def empty(self, value: int, rows: int, device: torch.device) -> Tensor:
        """A tensor like a value, without contents."""
        return torch.empty(self.of(value, rows), dtype=self.one.dtypes[value], device=device)

    def bytes(self, value: int, rows: int) -> int:
        """What a value holds."""
        return math.prod(self.of(value, rows)) * self.one.dtypes[value].itemsize
