"""A worker that gossips: its side of the scheduler and of the other workers. Sans I/O.

Asynchronous decentralized SGD (AD-PSGD: Lian et al. 2018, arXiv:1710.06952), whose workers average
their weights in pairs while they train. There each waits for the answer, and the graph has two
sides, so that none waits in a circle; here none waits, on any graph. encounters.py draws one
exchange.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from allfuse.link.post import Malformed
from allfuse.roles.blueprint import Blueprint
from allfuse.roles.client import Phase
from allfuse.roles.diary import (
    ANSWERED,
    APPLIED,
    COPIED,
    GATHERED,
    GAVE,
    LENT,
    OFFERED,
    Diary,
)
from allfuse.roles.encounters import (
    ANSWER,
    COPY,
    LAST,
    MEAN,
    OFFER,
    Log,
    Logged,
    Peers,
    is_of_host,
)
from allfuse.roles.host import Host, priority
from allfuse.roles.insistence import Insistence
from allfuse.roles.messages import (
    SCHEDULER,
    Again,
    Beat,
    Finished,
    Join,
    Lease,
    Leave,
    Mail,
    Message,
    Refused,
    Welcome,
)
from allfuse.roles.mixing import half_way, mean_of
from allfuse.roles.parcels import Flats, Packing
from allfuse.roles.public import seed_of
from allfuse.roles.visitor import Question, Visitor

Partner = Callable[[int, int, int], int | None]
"""The place of the one to ask, by one's own place, how many there are, and one's own round."""

GIVE_UP = 60.0  # times `repeat_s`, of silence


class Gossiper:
    """Joins, works on leases, and mixes its weights with others between its steps.

    Messages come in by `handle`, time by `tick`; every method gives what there is to send, to
    "scheduler", to a host by its place or to a visitor by its name. Weights change in `begin`,
    `meet` and `finish` only, and while it waits: never during a step.

    Args:
        join: what this worker says of itself and the job.
        flats: its weights, a flat tensor for each block of the blueprint; they are changed.
        partner: whom to ask.
        repeat_s, beat_s: as for `Client`.

    Attributes:
        lease: what to work on, None before the first; its number is -1 at the end.
        refusal: why this worker may not take part; empty where it may.
        exchanges: how many of its offers were answered. declined: how many were not.
        has_weights: it has some, its own first ones or a copy of somebody's.
        changes: how often its weights were changed other than by its own steps.
        options: as of `Client`; there are none.

    Example:
        gossiper = Gossiper(join, blueprint, flats, partner)
        while not gossiper.is_over:                 # `receive` hands messages to `gossiper.handle`
            receive_until(lambda: gossiper.is_ready or gossiper.is_over)
            lease = gossiper.begin(now_s)
            for step in range(lease.steps):
                ...                                 # a step that changes `flats`
                send(gossiper.meet(now_s))
            send(gossiper.finish(now_s, loss=2.0, count=8.0, rows=8, seconds=0.1))
    """

    def __init__(
        self,
        join: Join,
        blueprint: Blueprint,
        flats: Flats,
        partner: Partner,
        *,
        repeat_s: float = 1.0,
        beat_s: float = 2.5,
    ) -> None:
        self.name, self._join, self.flats = join.name, join, flats
        self._partner = partner
        self.packing = Packing(blueprint, flats[0].device if flats else "cpu")
        self.visitor = Visitor(self.packing, repeat_s, GIVE_UP * repeat_s)
        self.host = Host(self.packing, repeat_s, GIVE_UP * repeat_s)
        self.diary = Diary(self.name)
        self.lease: Lease | None = None
        self.refusal = ""
        self.exchanges = self.declined = self.changes = 0
        self.options: list[dict[str, Any]] = []
        self._phase = Phase.JOINING
        self._peers: list[tuple[str, int, str]] = []
        self._collector, self._version = "", -1
        self.has_weights = self._wants_offer = False
        self._gave = self._is_done = self._is_logged = False
        self._finished: Finished | None = None
        self._log: Log | None = None
        self._round = self._copies = 0
        self._begun = -1
        self._pace = Insistence(repeat_s, beat_s)

    # How it stands.

    @property
    def places(self) -> list[str]:
        """Of the workers that it may ask."""
        return [place for _, _, place in self._peers]

    @property
    def is_ready(self) -> bool:
        """There is a lease to begin."""
        return self._phase is Phase.WAITING and self.lease is not None and self._is_new(self.lease)

    def _is_new(self, lease: Lease) -> bool:
        return lease.lease > self._begun

    @property
    def is_over(self) -> bool:
        """There is no more work, and the weights are the mean of all; or it was refused."""
        if self.refusal:
            return True
        if self.lease is None or self.lease.lease >= 0:
            return False
        if self.lease.failed or self.lease.sequence < 0 or not self.has_weights:
            return True
        return self._is_done and not (self._log is not None and self._owes)

    @property
    def _owes(self) -> bool:
        """Whether, as the one that averaged, it is still to tell of it."""
        return not self._is_logged or self.host.owes([name for name, _, _ in self._peers])

    # What the worker does.

    def begin(self, now_s: float) -> Lease:
        """Work on the lease that is ready."""
        lease = self.lease
        if not self.is_ready or lease is None:
            raise RuntimeError("no lease is ready; wait for `is_ready`")
        self._phase, self._begun = Phase.WORKING, lease.lease
        self.diary.begin(lease.lease)
        return lease

    @property
    def is_to_meet(self) -> bool:
        """Whether a meeting now would read the weights, or change them."""
        waits = not self.visitor.is_offering and bool(self.host.held(OFFER))
        offers = self._wants_offer and self.visitor.question is None
        return self.visitor.has_landed or bool(self.host.held(COPY)) or waits or offers

    def pass_by(self) -> None:
        """A step of the lease is done, and there is nobody to meet."""
        self.diary.steps += 1

    def meet(self, now_s: float) -> list[Mail]:
        """A step of the lease is done: mix with others."""
        self.diary.steps += 1
        return self._pace.said(self._meet(now_s), now_s)

    def finish(
        self, now_s: float, *, loss: float, count: float, rows: int, seconds: float
    ) -> list[Mail]:
        """All steps of the lease are done."""
        lease, self._phase = self.lease, Phase.WAITING
        self._wants_offer = True
        self._pace.progress(now_s)
        mail = self._meet(now_s)
        if lease is not None and lease.lease == self._begun:  # else it was taken back meanwhile
            self._finished = Finished(
                lease=lease.lease, sequence=lease.sequence, births=[], loss=loss, count=count,
                rows=rows, seconds=seconds, logs=self.diary.logs(),
            )  # fmt: skip
            mail = [*mail, (SCHEDULER, self._finished)]
        return self._pace.said(mail, now_s)

    def leave(self) -> list[Mail]:
        """Go; what was begun is given to others."""
        return [(SCHEDULER, Leave())]

    # What comes in.

    def handle(self, sender: str, message: Message, now_s: float) -> list[Mail]:
        """Take a message in.

        Raises:
            Malformed: it is nothing that this sender says to a worker; nothing has changed.
        """
        if sender == SCHEDULER:
            mail = self._hear_scheduler(message, now_s)
        elif is_of_host(message):
            before = self.visitor.question
            mail = self.visitor.handle(sender, message, now_s)
            if before is not None and self.visitor.question is None:
                self._is_declined(before)
        else:
            own = self.visitor.question
            rank = None
            if own is not None and own.content == OFFER:
                rank = priority(self.name, own.number)
            mail = self.host.handle(sender, message, now_s, rank)
        if self._phase is Phase.WAITING:
            mail = mail + self._meet(now_s)
        return self._pace.said(mail, now_s)

    def expects(self, place: str) -> bool:
        """Whether something may still come from there."""
        return place in self.places or self.visitor.expects(place)

    def _is_declined(self, question: Question) -> None:
        """Its host could not answer: ask another one, or the same one again."""
        if question.content == OFFER:
            self.declined += 1
            self._wants_offer = True
        elif question.content == LAST:
            self._gave = False

    def _hear_scheduler(self, message: Message, now_s: float) -> list[Mail]:
        match message:
            case Welcome():
                return self._welcome(message, now_s)
            case Refused():
                self.refusal = message.reason
            case Lease():
                self._take_lease(message, now_s)
            case Peers():
                self._take_peers(message, now_s)
            case Logged():
                self._is_logged = message.count >= self.diary.count
            case _:
                raise Malformed(f"a {message.kind} from the scheduler")
        return []

    def _welcome(self, message: Welcome, now_s: float) -> list[Mail]:
        if self._phase is Phase.JOINING:
            self._phase = Phase.WAITING
            self._pace.progress(now_s)
        if message.gives_weights and not self.has_weights:
            self.visitor.give_up()
            self.has_weights = True
            self.diary.note(COPIED)
        return [(SCHEDULER, self._given())] if self.has_weights else []

    def _given(self) -> Finished:
        """What says that this worker has weights."""
        return Finished(
            lease=-1, sequence=-1, births=[], loss=0.0, count=0.0, rows=0, seconds=0.0,
            logs=self.diary.logs(),
        )  # fmt: skip

    def _take_lease(self, message: Lease, now_s: float) -> None:
        held = self.lease
        if held is not None and (held.lease < 0 <= message.lease or message.lease == held.lease):
            if held.lease < 0 and message.due != held.due:
                self.lease = message  # the one that was to average is lost, and it falls to this
            return
        if held is not None and 0 <= message.lease < held.lease:
            return  # it is late
        if self._finished is not None:
            own = next(each for each in self._finished.logs if each[0] == self.name)
            self.diary.settle(own[1] + len(own[2]), self._finished.logs)
            self._finished = None
        self.lease = message
        self._pace.progress(now_s)

    def _take_peers(self, message: Peers, now_s: float) -> None:
        try:
            peers = [(str(name), int(number), str(place)) for name, number, place in message.peers]
        except (ValueError, TypeError):
            raise Malformed("a list of peers that cannot be read") from None
        if message.version < self._version:
            return  # it is late
        self._version = message.version
        names = {name for name, _, _ in peers}
        self.host.forget_others(names, now_s)
        self.visitor.forget_others(names)
        if message.collector != self._collector:
            self._gave = False
        self._peers, self._collector = peers, message.collector
        question = self.visitor.question
        if question is None:
            return
        moved = question.content == LAST and question.host != self._collector
        if question.host not in names or moved:
            self.visitor.give_up()
        if self.name in names:
            self._pace.progress(now_s)

    # Between two steps.

    def _meet(self, now_s: float) -> list[Mail]:
        """Take in what has come, answer who waits, and ask the next one where that is due."""
        for question in self.visitor.landed():
            self._land(question)
        if not self.has_weights:
            return self._ask_for_copy(now_s)
        mail = self._lend(now_s)
        if not self.visitor.is_offering:
            mail += self._answer(now_s)
        if self.lease is not None and self.lease.lease < 0:
            return mail + self._end(now_s)
        if self._wants_offer and self.visitor.question is None:
            mail += self._offer(now_s)
        return mail

    @torch.no_grad()
    def _land(self, question: Question) -> None:
        """An answer is here."""
        parcel = question.incoming
        self.diary.hear(parcel.logs)
        if parcel.content == ANSWER:
            for values, difference in zip(self.flats, parcel.flats, strict=True):
                values.sub_(difference.to(values.device))
            self.diary.note(APPLIED, question.host, question.number)
            self.exchanges += 1
            self.changes += 1
        elif parcel.content == COPY and not self.has_weights:
            self._put(parcel.flats)
            self.diary.note(COPIED, question.host, question.number)
            self.has_weights = True
            self._pace.hurry(float("-inf"))  # say so at once
        elif parcel.content == MEAN:
            self._put(parcel.flats)
            self._is_done = True

    @torch.no_grad()
    def _put(self, flats: Flats) -> None:
        for values, others in zip(self.flats, flats, strict=True):
            values.copy_(others)

    def _ask_for_copy(self, now_s: float) -> list[Mail]:
        others = [peer for peer in self._peers if peer[0] != self.name]
        if self.visitor.question is not None or not others or self._phase is Phase.JOINING:
            return []
        name, _, place = others[self._copies % len(others)]
        self._copies += 1
        return self.visitor.ask(COPY, name, place, now_s)

    def _lend(self, now_s: float) -> list[Mail]:
        mail: list[Mail] = []
        for name, number, _ in self.host.held(COPY):
            self.diary.note(LENT, name, number)
            flats = self.packing.copy(self.flats)
            mail += self.host.answer(name, flats, self.diary.logs(), now_s)
        return mail

    @torch.no_grad()
    def _answer(self, now_s: float) -> list[Mail]:
        """Meet those half way whose offers wait."""
        mail: list[Mail] = []
        for name, number, offer in self.host.held(OFFER):
            assert offer is not None
            self.diary.hear(offer.logs)
            differences = self.packing.take(wide=offer.is_encoded)
            known, encoded = self.host.theirs(name), []
            for values, theirs, to in zip(self.flats, known, differences, strict=True):
                to.copy_(half_way(theirs.to(values.device), values))
            if offer.is_encoded:
                encoded = self.packing.encode(differences, seed_of(name, number, ANSWER))
            for values, difference in zip(self.flats, differences, strict=True):
                values.add_(difference.to(values.device))
            self.diary.note(ANSWERED, name, number)
            self.changes += 1
            mail += self.host.answer(name, differences, self.diary.logs(), now_s, encoded)
        return mail

    def _offer(self, now_s: float) -> list[Mail]:
        names = [name for name, _, _ in self._peers]
        if self.name not in names:
            return []
        self._wants_offer = False
        place = self._partner(names.index(self.name), len(names), self._round)
        codec, number = self.packing.codec, self.visitor.number()
        is_encoded = codec is not None and codec.encodes(self._round)
        self._round += 1
        if place is None:
            return []
        host, _, at = self._peers[place]
        known = self.visitor.known(host) if is_encoded else None
        if known is None:
            self.diary.note(OFFERED, host, number)
            flats = self.packing.copy(self.flats)
            return self.visitor.ask(OFFER, host, at, now_s, flats, self.diary.logs())
        self.diary.note(OFFERED, host, number, known.number)
        ahead = known.ahead(self.packing, self.flats)
        encoded = self.packing.encode(ahead, seed_of(self.name, number, OFFER))
        logs = self.diary.logs()
        return self.visitor.ask(OFFER, host, at, now_s, ahead, logs, known.number, encoded)

    # The end.

    def _end(self, now_s: float) -> list[Mail]:
        """All is learned: give the weights to the one that averages them, or average them."""
        assert self.lease is not None
        if self.lease.failed or self._is_done or self.visitor.question is not None:
            return []
        if self._collector == self.name:
            return self._gather(now_s)
        place = {name: place for name, _, place in self._peers}.get(self._collector)
        if place is None or self._gave:
            return []
        self._gave = True
        mail: list[Mail] = [*self.host.close()]
        self.diary.note(GAVE, self._collector, self.visitor.number())
        flats, logs = self.packing.copy(self.flats), self.diary.logs()
        return mail + self.visitor.ask(LAST, self._collector, place, now_s, flats, logs)

    @torch.no_grad()
    def _gather(self, now_s: float) -> list[Mail]:
        """Average all weights, once they are here, and send the mean to all."""
        given = {name: (number, parcel) for name, number, parcel in self.host.held(LAST)}
        if any(name not in given and name != self.name for name, _, _ in self._peers):
            return []
        mail: list[Mail] = [*self.host.close()]
        parts: list[Flats] = []
        for name, _, _ in self._peers:
            if name == self.name:
                self.diary.note(GATHERED, name)
                parts.append(self.packing.copy(self.flats))
                continue
            number, parcel = given[name]
            assert parcel is not None
            self.diary.hear(parcel.logs)
            self.diary.note(GATHERED, name, number)
            parts.append(parcel.flats)
        mean = [mean_of(list(values)) for values in zip(*parts, strict=True)]
        self._put(mean)
        self._is_done = True
        for name in given:
            mail += self.host.answer(name, mean, [], now_s)
        self._log = Log(logs=self.diary.logs())
        return [*mail, (SCHEDULER, self._log)]

    # Time.

    def lost(self, name: str, now_s: float) -> list[Mail]:
        """A connection has ended: what was on its way is asked for again soon."""
        self._pace.hurry(now_s)
        return []

    def tick(self, now_s: float) -> list[Mail]:
        """To be called a few times in `repeat_s`; the first time joins."""
        if self.refusal:
            return []
        mail = self.visitor.tick(now_s) + self.host.tick(now_s)
        if self._phase is Phase.WAITING:
            mail += self._meet(now_s)
        if not self.is_over and self._pace.is_due(now_s):
            mail += self._say_again()
            self._pace.again(now_s)
        if self._phase is not Phase.JOINING and self._pace.beats(mail, now_s):
            mail.append((SCHEDULER, Beat()))
        return self._pace.said(mail, now_s)

    def _say_again(self) -> list[Mail]:
        if self._phase is Phase.JOINING:
            return [(SCHEDULER, self._join)]
        mail: list[Mail] = []
        if self._log is not None and not self._is_logged:
            mail.append((SCHEDULER, self._log))
        if self._finished is not None:
            mail.append((SCHEDULER, self._finished))
        elif self.has_weights and self.lease is None:
            mail.append((SCHEDULER, self._given()))
        if self._phase is Phase.WAITING:
            mail.append((SCHEDULER, Again()))
        return mail
