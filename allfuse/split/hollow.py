"""Tensors with a shape, a type and a device, and no memory for numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def hollow(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor all of whose numbers are one and the same 0, which may be read, but not changed."""
    return torch.zeros((), dtype=dtype, device=device).expand(tuple(shape))


def is_hollow(tensor: Tensor) -> bool:
    """Whether a tensor has memory for fewer numbers than it has.

    >>> is_hollow(hollow((2, 3), torch.float32, torch.device("cpu"))), is_hollow(torch.ones(2, 3))
    (True, False)
    """
    return tensor.untyped_storage().nbytes() < tensor.nbytes
