"""One peer of a socket link: its connection, what travels each way, and whether it is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import zmq

from allfuse.base.errors import BadMessage, PeerLost
from allfuse.link.frame import COLLECTIVES, STREAMS, Header, Kind, Malformed, parse
from allfuse.link.stream import Incoming, Outgoing
from allfuse.link.transfer import Failure, Receiving, Sending

if TYPE_CHECKING:
    from allfuse.link.socket import SocketLink

WHY_BYTES = 300  # of the reason that is told to peers


class Peer:
    """A ZeroMQ PAIR: one connection, which takes no second one. Use it under the link's lock.

    Every message has two frames: header and payload. What comes is read as soon as it is there,
    whether it is waited for or not, so that heartbeats, farewells and ends of connections are
    never behind something else; `stream.WINDOW_BYTES` bounds what that can hold.

    Attributes:
        present: its HELLO has come.
        left: its BYE has come; seen: it has answered ours.
        failure: why nothing more goes to it, or comes.
        parted: the connection has ended; over: it is of no more use, whoever ended it.
    """

    def __init__(self, link: SocketLink, rank: int, socket: zmq.Socket[bytes]) -> None:
        self.link, self.rank, self.socket = link, rank, socket
        self.member = link.members[rank]
        self.present = self.left = self.seen = self.parted = self.over = False
        self.failure: Failure | None = None
        self.outgoing = [Outgoing() for _ in range(STREAMS)]
        self.incoming = [Incoming() for _ in range(STREAMS)]

    def send(self, sending: Sending, stream: int) -> None:
        """Hand over what may go at once; the rest follows as credit comes."""
        failure = self.outgoing[stream].failure or self.failure
        if failure is not None:
            sending.end(failure)
            return
        self.outgoing[stream].pending.append(sending)
        self._pump(stream)
        self._look_again()

    def receive(self, receiving: Receiving, stream: int) -> None:
        incoming = self.incoming[stream]
        incoming.posted.append(receiving)
        self._guard(lambda: incoming.match(), stream)
        if self.failure is None:
            self._look_again()

    def say(self, kind: Kind, stream: int = 0, amount: int = 0, payload: bytes = b"") -> None:
        header = Header(kind, self.link.about, self.link.member, stream, amount=amount)
        if not self.over:
            self._ship(header, payload)
            self._look_again()

    def attend(self) -> bool:
        """Take one message in; whether there may be more."""
        if self.over:
            return False
        events = int(self.socket.get(zmq.EVENTS))
        if events & zmq.POLLIN:
            self._take_in()
            return not self.over
        was_there = self.present or self.link.connects_to(self.rank)
        if was_there and not events & zmq.POLLOUT:
            self.parted = True
            self.drop(Failure(PeerLost, "its connection ended without a farewell"))
        return False

    def fail(self, failure: Failure) -> None:
        """Nothing more goes; what has come is still given out."""
        self.failure = self.failure or failure
        for outgoing in self.outgoing:
            outgoing.fail(self.failure)
        for incoming in self.incoming:
            incoming.fail(self.failure)
        self.link.changed.notify_all()

    def drop(self, failure: Failure) -> None:
        """Also give up the connection."""
        self.over = True
        self.fail(failure)
        self.link.nudge(self)

    def _distrust(self) -> None:
        """What it sent says more than that it has left, and nothing else of it is given out."""
        self.failure = None
        for outgoing in self.outgoing:
            outgoing.failure = None
        for incoming in self.incoming:
            incoming.failure = None
            incoming.arrived.clear()

    def close(self) -> None:
        self.socket.close(0)

    def _look_again(self) -> None:
        """Calls use up the signal by which the carrier learns that something has come."""
        events = int(self.socket.get(zmq.EVENTS))
        if events & zmq.POLLIN or not events & zmq.POLLOUT:
            self.link.nudge(self)

    def _pump(self, stream: int) -> None:
        outgoing = self.outgoing[stream]
        while (piece := outgoing.next_piece()) is not None:
            sending = outgoing.pending[0]
            header = Header(
                Kind.DATA,
                self.link.about,
                self.link.member,
                stream,
                sending.dtype,
                sending.about,
                outgoing.sequence,
                piece.start,
                sending.elements,
                sending.operation,
            )
            payload: Any = sending.data[piece].data
            if not sending.copied:
                last = piece.stop == len(sending.data)
                payload = zmq.Frame(payload, track=last, copy_threshold=0)
                sending.freed = payload.tracker if last else None
            if not self._ship(header, payload):
                return
            outgoing.hand_over(piece)

    def _ship(self, header: Header, payload: Any) -> bool:
        """Whether ZeroMQ took it; it does not when the connection has ended."""
        try:
            self.socket.send(header.pack(), zmq.NOBLOCK | zmq.SNDMORE)
            self.socket.send(payload, zmq.NOBLOCK, copy=not isinstance(payload, zmq.Frame))
        except zmq.Again:
            return False
        return True

    def _take_in(self) -> None:
        data = self.socket.recv(zmq.NOBLOCK)
        frames: list[memoryview] = []
        while self.socket.get(zmq.RCVMORE):
            frames.append(self.socket.recv(zmq.NOBLOCK, copy=False).buffer)

        def handle() -> None:
            header = parse(data, self.link.about, self.member)
            if len(frames) != 1:
                raise Malformed(f"a message of {1 + len(frames)} frames; allowed: 2")
            if not self.present and header.kind != Kind.HELLO:
                raise Malformed(f"{header.kind.name} before its HELLO")
            self._handle(header, frames[0])

        self._guard(handle)

    def _guard(self, handle: Callable[[], None], stream: int | None = None) -> None:
        """Do it; a peer that sent what it may not is dropped. Give the credit that is due."""
        try:
            handle()
        except Malformed as error:
            self._distrust()
            self.drop(Failure(BadMessage, f"sent {error}"))
        for number, incoming in enumerate(self.incoming):
            if stream in (None, number) and (owed := incoming.take_credit()):
                self.say(Kind.CREDIT, number, owed)

    def _handle(self, header: Header, payload: memoryview) -> None:
        if header.kind == Kind.DATA:
            self.incoming[header.stream].arrive(header, payload)
        elif header.kind == Kind.CREDIT:
            self.outgoing[header.stream].give_credit(header.amount)
            self._pump(header.stream)
        elif header.kind == Kind.HELLO:
            self._greet()
        elif header.kind == Kind.BYE:
            self.left = True
            self.say(Kind.SEEN)
            self.fail(Failure(PeerLost, "closed its link"))
        elif header.kind == Kind.SEEN:
            self.seen = True
            self.link.changed.notify_all()
        else:
            why = bytes(payload[:WHY_BYTES]).decode("utf-8", "replace")
            failure = Failure(PeerLost, why, header.amount)
            self.incoming[COLLECTIVES].fail(failure)
            self.outgoing[COLLECTIVES].fail(failure)

    def _greet(self) -> None:
        if self.present:
            raise Malformed("a second HELLO")
        self.present = True
        if not self.link.connects_to(self.rank):
            self.say(Kind.HELLO)
        self.link.changed.notify_all()
