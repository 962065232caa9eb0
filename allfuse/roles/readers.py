"""What each worker holds of a shard, where weights are encoded on the way to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from allfuse.base.keys import mix
from allfuse.codec import MessageCodec
from allfuse.roles.shard import Values

Place: TypeAlias = tuple[str, int]
"""A worker, and a fragment of the weights."""


@dataclass
class Base:
    """What a worker was sent last of a fragment, by piece. is_held: it has worked from it since."""

    sequence: int
    pieces: dict[int, Values] = field(default_factory=dict)
    is_held: bool = False


class Readers:
    """Encodes weights as differences to what a worker holds, so that what one message loses the
    next ones bring (error feedback: the difference is taken to what came out of the codec).

    Only what a worker has pushed from is known to be there; else plain weights are sent. Workers
    that hold the same share the memory, and the messages.

    Args:
        after: encoded weights up to this version were sent by the server before this one. What
            came of them is not known here, so they are not sent again: whoever lacks some asks for
            newer ones.
    """

    def __init__(self, codec: MessageCodec | None, index: int, after: int = -1) -> None:
        self.codec, self.index, self.after = codec, index, after
        self.sequence = -1
        self._bases: dict[Place, Base] = {}
        self._next: dict[Place, Base] = {}
        self._made: dict[int, tuple[Values, Values]] = {}  # by what is held

    def confirm(self, worker: str, sequence: int) -> None:
        """A worker has made an update from the weights of a sequence."""
        for (reader, _), base in self._bases.items():
            if reader == worker and base.sequence == sequence:
                base.is_held = True

    def forget(self, worker: str) -> None:
        for place in [place for place in self._bases if place[0] == worker]:
            del self._bases[place]

    @property
    def may_send(self) -> bool:
        """Whether the weights that `begin` named are to be sent."""
        return self.codec is None or self.sequence > self.after

    def begin(self, sequence: int) -> None:
        """Weights of a sequence are sent next, piece by piece, each to all its readers."""
        self.sequence = sequence
        self._next.clear()
        self._made.clear()

    def message(
        self, worker: str, fragment: int, piece: int, weights: Values
    ) -> tuple[int, Values]:
        """What to send for a piece of the weights of a fragment, and to which sequence it is to be
        added."""
        if self.codec is None:
            return -1, weights
        place = worker, fragment
        following = self._next.setdefault(place, Base(self.sequence))
        base = self._bases.get(place)
        if base is None or not base.is_held or not self.codec.encodes(self.sequence):
            following.pieces[piece] = weights
            return -1, weights
        before = base.pieces[piece]
        if id(before) not in self._made:
            self._made[id(before)] = self._encode(self.codec, piece, before, weights)
        message, after = self._made[id(before)]
        following.pieces[piece] = after
        return base.sequence, message

    def end(self) -> None:
        """All pieces were sent."""
        self._bases |= self._next

    def _encode(
        self, codec: MessageCodec, piece: int, before: Values, weights: Values
    ) -> tuple[Values, Values]:
        messages, after = [], []
        for place, (held, now) in enumerate(zip(before, weights, strict=True)):
            difference = to_exact(now) - to_exact(held)
            seed = mix(self.sequence, self.index, piece, place)
            messages.append(codec.encode(difference, seed))
            after.append(add_message(codec, messages[-1], held))
        return tuple(messages), tuple(after)


def to_exact(values: Tensor) -> Tensor:
    """In float32 or wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def add_message(codec: MessageCodec, message: Tensor, held: Tensor) -> Tensor:
    """Held values and the difference in a message: the same bits at both ends.

    Raises:
        ValueError, IndexError, RuntimeError: it is no message for so many values.
    """
    difference = torch.empty_like(to_exact(held))
    codec.decode(message, difference)
    return difference.add_(held).to(held.dtype)
