"""What one rank of a host sends to another: messages through cells of shared memory."""

from __future__ import annotations

import ctypes
import struct
import threading
import time
from collections import deque

from torch import Tensor

from allfuse.base.errors import BadMessage
from allfuse.link.base import Work
from allfuse.link.bell import WRAP, Bells
from allfuse.link.room import LINE_WORDS, Room

CELL_BYTES = 1 << 19  # of a message's pieces
CELLS = 4  # from each rank to each other, a power of two: they hold what is under way
HEADER = struct.Struct("<QQ")  # bytes of the message, bytes of it that came before
HEADER_BYTES = 64  # a cache line
BELL = LINE_WORDS  # place of the word that peers change when they have done something
LOOK_S = 0.005  # how long messages lie that nobody waits for
LINGER = 100  # looks at nothing before the carrier sleeps


class Mail:
    """Messages to and from the peers in a room, several under way at once.

    Between one rank and another they match in order; the others do not hold them up. Whoever waits
    for one moves all that can be moved. While nobody waits a thread beside looks after them.
    """

    def __init__(self, room: Room, begin: int) -> None:
        """`begin`: where in the bytes of each memory the cells begin."""
        self.room, self.begin = room, begin
        peers = [rank for rank in range(room.size) if rank != room.rank]
        self._sends = {peer: Lane(self, peer, sends=True) for peer in peers}
        self._receives = {peer: Lane(self, peer, sends=False) for peer in peers}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._waiters = 0
        self._carried = False
        self._rung = 0

    def send(self, tensor: Tensor, peer: int, operation: str) -> Work:
        return self._post(self._sends, tensor, peer, operation)

    def receive(self, tensor: Tensor, peer: int, operation: str) -> Work:
        return self._post(self._receives, tensor, peer, operation)

    def _post(self, lanes: dict[int, Lane], tensor: Tensor, peer: int, operation: str) -> Letter:
        with self._lock:
            if self._closed.is_set():
                raise ValueError(f"{operation}: the link was closed")
            lane = lanes[peer]
            letter = Letter(self, lane, tensor, operation)
            lane.letters.append(letter)
            if len(lane.letters) == 1:
                lane.advance()
            if not letter.done and not self._carried:
                self._carried = True
                threading.Thread(target=self._carry, name="allfuse-mail", daemon=True).start()
        return letter

    def wait(self, letter: Letter) -> None:
        """Return when the message has passed.

        Raises:
            EOFError: the peer has hung up. TimeoutError: the deadline is over, or someone misses a
            rank. BadMessage: the peer sent another size.
        """
        room, peer = self.room, letter.lane.peer
        deadline = time.monotonic() + room.link.timeout_s
        self._count_waiters(1)
        try:
            while True:
                bells, seen = self._move()
                if letter.settled():
                    return
                if not bells.wait(BELL, seen) or time.monotonic() > deadline:
                    try:
                        room.check(peer, deadline)
                    except EOFError:  # it may have gone after it had done its part
                        self._move()
                        if letter.settled():
                            return
                        raise
        finally:
            self._count_waiters(-1)

    def _count_waiters(self, more: int) -> None:
        with self._lock:
            self._waiters += more

    def _move(self) -> tuple[Bells, int]:
        """Move all that can be moved; the bell that rings when there is more, as it was before."""
        with self._lock:
            if self._closed.is_set():
                raise TimeoutError("the link was closed")
            bells = self.room.memories[self.room.rank].bells
            seen = bells.get(BELL)
            self._advance()
            return bells, seen

    def _advance(self) -> bool:
        """Whether anything is left under way."""
        busy = False
        for lanes in (self._sends, self._receives):
            for lane in lanes.values():
                if lane.letters:
                    lane.advance()
                    busy = busy or bool(lane.letters)
        return busy

    def _carry(self) -> None:
        """Look after messages that nobody waits for; ends when there have been none for a while."""
        looks = 0
        while looks < LINGER and not self._closed.wait(LOOK_S):
            with self._lock:
                if not self._closed.is_set() and not self._waiters:
                    looks = 0 if self._advance() else looks + 1
                if looks == LINGER:
                    self._carried = False

    def ring(self, peer: int) -> None:
        """Tell a peer that something has changed. No two ranks ever write the same there."""
        self._rung += 1
        bells = self.room.memories[peer].bells
        bells.set(BELL, (self._rung * self.room.size + self.room.rank) & WRAP)
        bells.ring(BELL)

    def close(self) -> None:
        """Let go of the memory."""
        with self._lock:
            self._closed.set()
            for lanes in (self._sends, self._receives):
                for lane in lanes.values():
                    lane.letters.clear()
                lanes.clear()


