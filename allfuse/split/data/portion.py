"""What one replica works on in one step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from allfuse.base.tensors import map_nest


class Portion(NamedTuple):
    """A replica's part of the batch of one step.

    Attributes:
        batch: the replica's own samples; when it has none, one sample as a stand-in, so that the
            forward and backward passes and the collectives in them run as on the other replicas.
        rows: how many samples of its own there are; 0 with a stand-in, whose weight is then 0.
        shares: the rows of every replica in this step.
        epoch: counted from 0.
        step: of the epoch, counted from 0.
        last: whether the epoch ends with this step.
    """

    batch: Any
    rows: int
    shares: tuple[int, ...]
    epoch: int
    step: int
    last: bool


def pin(batch: Any) -> Any:
    """The batch in pinned memory, from where it reaches a GPU faster; as it is without a GPU."""
    if not torch.cuda.is_available():
        return batch
    return map_nest(lambda leaf: leaf.pin_memory() if isinstance(leaf, Tensor) else leaf, batch)
