"""What others ask of a worker that gossips, and what it owes them."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch import Tensor

from allfuse.roles.encounters import (
    ANSWERS,
    COPY,
    OF_HOSTS,
    OF_VISITORS,
    OFFER,
    Declined,
    Parcel,
    Query,
    Received,
    Want,
)
from allfuse.roles.message import Message
from allfuse.roles.messages import Mail
from allfuse.roles.parcels import Flats, Incoming, Outgoing, Packing
from allfuse.roles.public import PublicCopy


class Stage(Enum):
    """Of a visitor's newest question."""

    ARRIVING = "arriving"
    HELD = "held"  # it is whole, and waits for this worker
    ANSWERED = "answered"
    DECLINED = "declined"


@dataclass
class Guest:
    """A visitor: its newest question, and the answers of which it has not said that they came.

    known: under a codec, what both know of its weights since they met. lacks: it was told that this
    worker has no such copy.
    """

    number: int = -1
    content: str = ""
    stage: Stage = Stage.DECLINED
    incoming: Incoming | None = None
    known: PublicCopy | None = None
    lacks: bool = False
    owed: dict[int, Outgoing] = field(default_factory=dict)
    gone_s: float | None = None


def priority(name: str, number: int) -> tuple[int, str]:
    """Of an offer. Hosts that have one of higher priority out hold others until that is answered:
    offers only ever wait for such of higher priority, so never in a circle."""
    return zlib.crc32(f"{name} {number}".encode()), name


