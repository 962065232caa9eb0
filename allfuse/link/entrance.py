"""How the members of a socket link find each other."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING

import zmq
from zmq.utils import z85

from allfuse.base.errors import BadMessage, DistributedError, PeerLost
from allfuse.link.carrier import Attended, Carrier
from allfuse.link.endpoint import Card, read_card, transport
from allfuse.link.frame import LAYOUT, Kind, Malformed
from allfuse.link.gate import Doorman, Gate
from allfuse.link.lookout import first_line
from allfuse.link.stream import PIECE_BYTES
from allfuse.link.transfer import SLICE_S, Failure

if TYPE_CHECKING:
    from allfuse.link.peer import Peer
    from allfuse.link.socket import SocketLink

MOST_SILENCE_S = 30.0  # without an answer to heartbeats, until a connection counts as ended
BEATS = 3  # in that time
HANDSHAKE_S = 10.0  # after which a stranger that says nothing is sent away
MOST_BYTES = PIECE_BYTES + LAYOUT.size + 1024  # of a message, what encryption adds included


class Entrance:
    """Listens for the higher ranks, one socket for each, and connects to the lower ones.

    A socket for each peer, since then ZeroMQ itself says which of them is gone, and a stranger
    stands between nobody.
    """

    def __init__(self, link: SocketLink, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.link, self.context, self.endpoint = link, context, link.endpoint
        self.gate = Gate(context)
        self.doormen: list[Doorman] = []
        self.public, self.secret = zmq.curve_keypair() if self.endpoint.encrypted else (b"", b"")
        self._begin = time.monotonic()

    @property
    def gone(self) -> int:
        """Connections that came to the listening sockets and ended."""
        return sum(doorman.gone for doorman in self.doormen)

    def open_socket(self) -> zmq.Socket[bytes]:
        """A socket to one peer, not yet connected."""
        silence_s = min(MOST_SILENCE_S, self.link.timeout_s / 2)
        socket = self.context.socket(zmq.PAIR)
        socket.set(zmq.SNDHWM, 0)  # the streams' windows bound what is under way
        socket.set(zmq.RCVHWM, 0)
        socket.set(zmq.MAXMSGSIZE, MOST_BYTES)
        socket.set(zmq.LINGER, 0)  # else what a lost peer did not take keeps the context for ever
        socket.set(zmq.RECONNECT_IVL, -1)  # a broken connection has lost something
        socket.set(zmq.HEARTBEAT_IVL, max(1, int(silence_s * 1000 / BEATS)))
        socket.set(zmq.HEARTBEAT_TIMEOUT, max(1, int(silence_s * 1000)))
        socket.set(zmq.HANDSHAKE_IVL, int(HANDSHAKE_S * 1000))
        socket.set(zmq.IPV6, int(":" in self.endpoint.bound))
        if self.secret:
            socket.set(zmq.CURVE_PUBLICKEY, self.public)
            socket.set(zmq.CURVE_SECRETKEY, self.secret)
        return socket

    def meet(self, carrier: Carrier) -> None:
        """Find all members, in three phases: listen and say where; read where; say hello.

        Starts the carrier. Raises PeerLost or BadMessage for a member that does not come.
        """
        link = self.link
        key = self._key(link.member)
        mine = Card(self.endpoint.told, {}, secrets.token_hex(16), self.public.decode())
        for peer in link.peers.values():
            if not link.connects_to(peer.rank):
                mine.ports[peer.member] = self._listen(peer)
        link.board.set(key, mine.pack(self.endpoint.token, key))
        cards = {peer: self._find(peer) for peer in link.peers.values()}
        for peer, card in cards.items():
            if link.connects_to(peer.rank):
                self._connect(peer, card)
            else:
                self._expect(peer, card, mine.password(self.endpoint.token, key, peer.member))
        held: list[Attended] = [*cards, self.gate, *self.doormen]
        for attended in held:
            carrier.add(attended)
        carrier.start()
        self._await_greetings()

    def _key(self, member: int) -> str:
        """Of the board, for what a member says of itself."""
        members = "-".join(map(str, self.link.members))
        return f"link/{self.link.name}/{members}/socket/{member}"

    def _listen(self, peer: Peer) -> int:
        """The port on which this peer is awaited."""
        peer.socket.set(zmq.ZAP_DOMAIN, str(peer.member).encode())
        peer.socket.set(zmq.CURVE_SERVER if self.secret else zmq.PLAIN_SERVER, 1)
        self.doormen.append(Doorman(peer.socket))
        peer.socket.bind(f"{transport(self.endpoint.bound)}:*")
        place = peer.socket.get(zmq.LAST_ENDPOINT)
        assert isinstance(place, bytes)
        return int(place.rstrip(b"\0").rpartition(b":")[2])

    def _find(self, peer: Peer) -> Card:
        """What a peer says of itself on the board."""
        key = self._key(peer.member)
        while True:
            left = self._left_s()
            try:
                value = self.link.board.wait(key, max(0.0, min(SLICE_S, left)))
                card = read_card(value, self.endpoint.token, key)
                self._check(card, peer)
                return card
            except TimeoutError:
                if left > 0 and not self.link.alarmed:
                    continue
                failure = Failure(PeerLost, "did not say where it listens")
            except RuntimeError as error:  # of a board that is gone
                failure = Failure(PeerLost, first_line(error))
            except Malformed as error:
                failure = Failure(BadMessage, f"wrote on the board {error}")
            raise self._error(failure, peer)

    def _check(self, card: Card, peer: Peer) -> None:
        if bool(card.key) != bool(self.secret):
            raise Malformed(
                f"that it {'encrypts' if card.key else 'does not encrypt'}, unlike this rank; "
                "allowed: the same for all"
            )
        if self.link.connects_to(peer.rank) and self.link.member not in card.ports:
            raise Malformed("an address without a port for this rank")

    def _connect(self, peer: Peer, card: Card) -> None:
        if self.secret:
            peer.socket.set(zmq.CURVE_SERVERKEY, card.key.encode())
        else:
            member, key = self.link.member, self._key(peer.member)
            peer.socket.set(zmq.PLAIN_USERNAME, str(member).encode())
            peer.socket.set(zmq.PLAIN_PASSWORD, card.password(self.endpoint.token, key, member))
        peer.socket.connect(card.place(self.link.member))
        peer.say(Kind.HELLO)

    def _expect(self, peer: Peer, card: Card, password: bytes) -> None:
        """By what the gate knows this peer."""
        name = str(peer.member).encode()
        self.gate.expected[name] = (z85.decode(card.key),) if self.secret else (name, password)

    def _await_greetings(self) -> None:
        link = self.link
        with link.lock:
            while absent := [peer for peer in link.peers.values() if not peer.present]:
                absent.sort(key=lambda peer: peer.failure is None)  # who came may have left again
                if absent[0].failure or self._left_s() <= 0 or link.alarmed:
                    break
                link.changed.wait(min(SLICE_S, self._left_s()))
        if absent:
            failure = absent[0].failure or Failure(PeerLost, "did not come")
            raise self._error(failure, absent[0])

    def _left_s(self) -> float:
        return self._begin + self.link.timeout_s - time.monotonic()

    def _error(self, failure: Failure, peer: Peer) -> DistributedError:
        seconds = time.monotonic() - self._begin
        return self.link.error(failure, peer, f"form link {self.link.name}", None, seconds)

    def close(self) -> None:
        for doorman in self.doormen:
            doorman.close()
        self.gate.close()
