"""Where the ranks of one host meet: the memory of each, mapped by all, and a socket to each."""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import select
import socket
import struct
import time
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from allfuse.link.bell import AVAILABLE as BELLS_AVAILABLE
from allfuse.link.bell import WORD_BYTES, Bells

SLICE_S = 1.0
ADDRESS_BYTES = 12
NOWHERE = bytes(ADDRESS_BYTES)  # of a rank that may not share memory
LINE_WORDS = 16  # words of different writers lie in cache lines of their own
PAGE_BYTES = 4096

AVAILABLE = BELLS_AVAILABLE and hasattr(os, "memfd_create")


class Host(Protocol):
    """What a room asks of its link."""

    rank: int
    members: tuple[int, ...]
    timeout_s: float
    step: int | None

    @property
    def size(self) -> int: ...

    def give_up(self) -> bool:
        """Whether waits are pointless: the link is closed, or someone misses a rank."""

    def waits(self, operation: str) -> AbstractContextManager[None]:
        """Around a wait: what a room raises becomes an error that names who is lost."""


class Memory:
    """One rank's memory: words to wait for, then bytes."""

    def __init__(self, handle: int, lines: int, size: int) -> None:
        self.start = words_bytes(lines)
        self.map = mmap.mmap(handle, self.start + size)
        self.bells = Bells(self.map, lines * LINE_WORDS)
        self.bytes = torch.frombuffer(self.map, dtype=torch.uint8)[self.start :]


def words_bytes(lines: int) -> int:
    """Whole pages, so that what follows begins a page."""
    return -(-lines * LINE_WORDS * WORD_BYTES // PAGE_BYTES) * PAGE_BYTES


class Door:
    """This rank's memory, and where its peers find it. Neither has a name in a file system."""

    def __init__(self, lines: int, size: int, peers: int) -> None:
        """Raises OSError where the system refuses."""
        self.address = secrets.token_bytes(ADDRESS_BYTES)
        self.lines, self.size = lines, size
        self.handle = os.memfd_create("allfuse")
        self.listener = socket.socket(socket.AF_UNIX)
        try:
            os.ftruncate(self.handle, words_bytes(lines) + size)
            self.listener.bind(_name(self.address))
            self.listener.listen(peers)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        os.close(self.handle)
        self.listener.close()


def _name(address: bytes) -> str:
    """In the abstract namespace, where no file is made."""
    return f"\0allfuse-{address.hex()}"


class Room:
    """The memory of each rank, and a socket to each: who dies closes it.

    Raises:
        OSError, EOFError, TimeoutError: a peer did not come.
    """

    def __init__(self, link: Host, door: Door, addresses: list[bytes]) -> None:
        self.link, self.rank, self.size = link, link.rank, link.size
        self._peers = self._find_peers(door.listener, addresses)
        handles = self._swap_memories(door.handle)
        self.memories = [
            Memory(found, door.lines, door.size)
            for _, found in sorted({**handles, self.rank: door.handle}.items())
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
            peer.settimeout(self.link.timeout_s)
            peers[int.from_bytes(peer.recv(4, socket.MSG_WAITALL), "little")] = peer
        return peers

    def _accept(self, listener: socket.socket, deadline: float) -> socket.socket:
        """The next peer; others than this user's processes are sent away."""
        listener.settimeout(SLICE_S)
        while not self.link.give_up() and time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                peer, _ = listener.accept()
                credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                if struct.unpack("3i", credentials)[1] == os.getuid():
                    return peer
                peer.close()
        raise TimeoutError("a peer did not come")

    def _swap_memories(self, handle: int) -> dict[int, int]:
        """The memory of each peer, as a file descriptor."""
        for peer in self._peers.values():
            socket.send_fds(peer, [b"m"], [handle])
        handles: dict[int, int] = {}
        for rank, peer in self._peers.items():
            peer.settimeout(self.link.timeout_s)
            said, found, _, _ = socket.recv_fds(peer, 1, 1)
            if not said:
                raise EOFError(f"rank {self.link.members[rank]} hung up")
            handles[rank] = found[0]
        return handles

    def check(self, rank: int, deadline: float) -> None:
        """Whether it makes sense to wait for a peer any longer.

        Raises:
            EOFError: it has hung up. TimeoutError: the deadline is over, or someone misses a rank.
        """
        if self.link.give_up() or time.monotonic() > deadline:
            raise TimeoutError(f"rank {self.link.members[rank]} was silent")
        poll = select.poll()
        poll.register(self._peers[rank], select.POLLIN)
        if poll.poll(0):  # nobody says anything there: it was closed
            raise EOFError(f"rank {self.link.members[rank]} hung up")

    def close(self) -> None:
        """Give memory and sockets back."""
        for peer in self._peers.values():
            peer.close()
        self.memories.clear()
