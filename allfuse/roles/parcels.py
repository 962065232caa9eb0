"""Whole models on their way between two workers, in pieces that may come twice, late or never."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from allfuse.base.keys import mix
from allfuse.link.post import Malformed
from allfuse.roles.blueprint import Blueprint, read_codec
from allfuse.roles.cutting import Span, cut
from allfuse.roles.encounters import ANSWER, OFFER, Parcel
from allfuse.roles.message import Message
from allfuse.roles.pool import Pool

Flats: TypeAlias = list[Tensor]
"""A flat tensor (elements,) for each block of a blueprint."""

ENCODED = (OFFER, ANSWER)
"""What a codec is for; all else is copied exactly."""


class Packing:
    """How the blocks of a model are laid out in memory, and cut for the way.

    Args:
        device: of the model; what travels is on the CPU.

    Attributes:
        codec: of exchanges; None where nothing is lost.
    """

    def __init__(self, blueprint: Blueprint, device: torch.device | str = "cpu") -> None:
        self.blueprint, self.device = blueprint, torch.device(device)
        (self.pieces,) = cut(blueprint.blocks, 1)
        self.codec = read_codec(blueprint.codec)
        self._pools = [Pool(block.elements, block.dtype) for block in blueprint.blocks]
        self._wide = [
            pool if pool.dtype == exact else Pool(pool.elements, exact)
            for pool in self._pools
            for exact in [torch.promote_types(pool.dtype, torch.float32)]
        ]

    def take(self, *, wide: bool = False) -> Flats:
        """Memory on the CPU with whatever was left in it, to be used again when nobody reads it.

        wide: in float32 or wider.
        """
        return [pool.take() for pool in (self._wide if wide else self._pools)]

    @torch.no_grad()
    def copy(self, flats: Flats) -> Flats:
        """A copy on the CPU."""
        found = self.take()
        for to, values in zip(found, flats, strict=True):
            to.copy_(values)
        return found

    def views(self, flats: Flats, piece: int) -> tuple[Tensor, ...]:
        return tuple(flats[s.block][s.start : s.stop] for s in self.pieces[piece])

    def check(self, message: Parcel) -> None:
        """
        Raises:
            Malformed: it is no piece of this model.
        """
        if message.pieces != len(self.pieces) or not 0 <= message.piece < message.pieces:
            raise Malformed(f"piece {message.piece} of {message.pieces} of {len(self.pieces)}")
        is_encoded = message.base >= 0
        if is_encoded and (self.codec is None or message.content not in ENCODED):
            raise Malformed(f"a {message.content} that is encoded, with the codec {self.codec}")
        spans = self.pieces[message.piece]
        own = [self._form(span, is_encoded) for span in spans]
        if [(tensor.dtype, tuple(tensor.shape)) for tensor in message.tensors] != own:
            raise Malformed(f"piece {message.piece} holds other tensors than {len(spans)} spans")

    def _form(self, span: Span, is_encoded: bool) -> tuple[torch.dtype, tuple[int, ...]]:
        """Type and shape of what travels of some elements."""
        if is_encoded and self.codec is not None:
            return torch.uint8, (self.codec.encoded_bytes(span.elements),)
        return self.blueprint.blocks[span.block].dtype, (span.elements,)

    @torch.no_grad()
    def encode(self, flats: Flats, seed: int) -> list[tuple[Tensor, ...]]:
        """Each piece as it travels. The flats, wide ones, become what comes out of it."""
        assert self.codec is not None
        found = []
        for number in range(len(self.pieces)):
            messages = []
            for place, values in enumerate(self.views(flats, number)):
                messages.append(self.codec.encode(values, mix(seed, number, place)))
                self.codec.decode(messages[-1], values)
            found.append(tuple(messages))
        return found

    def decode(self, message: Parcel, views: Sequence[Tensor]) -> None:
        """What an encoded piece says.

        Raises:
            Malformed: it cannot be decoded.
        """
        assert self.codec is not None
        try:
            for values, tensor in zip(views, message.tensors, strict=True):
                self.codec.decode(tensor, values)
        except (ValueError, IndexError, RuntimeError) as error:
            raise Malformed(f"a {message.content} that cannot be decoded: {error}") from error


@dataclass
class Outgoing:
    """A parcel that was sent and is kept until it is known to be there.

    flats: what it says. base, encoded: as of `Parcel`, and each piece so, where it is encoded.
    asked_s: when it was asked last whether it is there, at first when it was sent.
    """

    packing: Packing
    content: str
    number: int
    flats: Flats
    logs: list[list[Any]]
    sent_s: float
    base: int = -1
    encoded: Sequence[tuple[Tensor, ...]] = ()
    asked_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.asked_s = self.sent_s

    def send(self, missing: Sequence[int] | None = None) -> list[Message]:
        """All pieces, or some of them."""
        count = len(self.packing.pieces)
        chosen = range(count) if missing is None else [n for n in missing if 0 <= n < count]
        return [
            Parcel(
                content=self.content,
                number=self.number,
                piece=piece,
                pieces=count,
                base=self.base,
                logs=[] if piece else self.logs,
                tensors=self._tensors(piece),
            )
            for piece in chosen
        ]

    def _tensors(self, piece: int) -> tuple[Tensor, ...]:
        return self.encoded[piece] if self.base >= 0 else self.packing.views(self.flats, piece)


@dataclass
class Incoming:
    """A parcel that comes in.

    base: as of `Parcel`; None before it is known. flats: memory for it, once a piece was there; of
    what is encoded, what comes out of the codec.
    """

    packing: Packing
    content: str
    number: int
    base: int | None = None
    flats: Flats = field(default_factory=list)
    logs: list[list[Any]] = field(default_factory=list)
    _arrived: set[int] = field(default_factory=set)

    @property
    def missing(self) -> list[int]:
        return [n for n in range(len(self.packing.pieces)) if n not in self._arrived]

    @property
    def is_encoded(self) -> bool:
        return self.base is not None and self.base >= 0

    @property
    def is_whole(self) -> bool:
        return len(self._arrived) == len(self.packing.pieces)

    @torch.no_grad()
    def take(self, message: Parcel) -> bool:
        """Take a piece in; whether it was new.

        Raises:
            Malformed: it is no piece of this model.
        """
        self.packing.check(message)
        if self.base not in (None, message.base):
            raise Malformed(f"a {message.content} of {message.base}, and not of {self.base}")
        if message.piece in self._arrived:
            return False
        self.base, is_encoded = message.base, message.base >= 0
        self.flats = self.flats or self.packing.take(wide=is_encoded)
        views = self.packing.views(self.flats, message.piece)
        if is_encoded:
            self.packing.decode(message, views)
        else:
            for to, values in zip(views, message.tensors, strict=True):
                to.copy_(values)
        if not message.piece:
            self.logs = message.logs
        self._arrived.add(message.piece)
        return True
