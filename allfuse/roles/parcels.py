"""Whole models on their way between two workers, in pieces that may come twice, late or never."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from allfuse.link.post import Malformed
from allfuse.roles.blueprint import Blueprint
from allfuse.roles.cutting import cut
from allfuse.roles.encounters import Parcel
from allfuse.roles.message import Message
from allfuse.roles.pool import Pool

Flats: TypeAlias = list[Tensor]
"""A flat tensor (elements,) for each block of a blueprint."""


class Packing:
    """How the blocks of a model are laid out in memory, and cut for the way.

    Args:
        device: of the model; what travels is on the CPU.
    """

    def __init__(self, blueprint: Blueprint, device: torch.device | str = "cpu") -> None:
        self.blueprint, self.device = blueprint, torch.device(device)
        (self.pieces,) = cut(blueprint.blocks, 1)
        self._pools = [Pool(block.elements, block.dtype) for block in blueprint.blocks]

    def take(self) -> Flats:
        """Memory on the CPU with whatever was left in it, to be used again when nobody reads it."""
        return [pool.take() for pool in self._pools]

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
        spans, blocks = self.pieces[message.piece], self.blueprint.blocks
        own = [(blocks[span.block].dtype, (span.elements,)) for span in spans]
        if [(tensor.dtype, tuple(tensor.shape)) for tensor in message.tensors] != own:
            raise Malformed(f"piece {message.piece} holds other tensors than {len(spans)} spans")


@dataclass
class Outgoing:
    """A parcel that was sent and is kept until it is known to be there. asked_s: when that was
    asked last, at first when it was sent."""

    packing: Packing
    content: str
    number: int
    flats: Flats
    logs: list[list[Any]]
    sent_s: float
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
                logs=[] if piece else self.logs,
                tensors=self.packing.views(self.flats, piece),
            )
            for piece in chosen
        ]


@dataclass
class Incoming:
    """A parcel that comes in. flats: memory for it, once a piece was there."""

    packing: Packing
    content: str
    number: int
    flats: Flats = field(default_factory=list)
    logs: list[list[Any]] = field(default_factory=list)
    _arrived: set[int] = field(default_factory=set)

    @property
    def missing(self) -> list[int]:
        return [n for n in range(len(self.packing.pieces)) if n not in self._arrived]

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
        if message.piece in self._arrived:
            return False
        self.flats = self.flats or self.packing.take()
        views = self.packing.views(self.flats, message.piece)
        for to, values in zip(views, message.tensors, strict=True):
            to.copy_(values)
        if not message.piece:
            self.logs = message.logs
        self._arrived.add(message.piece)
        return True
