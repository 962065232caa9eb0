"""What two workers that gossip both know of the weights of one of them, under a codec."""

from __future__ import annotations

import zlib

import torch

from allfuse.base.keys import mix
from allfuse.roles.encounters import ANSWER
from allfuse.roles.parcels import Flats, Packing


class PublicCopy:
    """The weights of a visitor as they became known to a host: the same bits at both.

    The visitor sends what its weights are ahead of it, encoded: what one message leaves out is
    still ahead, and in the next one (error feedback: CHOCO, Koloskova, Stich and Jaggi 2019,
    arXiv:1902.00340, algorithm 2, with a copy for each pair, since no two ask the same at once).
    The host answers half of what the copy is ahead of its own weights, encoded, and takes what
    comes out of that itself: so the sum of both stays what it was, whatever codecs leave out, and
    what was not brought is in the next difference (as in PowerGossip: Vogels et al. 2020,
    arXiv:2008.01425). It is known that the visitor takes this off, so the copy does, too, which
    CHOCO has a smaller step for.

    There is nothing to save: what nobody has been told yet is in the weights.

    Attributes:
        number: of the exchange that it came out of; -1 before the first.
        flats: in float32 or wider, on the CPU.
    """

    def __init__(self, packing: Packing) -> None:
        self.number, self.flats = -1, packing.take(wide=True)

    @torch.no_grad()
    def ahead(self, packing: Packing, flats: Flats) -> Flats:
        """What weights are ahead of it."""
        found = packing.take(wide=True)
        for to, own, known in zip(found, flats, self.flats, strict=True):
            to.copy_(own).sub_(known)
        return found

    @torch.no_grad()
    def hear(self, said: Flats, *, is_encoded: bool) -> Flats:
        """Take in what the visitor says, its weights or what they are ahead; what they are."""
        for known, each in zip(self.flats, said, strict=True):
            if is_encoded:
                known.add_(each)
            else:
                known.copy_(each)
        return self.flats

    @torch.no_grad()
    def meet(self, number: int, differences: Flats) -> None:
        """The two have met: the visitor takes differences off."""
        for known, difference in zip(self.flats, differences, strict=True):
            known.sub_(difference)
        self.number = number


def seed_of(visitor: str, number: int, content: str) -> int:
    """For codecs that draw: of a question of a visitor, or of the answer to it."""
    return mix(zlib.crc32(visitor.encode()), number, int(content == ANSWER))