class Host:
    """Takes in questions at any time; they are answered when this worker is between two steps.

    While it has an offer of its own out a worker answers no other: two that met half way at the
    same time would only have changed places. It holds offers of lower priority than its own, and
    declines the rest.

    Args:
        repeat_s: after which it is asked whether an answer came. give_up_s: how long answers are
            kept for visitors that are lost.

    Attributes:
        is_closed: this worker has given its last weights; offers are declined.
    """

    def __init__(self, packing: Packing, repeat_s: float, give_up_s: float) -> None:
        self._packing, self._repeat_s, self._give_up_s = packing, repeat_s, give_up_s
        self.is_closed = False
        self._guests: dict[str, Guest] = {}

    def owes(self, names: Collection[str]) -> bool:
        """Whether answers are on their way to one of these."""
        return any(name in names and guest.owed for name, guest in self._guests.items())

    def handle(
        self, name: str, message: Message, now_s: float, own: tuple[int, str] | None
    ) -> list[Mail]:
        """Take in what a visitor says. own: priority of the offer that this worker has out.

        Raises:
            Malformed: a piece of something else; nothing has changed.
        """
        mail: list[Message] = []
        match message:
            case Parcel(content=content, number=number) if content in OF_VISITORS:
                mail = self._take(name, message, own)
            case Want(number=number):
                guest = self._guest(name, number, COPY)
                if guest is not None and guest.stage is Stage.ARRIVING:
                    guest.stage = Stage.HELD
            case Query(content=content, number=number) if content in OF_VISITORS:
                mail = self._tell(name, content, number)
            case Received(content=content, number=number) if content in OF_HOSTS:
                mail = self._received(name, message)
        return [(name, each) for each in mail]

    def _guest(self, name: str, number: int, content: str) -> Guest | None:
        """The visitor, where a question is its newest; a new one takes the place of others."""
        guest = self._guests.setdefault(name, Guest())
        guest.gone_s = None
        if number > guest.number:
            guest.number, guest.content, guest.stage = number, content, Stage.ARRIVING
            guest.incoming, guest.lacks = None, False
            if content != COPY:
                guest.incoming = Incoming(self._packing, content, number)
        return guest if (number, content) == (guest.number, guest.content) else None

    def _take(self, name: str, message: Parcel, own: tuple[int, str] | None) -> list[Message]:
        self._packing.check(message)
        guest = self._guest(name, message.number, message.content)
        if guest is None:
            return []
        if guest.stage is not Stage.ARRIVING or guest.incoming is None:
            return []
        if message.base >= 0 and (guest.known is None or guest.known.number != message.base):
            guest.lacks = True
            return [self._decline(guest)]
        guest.incoming.take(message)
        if not guest.incoming.is_whole:
            return []
        is_higher = own is not None and priority(name, message.number) > own
        if message.content == OFFER and (self.is_closed or is_higher):
            return [self._decline(guest)]
        guest.stage = Stage.HELD
        return [Received(content=message.content, number=message.number)]

    def _decline(self, guest: Guest) -> Declined:
        guest.stage, guest.incoming = Stage.DECLINED, None
        return Declined(number=guest.number, lacks=guest.lacks)

    def _tell(self, name: str, content: str, number: int) -> list[Message]:
        """How a question stands."""
        guest = self._guest(name, number, content)
        if guest is None:
            return []
        if guest.stage is Stage.DECLINED:
            return [Declined(number=number, lacks=guest.lacks)]
        missing = []
        if guest.stage is Stage.ARRIVING and guest.incoming is not None:
            missing = guest.incoming.missing
        return [Received(content=content, number=number, missing=missing)]

    def _received(self, name: str, message: Received) -> list[Message]:
        guest = self._guests.get(name)
        answer = None if guest is None else guest.owed.get(message.number)
        if guest is None or answer is None or answer.content != message.content:
            return []
        if message.missing:
            return answer.send(message.missing)
        del guest.owed[message.number]
        return []

    def held(self, content: str) -> list[tuple[str, int, Incoming | None]]:
        """Visitors that wait for an answer, with their questions."""
        return [
            (name, guest.number, guest.incoming)
            for name, guest in self._guests.items()
            if guest.stage is Stage.HELD and guest.content == content
        ]

    def theirs(self, name: str) -> Flats:
        """The weights that a held offer is of, as far as they are known. To be asked for once."""
        guest = self._guests[name]
        assert guest.incoming is not None
        if self._packing.codec is None:
            return guest.incoming.flats
        guest.known = guest.known or PublicCopy(self._packing)
        return guest.known.hear(guest.incoming.flats, is_encoded=guest.incoming.is_encoded)

    def answer(
        self,
        name: str,
        flats: Flats,
        logs: list[list[Any]],
        now_s: float,
        encoded: Sequence[tuple[Tensor, ...]] = (),
    ) -> list[Mail]:
        """Answer a question that was held. The flats are kept, and must not change any more.

        encoded: their pieces, where the offer was; the flats are what comes out of them then.
        """
        guest = self._guests[name]
        base = -1 if guest.incoming is None or guest.incoming.base is None else guest.incoming.base
        guest.stage, guest.incoming = Stage.ANSWERED, None
        content = ANSWERS[guest.content]
        if guest.content == OFFER and guest.known is not None:
            guest.known.meet(guest.number, flats)
        answer = Outgoing(self._packing, content, guest.number, flats, logs, now_s, base, encoded)
        guest.owed[guest.number] = answer
        return [(name, message) for message in answer.send()]

    def close(self) -> list[Mail]:
        """Answer no more offers."""
        self.is_closed = True
        return [(name, self._decline(self._guests[name])) for name, _, _ in self.held(OFFER)]

    def forget_others(self, names: Collection[str], now_s: float) -> None:
        """Visitors but these are lost, or about to come: what they asked is not answered. What is
        owed is kept for a while."""
        for name, guest in self._guests.items():
            if name not in names and guest.gone_s is None and guest.content != COPY:
                guest.gone_s = now_s
                if guest.stage in (Stage.ARRIVING, Stage.HELD):
                    self._decline(guest)

    def tick(self, now_s: float) -> list[Mail]:
        mail: list[Mail] = []
        for name, guest in list(self._guests.items()):
            if guest.gone_s is not None and now_s - guest.gone_s > self._give_up_s:
                del self._guests[name]
                continue
            guest.owed = {
                number: answer
                for number, answer in guest.owed.items()
                if answer.content != COPY or now_s - answer.sent_s <= self._give_up_s
            }
            for answer in guest.owed.values():
                if now_s - answer.asked_s >= self._repeat_s:
                    answer.asked_s = now_s
                    mail.append((name, Query(content=answer.content, number=answer.number)))
        return mail
