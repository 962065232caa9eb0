"""Half a byte a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from allfuse.codec.scaled import Rounded

if TYPE_CHECKING:
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

        used = numbers[: self.number_bytes(elements)].to(torch.int16)
        pairs = (used & 15) | ((used & 240) << 4)
        return pairs.view(torch.int8).sub_(8)[:elements]
