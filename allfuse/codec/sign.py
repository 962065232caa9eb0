"""One bit a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from allfuse.codec.base import Error
from allfuse.codec.scaled import Scaled

if TYPE_CHECKING:
    from torch import Tensor


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

    def scale(self, blocks: Tensor, counts: Tensor) -> Tensor:
        return blocks.abs().sum(1) / counts

    def pack(self, ratios: Tensor, seed: int) -> Tensor:
        import torch

        bits = (ratios >= 0).view(torch.uint8).view(-1, 8)
        packed = bits[:, 0].clone()
        for place in range(1, 8):
            packed |= bits[:, place] << place
        return packed

    def unpack(self, numbers: Tensor, elements: int) -> Tensor:
        import torch

        used = numbers[: self.number_bytes(elements)]
        places = torch.arange(8, dtype=torch.uint8, device=used.device)
        bits = (used[:, None] >> places).bitwise_and_(1).reshape(-1)[:elements]
        return bits.view(torch.int8).mul(2).sub_(1)
