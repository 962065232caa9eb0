"""Values at places that are drawn, the same on all peers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar

from allfuse.codec.base import Error, Shapes, SumCodec
from allfuse.codec.topk import check_fraction

if TYPE_CHECKING:
    from torch import Tensor

    from allfuse.codec.memory import Memory


@dataclass(frozen=True)
class RandomK(SumCodec):
    """A `fraction` of the values, at places drawn anew in each round from a seed that all share.

    So no places are sent, and what is sent can be summed (Stich et al. 2018, arXiv:1809.07599, with
    a shared seed as in Vogels et al. 2019, arXiv:1905.13727). One place is drawn in each of k
    equal runs of the block, which costs k draws instead of a permutation.
    """

    name: ClassVar[str] = "randomk"
    fraction: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(self, self.fraction)

    @property
    def error(self) -> Error:
        return "bounded"

    def kept(self, elements: int) -> int:
        return min(elements, max(1, round(self.fraction * elements)))

    def summed_elements(self, shapes: Shapes) -> int:
        return self.kept(sum(map(prod, shapes)))

    def places(self, elements: int, seed: int, like: Tensor) -> Tensor:
        """The places of one round: (k,), each in a run of its own."""
        import torch

        k = self.kept(elements)
        bounds = torch.arange(k + 1, device=like.device) * elements // max(k, 1)
        chance = torch.Generator().manual_seed(seed & (2**63 - 1))  # alike on every device
        drawn = torch.rand(k, generator=chance, dtype=torch.float64).to(like.device)
        starts, widths = bounds[:-1], bounds.diff()
        return starts + (drawn * widths).long()

    def rounds(self, block: Tensor, error: Tensor, memory: Memory, seed: int) -> Iterator[Tensor]:
        places = self.places(len(block), seed, block)
        sent = block[places]
        error.copy_(block)
        error[places] = 0
        yield sent
        block.zero_()
        block[places] = sent
