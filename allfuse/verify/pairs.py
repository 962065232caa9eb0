"""What a codec does to exchanges of workers that gossip, written out again for the replay.

Shared with the code under test are the codecs themselves, the keys that they draw by, and where a
model is cut.
"""

from __future__ import annotations

import zlib

import torch

from allfuse.base.errors import AllfuseError
from allfuse.base.keys import mix
from allfuse.roles.blueprint import Blueprint, read_codec
from allfuse.roles.cutting import cut
from allfuse.roles.diary import Entry
from allfuse.roles.mixing import half_way
from allfuse.verify.encoded import Named, flatten, name_again

OFFER, ANSWER = 0, 1


class Pairs:
    """What is known of visitors to their hosts, exchange by exchange.

    An offer is of the visitor's weights, or of what these are ahead of what is known since another
    exchange; the answer is half of what the visitor is ahead of its host then, as far as is known.
    """

    def __init__(self, blueprint: Blueprint) -> None:
        self.blueprint, self.codec = blueprint, read_codec(blueprint.codec)
        (self.pieces,) = cut(blueprint.blocks, 1)
        self._known: dict[tuple[str, str], tuple[int, Named]] = {}  # by visitor and host

    def offer(self, visitor: str, entry: Entry, own: Named) -> Named:
        """What the host learns of the visitor's weights.

        Raises:
            AllfuseError: it is ahead of what was never known.
        """
        if self.codec is None or entry.base < 0:
            return own
        number, known = self._known.get((visitor, entry.peer), (-1, {}))
        if number != entry.base:
            raise AllfuseError(
                f"the log of {visitor} cannot be right: its offer {entry.number} to {entry.peer} "
                f"is ahead of exchange {entry.base}, and {number} was the last one of the two"
            )
        ahead = {name: _wide(value) - known[name] for name, value in own.items()}
        return self._through(ahead, visitor, entry.number, OFFER)

    def answer(self, host: str, entry: Entry, base: int, said: Named, own: Named) -> Named:
        """What the host adds to its weights, and the visitor takes off.

        Args:
            base: of the offer. said: what `offer` gave. own: the host's weights.
        """
        if self.codec is None:
            return {name: half_way(said[name], value) for name, value in own.items()}
        pair, is_encoded = (entry.peer, host), base >= 0
        theirs = {name: _wide(value) for name, value in said.items()}
        if is_encoded:
            theirs = {name: value + theirs[name] for name, value in self._known[pair][1].items()}
        found = {name: half_way(theirs[name], value.cpu()) for name, value in own.items()}
        if is_encoded:
            found = self._through(found, entry.peer, entry.number, ANSWER)
        else:
            found = {name: value.to(own[name].dtype) for name, value in found.items()}
        self._known[pair] = entry.number, {n: theirs[n] - value for n, value in found.items()}
        return {name: value.to(own[name].device) for name, value in found.items()}

    @torch.no_grad()
    def _through(self, values: Named, visitor: str, number: int, what: int) -> Named:
        """What comes out of the codec."""
        assert self.codec is not None
        flats = flatten(self.blueprint, values)
        key = mix(zlib.crc32(visitor.encode()), number, what)
        for piece, spans in enumerate(self.pieces):
            for place, span in enumerate(spans):
                part = flats[span.block][span.start : span.stop]
                self.codec.decode(self.codec.encode(part, mix(key, piece, place)), part)
        return name_again(self.blueprint, flats)


def _wide(value: torch.Tensor) -> torch.Tensor:
    """In float32 or wider, on the CPU, where codecs work."""
    return value.detach().to("cpu", torch.promote_types(value.dtype, torch.float32))
