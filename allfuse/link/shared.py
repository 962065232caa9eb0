"""Ranks of one host move CPU tensors through shared memory."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from allfuse.link.base import Work
from allfuse.link.check import as_bytes, check_contiguous, check_parts, check_summable
from allfuse.link.group import GroupLink
from allfuse.link.mail import Mail, mail_bytes
from allfuse.link.meeting import SLOT_BYTES, SLOTS, Meeting
from allfuse.link.room import ADDRESS_BYTES, AVAILABLE, NOWHERE, Door, Room
from allfuse.link.runner import Runner

__all__ = ["AVAILABLE", "SharedLink"]

LINES_BESIDE_PEERS = 2  # of words: for meetings, and the bell of the mail


class SharedLink(GroupLink):
    """A group link whose bytes go through memory that all ranks of the host have mapped.

    Sums and broadcasts are done in a thread beside the caller, in the order in which they are
    started (`Meeting` has their phases). Messages from one rank to another pass through rings of
    cells (`Mail`). For B bytes on n ranks each rank copies

      - in a sum: (n-1)/n B in and B out, besides adding up its n-th;
      - in a reduce-scatter: (n-1)/n B in, besides adding up its own n-th;
      - in a broadcast: the root B in, the others B out;
      - in a message: the sender B in, the receiver B out.

    Equal on all ranks, bit for bit. Memory per rank, touched only as far as it is used: 6 MB and
    2 MB for each peer that it sends to, whatever the size of the tensors.

    The memory has no name, and the sockets that show who lives are in the abstract namespace:
    nothing can be left behind. Where a rank may not share memory all take the process group.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._runner = Runner(f"allfuse-shared-{self.name}")
        self._closed = threading.Event()
        with self.waits(f"form link {self.name}"):
            self._room = open_room(self)
        self.sent_bytes = 0  # what it took to meet does not count
        self.kind = "gloo" if self._room is None else "shared memory"
        if self._room is not None:
            self._meeting = Meeting(self._room)
            self._mail = Mail(self._room, SLOTS * SLOT_BYTES)

    def all_reduce(self, tensor: Tensor, operation: str) -> Work:
        if self._room is None:
            return super().all_reduce(tensor, operation)
        check_summable(tensor, operation)
        _check_here(tensor, operation)
        self.sent_bytes += 2 * (self.size - 1) * tensor.nbytes // self.size
        flat = tensor.detach().reshape(-1)

        def job() -> None:
            with self.waits(operation):
                self._meeting.sum(flat, operation)

        return self._runner.start(job)

    def reduce_scatter(self, target: Tensor, parts: Tensor, operation: str) -> Work:
        if self._room is None:
            return super().reduce_scatter(target, parts, operation)
        check_parts(target, parts, self.size, operation)
        _check_here(parts, operation)
        _check_here(target, operation)
        self.sent_bytes += (self.size - 1) * target.nbytes
        flat, rows = target.detach().reshape(-1), parts.detach().reshape(self.size, -1)

        def job() -> None:
            with self.waits(operation):
                self._meeting.scatter(flat, rows, operation)

        return self._runner.start(job)

    def broadcast(self, tensor: Tensor, operation: str, root: int = 0) -> Work:
        if self._room is None:
            return super().broadcast(tensor, operation, root)
        check_contiguous(tensor, operation)
        _check_here(tensor, operation)
        if self.rank == root:
            self.sent_bytes += tensor.nbytes
        flat = as_bytes(tensor)

        def job() -> None:
            with self.waits(operation):
                self._meeting.broadcast(flat, root, operation)

        return self._runner.start(job)

    def send(self, tensor: Tensor, peer: int, operation: str) -> Work:
        if self._room is None:
            return super().send(tensor, peer, operation)
        check_contiguous(tensor, operation)
        _check_here(tensor, operation)
        self.sent_bytes += tensor.nbytes
        return self._mail.send(tensor, peer, operation)

    def receive(self, tensor: Tensor, peer: int, operation: str) -> Work:
        if self._room is None:
            return super().receive(tensor, peer, operation)
        check_contiguous(tensor, operation)
        _check_here(tensor, operation)
        return self._mail.receive(tensor, peer, operation)

    @contextlib.contextmanager
    def waits(self, operation: str) -> Iterator[None]:
        """Around a wait: says where this rank is, and names who is lost."""
        begin, doing = time.monotonic(), self.lookout.doing
        doing.update(operation=operation, step=self.step)
        try:
            yield
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
        self._runner.close(self._leave_room)
        super().close()

    def _leave_room(self) -> None:
        if self._room is not None:
            self._mail.close()
            self._meeting.close()
            self._room.close()


def _check_here(tensor: Tensor, operation: str) -> None:
    """Bytes are copied by address: another device's address would end the process."""
    if not tensor.is_cpu:
        raise ValueError(f"{operation}: a tensor on {tensor.device}; allowed: cpu")


def open_room(link: SharedLink) -> Room | None:
    """Where the ranks of a link meet; None, on all ranks alike, where one may not share memory."""
    door, own = None, NOWHERE
    with contextlib.suppress(OSError):
        size = SLOTS * SLOT_BYTES + mail_bytes(link.size)
        door = Door(LINES_BESIDE_PEERS + link.size, size, link.size)
        own = door.address
    try:
        addresses = _exchange(link, own)
        return None if door is None or NOWHERE in addresses else Room(link, door, addresses)
    finally:
        if door is not None:
            door.close()


def _exchange(link: SharedLink, own: bytes) -> list[bytes]:
    """The addresses of all ranks, through the process group: it notices who is lost."""
    table = torch.zeros(link.size, ADDRESS_BYTES, dtype=torch.uint8)
    table[link.rank] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    GroupLink.all_reduce(link, table, f"form link {link.name}").wait()
    return [bytes(row.tolist()) for row in table]
