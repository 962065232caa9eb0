"""One byte a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from allfuse.codec.scaled import Rounded

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Int8(Rounded):
    """255 steps for each block: a quarter of the bytes (Dettmers 2016, arXiv:1511.04561, linear).

    Stochastic rounding as in QSGD (Alistarh et al. 2017, arXiv:1610.02132), with the largest value
    of a block in place of its norm.
    """

    name: ClassVar[str] = "int8"

    @property
    def steps(self) -> int:
        return 127

    def number_bytes(self, elements: int) -> int:
        return elements

    def pack(self, ratios: Tensor, seed: int) -> Tensor:
        import torch

        return self.round(ratios, seed).view(torch.uint8)

    def unpack(self, numbers: Tensor, elements: int) -> Tensor:
        import torch

        return numbers[:elements].view(torch.int8)
