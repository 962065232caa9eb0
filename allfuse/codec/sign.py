"""One bit a value."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

from allfuse.codec.base import Error
from allfuse.codec.scaled import Scaled

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GATHER = 0x0102040810204080  # times eight bytes of 0 or 1: the highest byte has one bit of each


@dataclass(frozen=True)
class Sign(Scaled):
    """The sign of each value, times the mean size of its block: 1.5 bits a value, the scales of
    blocks of 64 included.

    Large blocks cost less and mix the values of layers whose gradients differ in size, which
    training feels. With error feedback this is EF-signSGD (Karimireddy et al. 2019,
    arXiv:1901.09847, section 4), by blocks; without, it is known not to converge. Zero counts as
    positive.
    """

    name: ClassVar[str] = "sign"
    block: int = 64

    @property
    def error(self) -> Error:
        return "bounded"

    def number_bytes(self, elements: int) -> int:
        return -(-elements // 8)

    def scale(self, blocks: Tensor) -> Tensor:
        return blocks.abs().mean(1)

    def correct(self, count: int) -> float:
        return self.block / count

    def pack(self, ratios: Tensor, seed: int) -> Tensor:
        import torch

        eights = (ratios >= 0).view(torch.int64)  # a byte for each sign, the first one lowest
        return ((eights * GATHER) >> 56 & 255).to(torch.uint8)

    def unpack(self, numbers: Tensor, elements: int) -> Tensor:
        import torch

        used = numbers[: self.number_bytes(elements)].int()
        return torch.index_select(_signs(used.device), 0, used).view(torch.int8)[:elements]


@lru_cache(maxsize=16)
def _signs(device: torch.device) -> Tensor:
    """For each byte the eight signs that it holds, eight int8 as one int64: (256,)."""
    import torch

    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return bits.mul(2).sub(1).to(torch.int8).view(torch.int64).flatten().to(device)