class Letter(Work):
    """A message on its way: how many of its bytes have gone into cells or come out of them."""

    def __init__(self, mail: Mail, lane: Lane, tensor: Tensor, operation: str) -> None:
        self.mail, self.lane, self.operation = mail, lane, operation
        self.tensor = tensor  # its memory is read or written until all has passed
        self.address, self.size = tensor.data_ptr(), tensor.nbytes
        self.passed = 0
        self.done = False

    def settled(self) -> bool:
        """Whether it has passed. Raises BadMessage when it never will."""
        if not self.done and self.lane.broken is not None:
            raise self.lane.broken
        return self.done

    def wait(self) -> None:
        if not self.done:
            with self.mail.room.link.waits(self.operation):
                self.mail.wait(self)


class Lane:
    """One direction between this rank and a peer: messages in order, through a ring of cells."""

    def __init__(self, mail: Mail, peer: int, sends: bool) -> None:
        room = mail.room
        self.mail, self.peer, self.sends = mail, peer, sends
        self.letters: deque[Letter] = deque()
        self.broken: BadMessage | None = None
        self.count = 0  # of cells that this rank has filled or emptied
        source, target = (room.rank, peer) if sends else (peer, room.rank)
        self._filled = room.memories[source].bells, word_of(target)
        self._emptied = room.memories[target].bells, word_of(source) + 1
        memory = room.memories[source]
        first = mail.begin + target * CELLS * (HEADER_BYTES + CELL_BYTES)
        self._map, self._first = memory.map, memory.start + first
        self._address = memory.bytes.data_ptr() + first

    def advance(self) -> None:
        """Move what can be moved now."""
        if self.sends:
            self._fill()
        elif self.broken is None:
            self._empty()

    def _fill(self) -> None:
        while self.letters:
            bells, place = self._emptied
            if (self.count - bells.get(place)) & WRAP >= CELLS:
                return
            letter = self.letters[0]
            size = min(CELL_BYTES, letter.size - letter.passed)
            cell = self.count % CELLS * (HEADER_BYTES + CELL_BYTES)
            HEADER.pack_into(self._map, self._first + cell, letter.size, letter.passed)
            data = self._address + cell + HEADER_BYTES
            ctypes.memmove(data, letter.address + letter.passed, size)
            self._pass(letter, size, self._filled)
            self.mail.ring(self.peer)

    def _empty(self) -> None:
        bells, place = self._filled
        while self.letters and bells.get(place) != self.count:
            letter = self.letters[0]
            cell = self.count % CELLS * (HEADER_BYTES + CELL_BYTES)
            found = HEADER.unpack_from(self._map, self._first + cell)
            if found != (letter.size, letter.passed):
                self._break(letter, *found)
                return
            size = min(CELL_BYTES, letter.size - letter.passed)
            data = self._address + cell + HEADER_BYTES
            ctypes.memmove(letter.address + letter.passed, data, size)
            self._pass(letter, size, self._emptied)
            if size == CELL_BYTES or self.count % (CELLS // 2) == 0:  # else nobody waits for it
                self.mail.ring(self.peer)

    def _pass(self, letter: Letter, size: int, word: tuple[Bells, int]) -> None:
        """Some bytes have gone through a cell: the peer may have its turn there."""
        self.count = (self.count + 1) & WRAP
        bells, place = word
        bells.set(place, self.count)
        letter.passed += size
        if letter.passed == letter.size:
            letter.done = True
            self.letters.popleft()

    def _break(self, letter: Letter, size: int, passed: int) -> None:
        """The messages of the two ranks do not match; nor would any after this one."""
        room = self.mail.room
        link, peer = room.link, room.link.members[self.peer]
        self.broken = BadMessage(
            f"rank {peer} sent {passed} of {size} bytes before these, this rank had "
            f"{letter.passed} of {letter.size}; both must give tensors of the same size",
            rank=link.members[room.rank],
            peer=peer,
            operation=letter.operation,
            step=link.step,
            seconds=0.0,
        )


def word_of(peer: int) -> int:
    """Where in a rank's words the two counts are that it keeps for a peer."""
    return BELL + LINE_WORDS * (1 + peer)


def mail_bytes(ranks: int) -> int:
    """What the cells of one rank take in its memory."""
    return ranks * CELLS * (HEADER_BYTES + CELL_BYTES)
