"""Tensors in order between a pair of peers, cut into pieces, no more under way than are wanted."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from allfuse.link.frame import LAYOUT, Header, Malformed

if TYPE_CHECKING:
    from allfuse.link.transfer import Failure, Receiving, Sending

PIECE_BYTES = 1 << 20  # of a tensor that travel as one message: they stay in the caches
WINDOW_BYTES = 8 << 20  # under way, or come and not yet wanted, of each stream of each pair


def cost(payload_bytes: int) -> int:
    """What a piece takes of the window."""
    return payload_bytes + LAYOUT.size


class Outgoing:
    """What is to be sent to a peer on one stream."""

    def __init__(self) -> None:
        self.pending: deque[Sending] = deque()
        self.credit = WINDOW_BYTES
        self.failure: Failure | None = (
            None  # the first: who is to blame, not who left because of it
        )
        self.sequence = 0

    def next_piece(self) -> slice | None:
        """The bytes of the first tensor that may go now."""
        if not self.pending:
            return None
        sending = self.pending[0]
        piece = slice(sending.done, min(sending.done + PIECE_BYTES, len(sending.data)))
        return piece if cost(piece.stop - piece.start) <= self.credit else None

    def hand_over(self, piece: slice) -> None:
        """That piece has gone."""
        sending = self.pending[0]
        self.credit -= cost(piece.stop - piece.start)
        sending.done = piece.stop
        if piece.stop == len(sending.data):
            self.pending.popleft()
            self.sequence += 1
            sending.end()

    def give_credit(self, amount: int) -> None:
        self.credit += amount
        if self.credit > WINDOW_BYTES:
            raise Malformed(f"credit for {amount} bytes that were not sent")

    def fail(self, failure: Failure) -> None:
        self.failure = self.failure or failure
        while self.pending:
            self.pending.popleft().end(self.failure)


class Incoming:
    """What has come from a peer on one stream, and what is waited for."""

    def __init__(self) -> None:
        self.posted: deque[Receiving] = deque()
        self.arrived: deque[tuple[Header, memoryview]] = deque()
        self.failure: Failure | None = None
        self._sequence = self._start = self._held = self._owed = 0

    def arrive(self, header: Header, payload: memoryview) -> None:
        """A piece has come.

        Raises:
            Malformed: it is not the one that follows.
        """
        if (header.sequence, header.start) != (self._sequence, self._start):
            raise Malformed(
                f"byte {header.start} of tensor {header.sequence}; next is byte {self._start} of "
                f"tensor {self._sequence}"
            )
        total = header.amount * header.dtype.itemsize
        if len(payload) != min(PIECE_BYTES, total - header.start):
            raise Malformed(f"{len(payload)} bytes from byte {header.start} on of {total}")
        self._held += cost(len(payload))
        if self._held > WINDOW_BYTES:
            raise Malformed("more than it was given credit for")
        self._start += len(payload)
        if self._start == total:
            self._sequence, self._start = self._sequence + 1, 0
        self.arrived.append((header, payload))
        self.match()

    def match(self) -> None:
        """Put what has come where it is waited for."""
        while self.posted and self.arrived:
            header, payload = self.arrived.popleft()
            complete = self.posted[0].take(header, payload)
            self._held -= cost(len(payload))
            self._owed += cost(len(payload))
            if complete:
                self.posted.popleft().end()
        if self.failure is not None and not self.arrived:
            self.fail(self.failure)

    def take_credit(self) -> int:
        """The bytes to give credit for now; 0 while they are few."""
        if self._owed < WINDOW_BYTES // 4:
            return 0
        owed, self._owed = self._owed, 0
        return owed

    def fail(self, failure: Failure) -> None:
        """Nothing more will come; what has come is still given out."""
        self.failure = self.failure or failure
        if not self.arrived:
            while self.posted:
                self.posted.popleft().end(self.failure)
