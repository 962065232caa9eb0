"""A worker's own questions to others that it gossips with, one at a time."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
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

COPIERS = 4


@dataclass
class Question:
    """What was asked, of whom, and what came of it. heard_s: when its host last said something."""

    content: str
    number: int
    host: str
    place: str
    outgoing: Outgoing | None
    incoming: Incoming
    asked_s: float
    heard_s: float


class Visitor:
    """Asks one host at a time, and goes on asking until there is an answer or no host.

    A question that was given up may have been answered all the same: what comes of it later is
    taken in, so that nothing of the sum of all weights is lost between two that are alive.

    Under a codec it keeps a copy of what each host knows of its weights, while that is certain: no
    longer than until a question is given up.

    Args:
        repeat_s: after which a question is asked again. give_up_s: silence of a host after which it
            is given up.

    Attributes:
        question: that is out.
        places: of the hosts that were asked.
    """

    def __init__(self, packing: Packing, repeat_s: float, give_up_s: float) -> None:
        self._packing, self._repeat_s, self._give_up_s = packing, repeat_s, give_up_s
        self.question: Question | None = None
        self._given_up: dict[tuple[str, int], Question] = {}
        self._known: dict[str, PublicCopy] = {}  # by host
        self._next = 0

    @property
    def is_offering(self) -> bool:
        return self.question is not None and self.question.content == OFFER

    def expects(self, place: str) -> bool:
        """Whether an answer may still come from there."""
        own = self.question is not None and self.question.place == place
        return own or any(each == place for each, _ in self._given_up)

    def number(self) -> int:
        """Of the next question."""
        return self._next

    def known(self, host: str) -> PublicCopy | None:
        """What a host knows of this worker's weights, since they met last."""
        return self._known.get(host)

    def forget_others(self, hosts: Collection[str]) -> None:
        """Hosts but these are gone, and what they knew."""
        self._known = {host: copy for host, copy in self._known.items() if host in hosts}

    def ask(
        self,
        content: str,
        host: str,
        place: str,
        now_s: float,
        flats: Flats | None = None,
        logs: list[list[Any]] | None = None,
        base: int = -1,
        encoded: Sequence[tuple[Tensor, ...]] = (),
    ) -> list[Mail]:
        """Ask an `OFFER` or `LAST`, with weights, or a `COPY`, without.

        base, encoded: as of `Outgoing`.
        """
        assert self.question is None, "another question is out"
        number = self._next
        self._next += 1
        outgoing = None
        if flats is not None:
            outgoing = Outgoing(
                self._packing, content, number, flats, logs or [], now_s, base, encoded
            )
        incoming = Incoming(self._packing, ANSWERS[content], number, base)
        self.question = Question(
            content, number, host, place, outgoing, incoming, asked_s=now_s, heard_s=now_s
        )
        if outgoing is None:
            return [(place, Want(number=number))]
        return [(place, message) for message in outgoing.send()]

    def handle(self, place: str, message: Message, now_s: float) -> list[Mail]:
        """Take in what a host says.

        Raises:
            Malformed: a piece of something else; nothing has changed.
        """
        own = self.question
        if own is not None and own.place == place:
            own.heard_s = now_s
        match message:
            case Parcel(content=content, number=number) if content in OF_HOSTS:
                question = self._find(place, number)
                if question is None or content != question.incoming.content:
                    return [(place, Received(content=content, number=number))]
                is_new = question.incoming.take(message)
                if question.incoming.is_whole and is_new:
                    return [(place, Received(content=content, number=number))]
            case Query(content=content, number=number) if content in OF_HOSTS:
                question = self._find(place, number)
                missing = [] if question is None else question.incoming.missing
                return [(place, Received(content=content, number=number, missing=missing))]
            case Received(content=content, number=number) if content in OF_VISITORS:
                question = self._find(place, number)
                if question is not None and question.outgoing is not None and message.missing:
                    pieces = question.outgoing.send(message.missing)
                    return [(place, piece) for piece in pieces]
            case Declined(number=number):
                if own is not None and (own.place, own.number) == (place, number):
                    self.question = None
                    if message.lacks:
                        self._known.pop(own.host, None)
        return []

    def _find(self, place: str, number: int) -> Question | None:
        own = self.question
        if own is not None and (own.place, own.number) == (place, number):
            return own
        return self._given_up.get((place, number))

    @property
    def has_landed(self) -> bool:
        """Whether an answer is here."""
        own = [] if self.question is None else [self.question]
        return any(each.incoming.is_whole for each in (*own, *self._given_up.values()))

    def landed(self) -> list[Question]:
        """Those whose answers are here, which are no longer out."""
        found = [each for each in self._given_up.values() if each.incoming.is_whole]
        for question in found:
            del self._given_up[question.place, question.number]
        if self.question is not None and self.question.incoming.is_whole:
            found.append(self.question)
            self._agree(self.question)
            self.question = None
        return found

    def _agree(self, question: Question) -> None:
        """The two have met, and both know what this worker's weights are since then."""
        said = question.outgoing
        if self._packing.codec is None or question.content != OFFER or said is None:
            return
        copy = self._known.setdefault(question.host, PublicCopy(self._packing))
        copy.hear(said.flats, is_encoded=said.base >= 0)
        copy.meet(question.number, question.incoming.flats)

    def give_up(self) -> None:
        """Nothing more is expected of the question that is out."""
        question, self.question = self.question, None
        if question is not None and question.content == OFFER:
            self._known.pop(question.host, None)  # it may have been answered, or not
            self._given_up[question.place, question.number] = question

    def tick(self, now_s: float) -> list[Mail]:
        question = self.question
        if question is None or question.incoming.is_whole:
            return []
        shares = COPIERS if question.content == COPY else 1  # one of the others has weights, too
        if now_s - question.heard_s > self._give_up_s / shares:
            self.give_up()
            return []
        if now_s - question.asked_s < self._repeat_s:
            return []
        question.asked_s = now_s
        if question.content == COPY:
            return [(question.place, Want(number=question.number))]
        return [(question.place, Query(content=question.content, number=question.number))]
