"""What all ranks of a host do together: sums, of all or of parts, and broadcasts over slots of
shared memory."""

from __future__ import annotations

import ctypes
import time
import zlib

import torch
from torch import Tensor

from allfuse.base.errors import BadMessage
from allfuse.link.bell import WRAP
from allfuse.link.room import Room

SLOT_BYTES = 1 << 21  # of a piece, which is all that lies between two meetings
SLOTS = 3
SHORT_BYTES = 1 << 20  # of all ranks: up to here each adds up everything, and all meet once less
COUNT, ABOUT = 0, 1  # places of this rank's words: meetings so far; what the last two are about
TILE = 64  # elements: parts of different ranks lie in cache lines of their own


class Meeting:
    """Sums and broadcasts of the ranks of a room, one after the other, equal on all of them.

    A slot is written again only after all ranks have met twice since it was last read.
    """

    def __init__(self, room: Room) -> None:
        self.room, self.rank, self.size = room, room.rank, room.size
        self._count = 0
        self._slot = 0
        self._views: dict[torch.dtype, list[list[Tensor]]] = {}

    def sum(self, flat: Tensor, operation: str) -> None:
        """Sum a vector over the ranks, in place, in the order of ranks.

        Phases for each piece of at most `SLOT_BYTES`, on n ranks:
          1. each copies its piece into its own slot, without the n-th that it sums itself;
          2. each sums its n-th of the piece from all slots into its own;
          3. each copies the sum from the slots.
        All meet between the phases; three pieces are in different phases at a time. What is short
        each sums as a whole instead, after one meeting.
        """
        about = zlib.crc32(f"{operation} {flat.dtype} {flat.numel()}".encode())
        if flat.nbytes * self.size <= SHORT_BYTES:
            self._sum_short(flat, about, operation)
            return
        pieces = flat.split(SLOT_BYTES // flat.element_size())
        slots = [self._take_slot(flat.dtype) for _ in range(min(SLOTS, len(pieces)))]
        self._slot = (self._slot + len(pieces) - len(slots)) % SLOTS
        for number in range(len(pieces) + 2):
            if number - 2 >= 0:
                self._copy_out(pieces[number - 2], slots[(number - 2) % SLOTS])
            if 0 <= number - 1 < len(pieces):
                self._add_up(pieces[number - 1], slots[(number - 1) % SLOTS])
            if number < len(pieces):
                self._copy_in(pieces[number], slots[number % SLOTS])
            if number <= len(pieces):
                self._meet(about, operation)

    def scatter(self, target: Tensor, parts: Tensor, operation: str) -> None:
        """Sum the parts (n, length) that all ranks have for this one, in the order of ranks.

        Phases for each piece, of which the parts of all fill at most a slot, on n ranks:
          1. each copies the parts of others into its own slot;
          2. each sums its own part of the piece from all slots.
        All meet between the phases; two pieces are in different phases at a time.
        """
        about = zlib.crc32(f"{operation} {target.dtype} {target.numel()}".encode())
        width = SLOT_BYTES // target.element_size() // self.size
        pieces = list(zip(target.split(width), parts.split(width, 1), strict=True))
        slots = [self._take_slot(target.dtype) for _ in range(min(SLOTS, len(pieces)))]
        self._slot = (self._slot + len(pieces) - len(slots)) % SLOTS
        for number in range(len(pieces) + 1):
            if number:
                self._add_part(*pieces[number - 1], slots[(number - 1) % SLOTS])
            if number < len(pieces):
                self._put_parts(pieces[number][1], slots[number % SLOTS][self.rank])
                self._meet(about, operation)

    def _put_parts(self, parts: Tensor, slot: Tensor) -> None:
        width = parts.shape[1]
        for rank, part in enumerate(parts):
            if rank != self.rank:
                _copy(slot[rank * width : (rank + 1) * width], part)

    def _add_part(self, target: Tensor, parts: Tensor, slots: list[Tensor]) -> None:
        own = slice(self.rank * target.numel(), (self.rank + 1) * target.numel())
        found = [slot[own] for slot in slots]
        found[self.rank] = parts[self.rank]
        _add_all(found, target)

    def broadcast(self, flat: Tensor, root: int, operation: str) -> None:
        """Copy the root's bytes to every rank: they pass through the root's slots."""
        about = zlib.crc32(f"{operation} {flat.numel()} {root}".encode())
        for piece in flat.split(SLOT_BYTES):
            slot = self._take_slot(flat.dtype)[root][: piece.numel()]
            if self.rank == root:
                _copy(slot, piece)
            self._meet(about, operation)
            if self.rank != root:
                _copy(piece, slot)

    def _take_slot(self, dtype: torch.dtype) -> list[Tensor]:
        """The next slot of each rank, seen as elements of a type."""
        views = self._views.get(dtype)
        if views is None:
            places = [slice(i * SLOT_BYTES, (i + 1) * SLOT_BYTES) for i in range(SLOTS)]
            memories = self.room.memories
            views = [[memory.bytes[place].view(dtype) for memory in memories] for place in places]
            self._views[dtype] = views
        taken = views[self._slot]
        self._slot = (self._slot + 1) % SLOTS
        return taken

    def _sum_short(self, flat: Tensor, about: int, operation: str) -> None:
        slots = [slot[: flat.numel()] for slot in self._take_slot(flat.dtype)]
        _copy(slots[self.rank], flat)
        self._meet(about, operation)
        _add_all(slots, flat)

    def _part(self, rank: int, size: int) -> slice:
        """What of a piece a rank sums."""
        start, stop = (size * r // self.size // TILE * TILE for r in (rank, rank + 1))
        return slice(start, size if rank == self.size - 1 else stop)

    def _copy_in(self, piece: Tensor, slots: list[Tensor]) -> None:
        own, slot = self._part(self.rank, piece.numel()), slots[self.rank]
        _copy(slot[: own.start], piece[: own.start])
        _copy(slot[own.stop : piece.numel()], piece[own.stop :])

    def _add_up(self, piece: Tensor, slots: list[Tensor]) -> None:
        own = self._part(self.rank, piece.numel())
        parts = [slot[own] for slot in slots]
        total = parts[self.rank]
        parts[self.rank] = piece[own]
        _add_all(parts, total)

    def _copy_out(self, piece: Tensor, slots: list[Tensor]) -> None:
        for rank, slot in enumerate(slots):
            part = self._part(rank, piece.numel())
            _copy(piece[part], slot[part])

    def _meet(self, about: int, operation: str) -> None:
        """Return when all have come. They must come for the same."""
        before, self._count = self._count, (self._count + 1) & WRAP
        own, place = self.room.memories[self.rank].bells, ABOUT + self._count % 2
        own.set(place, about)
        own.set(COUNT, self._count)
        own.ring(COUNT)
        deadline = time.monotonic() + self.room.link.timeout_s
        for rank, memory in enumerate(self.room.memories):
            if rank == self.rank:
                continue
            while memory.bells.get(COUNT) == before:
                if not memory.bells.wait(COUNT, before):
                    try:
                        self.room.check(rank, deadline)
                    except EOFError:
                        if memory.bells.get(COUNT) == before:
                            raise
            # Who came may have come to the next meeting already, but not to the one after it.
            if memory.bells.get(place) != about:
                raise self._bad_message(rank, operation)

    def _bad_message(self, rank: int, operation: str) -> BadMessage:
        members = self.room.link.members
        return BadMessage(
            f"rank {members[rank]} came with another operation, size or type than this rank with "
            f"{operation}; all must call the same",
            rank=members[self.rank],
            peer=members[rank],
            operation=operation,
            step=self.room.link.step,
            seconds=0.0,
        )

    def close(self) -> None:
        """Let go of the memory."""
        self._views.clear()


def _copy(target: Tensor, source: Tensor) -> None:
    """Both are contiguous and of one type. On one thread the C library is a quarter faster."""
    if torch.get_num_threads() == 1:
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)
    else:
        target.copy_(source)


def _add_all(parts: list[Tensor], total: Tensor) -> None:
    """Add up in the order of the list; `total` lies elsewhere."""
    torch.add(parts[0], parts[1], out=total)
    for part in parts[2:]:
        total.add_(part)
