"""What both ends of a ZeroMQ connection of the post share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import zmq

from allfuse.link.frame import Malformed
from allfuse.link.letter import MOST_BYTES, Letter, OtherVersion, Oversized, pack, unpack
from allfuse.link.post import End

LINGER_S = 1.0  # how long a close waits for what was sent to go
HANDSHAKE_S = 10.0  # after which a stranger that says nothing is sent away
SENT_LETTERS = 4096  # to one receiver that wait to go; their tensors are the sender's own memory
COME_LETTERS = 16  # of one sender that wait to be read; then it waits, by TCP
SHARED_BYTES = 1 << 16  # smaller tensors are copied: that is cheaper than to share their memory
CHECK_S = 0.01  # how often to look for newcomers and for ends of connections while letters come
POLLIN = int(zmq.POLLIN)


class Wired(End):
    """A socket in a context of its own: what it sends, what comes, and how to sleep until then."""

    def __init__(self, kind: int) -> None:
        self.refused = Counter()
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(kind)
        self.socket.set(zmq.LINGER, int(LINGER_S * 1000))
        self.socket.set(zmq.HANDSHAKE_IVL, int(HANDSHAKE_S * 1000))
        self.socket.set(zmq.MAXMSGSIZE, MOST_BYTES + 1024)  # what encryption adds included
        self.socket.set(zmq.SNDHWM, SENT_LETTERS)
        self.socket.set(zmq.RCVHWM, COME_LETTERS)
        self.socket.set(zmq.TCP_KEEPALIVE, 1)  # finds hosts that have vanished
        self.socket.set(zmq.TCP_KEEPALIVE_IDLE, 5)
        self.socket.set(zmq.TCP_KEEPALIVE_INTVL, 2)
        self.socket.set(zmq.TCP_KEEPALIVE_CNT, 3)
        self._shared: list[tuple[zmq.MessageTracker, int]] = []
        self._prune_at = 64
        self._next_check = 0.0
        self.watched = [(self.socket, POLLIN)]  # a subclass adds where else something may happen

    def is_due(self, now: float) -> bool:
        """Whether to look aside: when a sleep was ended by it, and every `CHECK_S`: a look costs as
        much as a letter."""
        if now < self._next_check:
            return False
        self._next_check = now + CHECK_S
        return True

    @property
    def patience_s(self) -> float:
        """How long to sleep at most."""
        return math.inf

    def rest(self, ends: Sequence[End], timeout_s: float) -> None:
        wires = [end for end in ends if isinstance(end, Wired)]
        watched = [pair for end in wires for pair in end.watched]
        patience_s = min([timeout_s, *(end.patience_s for end in wires)])
        for socket, _ in zmq.zmq_poll(watched, max(1, int(patience_s * 1000))):
            if socket not in [end.socket for end in wires]:
                for end in wires:
                    end._next_check = 0.0

    def unsent_bytes(self) -> int:
        self._shared = [shared for shared in self._shared if not shared[0].done]
        return sum(amount for _, amount in self._shared)

    def _ship(self, address: bytes | None, letter: Letter) -> bool:
        """Whether ZeroMQ took it: it takes a message as a whole, or nothing of it."""
        header, *parts = pack(letter)
        try:
            if address is not None:
                self.socket.send(address, zmq.NOBLOCK | zmq.SNDMORE)
            self.socket.send(header, zmq.NOBLOCK | (zmq.SNDMORE if parts else 0))
        except zmq.Again:
            return False
        if len(self._shared) > self._prune_at:
            self.unsent_bytes()
            self._prune_at = 2 * len(self._shared) + 64
        for number, part in enumerate(parts, 1):
            more = zmq.SNDMORE if number < len(parts) else 0
            if len(part) < SHARED_BYTES:
                self.socket.send(part, more)
                continue
            frame = zmq.Frame(part, track=True, copy_threshold=0)
            self.socket.send(frame, more, copy=False)
            self._shared.append((frame.tracker, len(part)))
        return True

    def _take(self) -> list[zmq.Frame] | None:
        """The frames of the next message."""
        try:
            frames = [self.socket.recv(zmq.NOBLOCK, copy=False)]
        except zmq.Again:
            return None
        while frames[-1].more:
            frames.append(self.socket.recv(zmq.NOBLOCK, copy=False))
        return frames

    def _open(self, frames: Sequence[zmq.Frame]) -> Letter | None:
        """The letter in some frames, or None, counted, if it is none."""
        try:
            return unpack([frame.buffer for frame in frames])
        except Malformed as error:
            kinds = {OtherVersion: "version", Oversized: "oversized"}
            self.refused[kinds.get(type(error), "malformed")] += 1
            return None

    def _end(self) -> None:
        self.socket.close()
        self.context.term()  # returns when all has gone, or after LINGER_S
