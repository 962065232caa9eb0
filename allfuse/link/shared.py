"""Ranks of one host sum CPU tensors in shared memory."""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import socket
import struct
import sys
import threading
import time
import zlib
from typing import Any

import torch
from torch import Tensor

from allfuse.base.errors import BadMessage
from allfuse.link.base import Work
from allfuse.link.check import check_summable
from allfuse.link.group import SLICE_S, GroupLink
from allfuse.link.runner import Runner

SLOT_BYTES = 1 << 21  # what travels between two meetings: it stays in the caches
SLOTS = 2
ADDRESS_BYTES = 12
NOWHERE = bytes(ADDRESS_BYTES)  # of a rank that may not share memory
TOKEN = struct.Struct("<II")  # number of the meeting, and what it is about

AVAILABLE = sys.platform == "linux" and hasattr(os, "memfd_create")


class SharedLink(GroupLink):
    """A group link whose sums go through memory that all ranks of the host have mapped.

    Phases of a sum of B bytes on n ranks, for each piece of at most `SLOT_BYTES`:
      1. each copies its piece into its own memory, and all meet;
      2. each sums one n-th of the piece from all memories into its own, in the order of ranks, and
         all meet;
      3. each copies the other parts of the sum from their owners.
    B bytes are read and written twice by each rank, besides its n-th of the sums. Equal on all
    ranks, bit for bit. A meeting is a token to each peer over a Unix socket: who dies closes it.

    The memory has no name, and the sockets live in the abstract namespace: nothing can be left
    behind. Sums are done in a thread beside the caller, in the order in which they are started.
    Broadcasts and transfers from one to one take the process group.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._runner = Runner(f"allfuse-shared-{self.name}")
        self._closed = threading.Event()
        operation, begin = f"form link {self.name}", time.monotonic()
        try:
            self._room = open_room(self)
            self.kind = "gloo" if self._room is None else "shared memory"
            self.sent_bytes = 0  # what it took to meet does not count
        except (OSError, EOFError, TimeoutError) as error:
            raise self.lost(operation, time.monotonic() - begin, error) from None

    def all_reduce(self, tensor: Tensor, operation: str) -> Work:
        if self._room is None:
            return super().all_reduce(tensor, operation)
        check_summable(tensor, operation)
        self.sent_bytes += 2 * (self.size - 1) * tensor.nbytes // self.size
        return self._runner.start(lambda: self._sum(tensor, operation))

    def _sum(self, tensor: Tensor, operation: str) -> None:
        begin, doing = time.monotonic(), self.lookout.doing
        doing.update(operation=operation, step=self.step)
        assert self._room is not None
        try:
            self._room.sum(tensor.detach().reshape(-1), operation)
        except (OSError, EOFError, TimeoutError) as error:
            if self._closed.is_set():
                raise  # nobody waits for it
            raise self.lost(operation, time.monotonic() - begin, error) from None
        doing["operation"] = None

    def give_up(self) -> bool:
        """Whether a wait is pointless: the link is closed, or someone misses a rank."""
        return self._closed.is_set() or self.lookout.alarmed.is_set()

    def close(self) -> None:
        self._closed.set()
        self._runner.close(self._room.close if self._room is not None else lambda: None)
        super().close()


def open_room(link: SharedLink) -> Room | None:
    """Where the ranks of a link meet; None, on all ranks alike, where one may not share memory."""
    own = secrets.token_bytes(ADDRESS_BYTES)
    handle = listener = None
    try:
        handle = os.memfd_create("allfuse")
        os.ftruncate(handle, SLOTS * SLOT_BYTES)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(_name(own))
        listener.listen(link.size)
    except OSError:
        own = NOWHERE
    try:
        addresses = _exchange(link, own)
        if handle is None or listener is None or NOWHERE in addresses:
            return None
        return Room(link, handle, listener, addresses)
    finally:
        if handle is not None:
            os.close(handle)
        if listener is not None:
            listener.close()


def _name(address: bytes) -> str:
    """In the abstract namespace, where no file is made."""
    return f"\0allfuse-{address.hex()}"


def _exchange(link: SharedLink, own: bytes) -> list[bytes]:
    """The addresses of all ranks, through the process group: it notices who is lost."""
    table = torch.zeros(link.size, ADDRESS_BYTES, dtype=torch.uint8)
    table[link.rank] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    GroupLink.all_reduce(link, table, f"form link {link.name}").wait()
    return [bytes(row.tolist()) for row in table]


class Room:
    """Where the ranks of a link meet: the memory of each, and a socket to each."""

    def __init__(
        self, link: SharedLink, handle: int, listener: socket.socket, addresses: list[bytes]
    ) -> None:
        self.link, self.rank, self.size = link, link.rank, link.size
        self._meetings = 0
        self._slot = 0
        self.peers = self._find_peers(listener, addresses)
        handles = self._swap_memories(handle)
        self.memories = [
            torch.frombuffer(mmap.mmap(found, SLOTS * SLOT_BYTES), dtype=torch.uint8)
            for _, found in sorted({**handles, self.rank: handle}.items())
        ]
        for found in handles.values():
            os.close(found)

    def _find_peers(
        self, listener: socket.socket, addresses: list[bytes]
    ) -> dict[int, socket.socket]:
        """A socket to each peer. The higher rank of a pair calls the lower one."""
        peers: dict[int, socket.socket] = {}
        deadline = time.monotonic() + self.link.timeout_s
        for rank in range(self.rank):
            peers[rank] = socket.socket(socket.AF_UNIX)
            peers[rank].settimeout(SLICE_S)
            peers[rank].connect(_name(addresses[rank]))
            peers[rank].sendall(self.rank.to_bytes(4, "little"))
        while len(peers) < self.size - 1:
            peer = self._accept(listener, deadline)
            peers[int.from_bytes(self._receive(peer, 4, deadline), "little")] = peer
        return peers

    def _swap_memories(self, handle: int) -> dict[int, int]:
        """The memory of each peer, as a file descriptor."""
        for peer in self.peers.values():
            socket.send_fds(peer, [b"m"], [handle])
        handles: dict[int, int] = {}
        for rank, peer in self.peers.items():
            peer.settimeout(self.link.timeout_s)
            said, found, _, _ = socket.recv_fds(peer, 1, 1)
            if not said:
                raise EOFError(f"rank {self.link.members[rank]} hung up")
            handles[rank] = found[0]
            peer.settimeout(SLICE_S)
        return handles

    def _accept(self, listener: socket.socket, deadline: float) -> socket.socket:
        """The next peer; others than this user's processes are sent away."""
        listener.settimeout(SLICE_S)
        while not self.link.give_up() and time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                peer, _ = listener.accept()
                credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                if struct.unpack("3i", credentials)[1] == os.getuid():
                    peer.settimeout(SLICE_S)
                    return peer
                peer.close()
        raise TimeoutError("a peer did not come")

    def _receive(self, peer: socket.socket, count: int, deadline: float) -> bytes:
        """So many bytes of a peer.

        Raises:
            EOFError: it has hung up. TimeoutError: it was silent until the deadline, or someone
            misses a rank.
        """
        found = b""
        while len(found) < count:
            try:
                piece = peer.recv(count - len(found))
            except TimeoutError:
                if self.link.give_up() or time.monotonic() > deadline:
                    raise
                continue
            if not piece:
                raise EOFError("a peer hung up")
            found += piece
        return found

    def _meet(self, about: int, operation: str) -> None:
        """Return when all have come. They must come for the same."""
        self._meetings = (self._meetings + 1) & 0xFFFFFFFF
        token = TOKEN.pack(self._meetings, about)
        for peer in self.peers.values():
            peer.sendall(token)
        deadline = time.monotonic() + self.link.timeout_s
        for rank, peer in self.peers.items():
            found = self._receive(peer, TOKEN.size, deadline)
            if found != token:
                raise self._bad_message(rank, operation)

    def _bad_message(self, rank: int, operation: str) -> BadMessage:
        members = self.link.members
        return BadMessage(
            f"rank {members[rank]} came with another operation, size or type than this rank with "
            f"{operation}; all must call the same",
            rank=members[self.rank],
            peer=members[rank],
            operation=operation,
            step=self.link.step,
            seconds=0.0,
        )

    def close(self) -> None:
        """Give memory and sockets back."""
        for peer in self.peers.values():
            peer.close()
        self.memories.clear()

    def sum(self, flat: Tensor, operation: str) -> None:
        """Sum over the ranks, in place."""
        about = zlib.crc32(f"{operation} {flat.dtype} {flat.numel()}".encode())
        most = SLOT_BYTES // flat.element_size()
        for start in range(0, max(flat.numel(), 1), most):
            self._sum_piece(flat[start : start + most], about, operation)

    def _sum_piece(self, piece: Tensor, about: int, operation: str) -> None:
        place = self._slot * SLOT_BYTES
        self._slot = (self._slot + 1) % SLOTS  # written again only after all have met twice more
        slots = [m[place : place + piece.nbytes].view(piece.dtype) for m in self.memories]
        slots[self.rank].copy_(piece)
        self._meet(about, operation)
        size = piece.numel()
        bounds = [size * rank // self.size for rank in range(self.size + 1)]
        own = slice(bounds[self.rank], bounds[self.rank + 1])
        total = piece[own]
        torch.add(slots[0][own], slots[1][own], out=total)
        for slot in slots[2:]:
            total.add_(slot[own])
        slots[self.rank][own].copy_(total)
        self._meet(about, operation)
        for rank, slot in enumerate(slots):
            if rank != self.rank:
                part = slice(bounds[rank], bounds[rank + 1])
                piece[part].copy_(slot[part])
