"""Memory for gradients that is used again: given back and taken anew it would be torn to pieces."""

from __future__ import annotations

import torch
from torch import Tensor

from allfuse.base.torch_private import storage_users

UNUSED = storage_users(torch.empty(0))
"""How many share memory that nobody else has."""


class Spare:
    """One piece of memory for all blocks of a model, each of which needs it for a moment: for
    gradients that are added to those of an earlier backward pass."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def take(self, part: Tensor) -> Tensor:
        """Memory like a vector; new, if somebody has kept what was in it."""
        memory = self._memory
        fits = memory is not None and memory.dtype == part.dtype and len(memory) >= len(part)
        if memory is None or not fits:
            memory = self._memory = torch.empty_like(part)
        elif storage_users(memory) > UNUSED:
            return torch.empty_like(part)
        return memory[: len(part)]


class Place:
    """Where the gradients of a block go: the same place in each step, if nobody has kept those
    before.

    Args:
        part: what they are like.
    """

    def __init__(self, part: Tensor, spare: Spare, pinned: bool) -> None:
        self._part, self._spare, self._pinned = part, spare, pinned
        self._memory: Tensor | None = None

    def take(self) -> Tensor:
        if self._memory is None:
            self._memory = torch.empty_like(self._part, pin_memory=self._pinned)
        elif storage_users(self._memory) > UNUSED:
            return self._spare.take(self._part)
        return self._memory
