"""Memory that is used again once nobody reads it any more."""

from __future__ import annotations

import torch
from torch import Tensor

from allfuse.base.torch_private import storage_users

IDLE = 2  # users of memory that only the pool holds: itself, and the look at it


class Pool:
    """Buffers (elements,) of one type. Fresh memory costs a page fault for every 4 kB.

    A buffer is free again when the tensor that was taken, and all that was made of it without a
    copy, is gone: a message on its way holds it.

    Example:
        pool = Pool(1000, torch.float32)
        copy = pool.take().copy_(values)
    """

    def __init__(
        self, elements: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.elements, self.dtype, self.device = elements, dtype, device
        self._buffers: list[Tensor] = []

    def take(self) -> Tensor:
        """A buffer with whatever was left in it."""
        free = next((each for each in self._buffers if storage_users(each) == IDLE), None)
        if free is None:
            free = torch.empty(self.elements, dtype=self.dtype, device=self.device)
            self._buffers.append(free)
        return free[:]
