"""Half a byte a value."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

from allfuse.codec.scaled import Rounded

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Int4(Rounded):
    """15 steps for each block, two values in a byte, the first in its low half: 4.5 bits a value,
    the scales of blocks of 64 included (QSGD, as int8)."""

    name: ClassVar[str] = "int4"
    block: int = 64

    @property
    def steps(self) -> int:
        return 7

    def number_bytes(self, elements: int) -> int:
        return -(-elements // 2)

    def pack(self, ratios: Tensor, seed: int) -> Tensor:
        import torch

        pairs = (self.round(ratios, seed) + 8).view(torch.int16)
        return (pairs | (pairs >> 4)).to(torch.uint8)

    def unpack(self, numbers: Tensor, elements: int) -> Tensor:
        import torch

        used = numbers[: self.number_bytes(elements)].int()
        return torch.index_select(_pairs(used.device), 0, used).view(torch.int8)[:elements]


@lru_cache(maxsize=16)
def _pairs(device: torch.device) -> Tensor:
    """For each byte the two numbers that it holds, two int8 as one int16: (256,)."""
    import torch

    halves = torch.arange(256)[:, None] >> torch.tensor([0, 4]) & 15
    return halves.sub(8).to(torch.int8).view(torch.int16).flatten().to(device)
