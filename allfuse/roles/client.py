"""A worker's side of servers and scheduler. Sans I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from allfuse.link.post import Malformed
from allfuse.roles.blueprint import Blueprint
from allfuse.roles.delivery import Delivery
from allfuse.roles.insistence import Insistence
from allfuse.roles.messages import (
    SCHEDULER,
    Again,
    Beat,
    Give,
    Join,
    Lease,
    Leave,
    Mail,
    Message,
    Push,
    Refused,
    Repush,
    Staged,
    Weights,
    Welcome,
)
from allfuse.roles.replica import Replica
from allfuse.roles.rotation import ALL
from allfuse.roles.server import GIVEN
from allfuse.roles.updates import Updates


class Phase(Enum):
    JOINING = "joining"
    WAITING = "waiting"  # for a lease and its weights
    WORKING = "working"  # from `begin` to `finish`


class Client:
    """Joins, works on leases, brings updates to the servers and takes weights in.

    Messages come in by `handle`, time by `tick`; every method gives what there is to send, to
    "scheduler" or to a server by its place. Whoever hears nothing for `repeat_s` says its last
    message again, then after twice as long, and so on up to eight times.

    A revoked lease shows in `lease` becoming another one while one works: what is pushed for the
    old one then goes nowhere. What a codec lost of an update that was finished and then revoked all
    the same is still added to the next one.

    Args:
        join: what this worker says of itself and the job.
        blueprint: of the model; the one in `join`.
        servers: how many there are.
        rank: of the worker, whose ranks may share the model: each has a client, for what it has of
            that. The first one's talks to the scheduler; the others are handed what that one heard,
            by `follow`, and what they have to say to the scheduler themselves is to be dropped.

    Attributes:
        replica: the weights. updates: what is pushed.
        lease: what to work on, None before the first; its number is -1 at the end.
        places: of the servers, in the order of shards.
        options: of the optimizer that are not the blueprint's, by group; see
            `Blueprint.changed_options`.
        own_share: what is kept, where newer weights come, of those that are worked on.
        refusal: why this worker may not take part; empty where it may.
        heard: what other ranks are to be handed before the next lease, in its order; empty it.
        kept: the lease whose update was the last to count for sure.
        is_awaited: whether other ranks of the worker still wait for weights that are here, so that
            these are asked for again in their time.

    Example:
        client = Client(join, blueprint, servers=2)
        client.replica.load(dict(model.named_parameters()))
        send(client.tick(now_s))
        while not client.is_over:                   # `receive` hands messages to `client.handle`
            receive_until(lambda: client.is_ready or client.is_over)
            lease = client.begin(now_s)
            send(client.push(gradients, now_s))     # as often as gradients become final
            send(client.finish(now_s, loss=2.0, count=8.0, rows=8, seconds=0.1))
    """

    def __init__(
        self,
        join: Join,
        blueprint: Blueprint,
        servers: int,
        *,
        rank: int = 0,
        device: torch.device | str = "cpu",
        repeat_s: float = 1.0,
        beat_s: float = 2.5,
    ) -> None:
        self._join, self.servers = join, servers
        self.replica = Replica(blueprint, servers, device, rank)
        self.updates = Updates(self.replica, join.name)
        self.lease: Lease | None = None
        self.places: list[str] = []
        self.number = -1
        self.options: list[dict[str, Any]] = []
        self.refusal = ""
        self.own_share = 0.0
        self.heard: list[Message] = []
        self.kept = -1
        self.is_awaited = False
        self._begun = -1  # the version that the last lease was begun from
        self._phase = Phase.JOINING
        self._deliveries: dict[int, Delivery] = {}
        self._current: Delivery | None = None  # what belongs to `lease`, from `begin` on
        self._waiting: dict[tuple[int, int], tuple[int, Weights]] = {}  # while one works
        self._holds = False
        self._pace = Insistence(repeat_s, beat_s)

    # How it stands.

    @property
    def is_working(self) -> bool:
        """Whether the lease that was begun is still to be worked on."""
        return self._phase is Phase.WORKING

    @property
    def is_ready(self) -> bool:
        """There is a lease to begin, and its weights are here."""
        return self._has_weights and self.lease is not None and self.lease.lease >= 0

    @property
    def upcoming(self) -> Lease | None:
        """The lease that is to be begun, though its weights may be on their way; None while there
        is none."""
        lease, waits = self.lease, self._phase is Phase.WAITING and self._current is None
        return lease if waits and lease is not None and lease.lease >= 0 else None

    @property
    def is_over(self) -> bool:
        """There is no more work, and the last weights are in `replica.read`, where there are any;
        or this worker was refused."""
        lease = self.lease
        ended = lease is not None and lease.lease < 0 and (lease.sequence < 0 or self._has_weights)
        return ended or bool(self.refusal)

    @property
    def _has_weights(self) -> bool:
        if self.lease is None or self._phase is not Phase.WAITING or self._current is not None:
            return False
        return self.replica.is_whole(
            self.lease.sequence, ALL if self.lease.due else self.lease.takes
        )

    # What the worker does.

    def begin(self, now_s: float) -> Lease:
        """Work on the lease that is ready; `replica.tensors` hold its weights, or a mean of those
        and what they have come to; where the lease takes in one fragment of them, the others are
        what they have come to."""
        if not self.is_ready or self.lease is None:
            raise RuntimeError("no lease is ready; wait for `is_ready`")
        lease = self.lease
        own = self.own_share if -1 < self._begun < lease.sequence else 0.0
        if lease.follows != self.updates.lease:
            self.replica.rewind()
        if lease.takes == ALL or lease.sequence != self._begun:
            self.replica.settle(own, lease.takes)
        self.replica.remember()
        self._begun = lease.sequence
        self.updates.undo(own)
        self.updates.begin(lease.lease, lease.clock, lease.fragment)
        self._phase, self._holds = Phase.WORKING, False
        self._current = Delivery(lease.lease, lease.clock, lease.sequence, lease.fragment)
        self._deliveries[lease.lease] = self._current
        return lease

    def push(self, gradients: Mapping[str, Tensor], now_s: float, scale: float = 1.0) -> list[Mail]:
        """Some gradients, by name, are final: times `scale` means over this worker's own count."""
        if self._phase is not Phase.WORKING:
            return []
        return self._send_pieces(self.updates.put(gradients, scale))

    def finish(
        self, now_s: float, *, loss: float, count: float, rows: int, seconds: float
    ) -> list[Mail]:
        """The update is whole. Gradients that were not pushed are zero."""
        if self._phase is not Phase.WORKING or self._current is None:
            return []
        mail = self._send_pieces(self.updates.rest())
        self._current.finished = {
            "loss": loss,
            "count": count,
            "rows": rows,
            "seconds": seconds,
            "options": self.options,
        }
        self._phase = Phase.WAITING
        self._pace.progress(now_s)
        self._take_waiting()
        return self._pace.said(mail + self._current.tell(self.places), now_s)

    def leave(self) -> list[Mail]:
        """Go; what was begun is given to others."""
        return [(SCHEDULER, Leave())]

    def _send_pieces(self, homes: list[tuple[int, int]]) -> list[Mail]:
        delivery = self._current
        assert delivery is not None
        mail: list[Mail] = []
        for server, piece in homes:
            message = Push(
                lease=delivery.lease,
                sequence=delivery.sequence,
                piece=piece,
                pieces=len(self.replica.shards[server]),
                options=self.options,
                fragment=delivery.fragment,
                tensors=self.updates.piece(server, piece),
            )
            delivery.pieces[server, piece] = message
            mail.append((self.places[server], message))
        return mail

    # What comes in.

    def handle(self, sender: str, message: Message, now_s: float) -> list[Mail]:
        """Take a message in.

        Raises:
            Malformed: it is nothing that this sender says to a worker; nothing has changed.
        """
        if sender == SCHEDULER:
            return self._pace.said(self._hear_scheduler(message, now_s), now_s)
        if sender not in self.places:
            return []
        server = self.places.index(sender)
        match message:
            case Staged():
                return self._pace.said(self._staged(server, message, now_s), now_s)
            case Weights():
                self._take(server, message, now_s)
                return []
        raise Malformed(f"a {message.kind} from a server")

    def _hear_scheduler(self, message: Message, now_s: float) -> list[Mail]:
        match message:
            case Welcome():
                self._note(message)
                return self._welcome(message, now_s)
            case Refused():
                self.refusal = message.reason
                return []
            case Lease():
                self._take_lease(message, now_s)
                return []
            case Repush():
                self._note(message)
                self._move(message.places)
                return self._deliver_again(self._deliveries.get(message.lease), now_s)
        raise Malformed(f"a {message.kind} from the scheduler")

    def _note(self, message: Message) -> None:
        blocks = self.replica.blueprint.blocks
        if self.replica.rank == 0 and any(rank for block in blocks for rank in block.ranks):
            self.heard.append(message)

    def _move(self, places: list[str]) -> bool:
        """Where the servers are now; whether that is said of all."""
        if len(places) == self.servers:
            self.places = list(places)
        return len(places) == self.servers

    def _welcome(self, message: Welcome, now_s: float) -> list[Mail]:
        if not self._move(message.places):
            return []
        self.number = message.number
        if self._phase is Phase.JOINING:
            self._phase = Phase.WAITING
            self._pace.progress(now_s)
        if not message.gives_weights:
            return []
        given = Delivery(GIVEN, -1, self.replica.sequence)
        for server, pieces in enumerate(self.replica.shards):
            for number, piece in enumerate(pieces):
                if piece.ranks[0] == self.replica.rank:
                    values = self.replica.copy(server, number)
                    give = Give(piece=number, pieces=len(pieces), tensors=values)
                    given.pieces[server, number] = give
        given.finished = {"loss": 0.0, "count": 0.0, "rows": 0, "seconds": 0.0}
        self._deliveries[GIVEN] = given
        return self._deliver_again(given, now_s)

    def _deliver_again(self, delivery: Delivery | None, now_s: float) -> list[Mail]:
        if delivery is None:
            return []
        self._pace.progress(now_s)
        return delivery.restart(self.places)

    def _staged(self, server: int, message: Staged, now_s: float) -> list[Mail]:
        delivery = self._deliveries.get(message.lease)
        if delivery is None:
            return []
        self._pace.progress(now_s)
        return delivery.heard(server, message, self.places)

    def _take_lease(self, message: Lease, now_s: float) -> None:
        if self._phase is Phase.JOINING and message.sequence >= 0:
            return  # the weights would come from nowhere: it is said again after the welcome
        given, held = self._deliveries.get(GIVEN), self.lease
        if given is not None and given.is_told and given.sequence < message.sequence:
            del self._deliveries[GIVEN]  # servers went on from there
        if held is not None and held.lease == message.lease:
            if message.sequence > held.sequence and self._current is None:
                self.lease = message  # other weights for it, since those before did not come
                self._pace.progress(now_s)
            return
        if held is not None and not (message.lease < 0 or 0 <= held.lease < message.lease):
            return  # it is late
        self._close_current()
        ended = [
            delivery.lease
            for delivery in self._deliveries.values()
            if delivery.lease != GIVEN and (message.lease < 0 or delivery.clock < message.clock)
        ]
        for lease in ended:
            del self._deliveries[lease]
        self.lease, self._phase = message, Phase.WAITING
        self._pace.progress(now_s)
        self._take_waiting()

    def _close_current(self) -> None:
        """Another lease has come: the update of the last one was finished, or is revoked."""
        if self._current is None:
            return
        if self._current.was_told:
            self.updates.keep()
            self.kept = self._current.lease
        else:
            del self._deliveries[self._current.lease]
        self._current = None

    def _take(self, server: int, message: Weights, now_s: float) -> None:
        """Weights that come while one works wait: they must not change under a backward pass."""
        if self._phase is Phase.WORKING or self._holds:
            _, held = self._waiting.get((server, message.piece), (0, message))
            if held.sequence <= message.sequence:
                self._waiting[server, message.piece] = server, message
        elif self.replica.take(server, message):
            self._pace.progress(now_s)

    def _take_waiting(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for server, message in waiting.values():
            self.replica.take(server, message)

    # What other ranks of a worker than the first do.

    def follow(
        self, heard: Sequence[Message], lease: Lease | None, kept: int, now_s: float
    ) -> list[Mail]:
        """Take in what the first rank has heard, and the lease that it is to begin.

        Args:
            kept: of the first rank.
        """
        mail = [each for message in heard for each in self.handle(SCHEDULER, message, now_s)]
        if lease is not None:
            if self._current is not None:
                self._current.was_told = self._current.lease == kept
            mail += self.handle(SCHEDULER, lease, now_s)
        return mail

    def hold(self) -> None:
        """What there is to begin with stays as it is, until `begin` or `release`."""
        self._holds = True

    def release(self) -> None:
        """Take in again what comes."""
        self._holds = False
        self._take_waiting()

    def be_patient(self, now_s: float) -> None:
        """Other ranks of this worker still get what they need: it is not asked for again."""
        self._pace.progress(now_s)

    # Time.

    def lost(self, name: str, now_s: float) -> list[Mail]:
        """A connection has ended: what was on its way is said again soon."""
        self._pace.hurry(now_s)
        return []

    def tick(self, now_s: float) -> list[Mail]:
        """To be called a few times in `repeat_s`; the first time joins."""
        if self.refusal or (self.is_over and not self.is_awaited):
            return []
        mail: list[Mail] = []
        if self._pace.is_due(now_s):
            mail = self._say_again()
            self._pace.again(now_s)
        if self._phase is not Phase.JOINING and self._pace.beats(mail, now_s):
            mail.append((SCHEDULER, Beat()))
        return self._pace.said(mail, now_s)

    def _say_again(self) -> list[Mail]:
        if self._phase is Phase.JOINING:
            return [(SCHEDULER, self._join)]
        mail: list[Mail] = []
        for delivery in self._deliveries.values():
            if delivery.finished is not None:
                mail += delivery.ask(self.places)
                if self._phase is Phase.WAITING:
                    mail += delivery.tell(self.places)
        if self._phase is Phase.WORKING:
            return mail
        if self.lease is not None and self._current is None:
            again = Again(lease=self.lease.lease, sequence=self.lease.sequence)
            mail.append((SCHEDULER, again))
        if self._current is None or not self._current.is_told or self._pace.pauses > 1:
            mail.append((SCHEDULER, Again()))  # something else may be amiss
        return mail
