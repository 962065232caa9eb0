"""A process group that belongs to others, as a link."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from allfuse.base.errors import PeerLost
from allfuse.link.base import Link, Work
from allfuse.link.check import as_bytes, check_contiguous, check_summable
from allfuse.link.lookout import first_line

POLL_S = 2e-5


class BorrowedWork(Work):
    """A transfer of a borrowed group under way.

    `work` is None while the link holds it back.

    Args:
        data: what moves.
        peer: a place on the link, None for all.
    """

    def __init__(
        self, link: BorrowedLink, work: Any, data: Tensor, operation: str, peer: int | None
    ) -> None:
        self.link, self.work, self.data = link, work, data
        self.operation, self.peer = operation, peer

    def wait(self) -> None:
        begin = time.monotonic()
        if self.work is None:
            self.link.start_held()
        try:
            if self.data.device.type != "cpu":  # waiting may only queue, as NCCL's does
                self._await_device(begin + self.link.timeout_s)
            else:
                self.work.wait(timedelta(seconds=self.link.timeout_s))
        except RuntimeError as error:
            seconds = time.monotonic() - begin
            raise self.link.lost(self.operation, self.peer, seconds, error) from None

    def _await_device(self, deadline: float) -> None:
        """A peer's death may show as nothing but work that never completes."""
        while not self.work.is_completed():
            if time.monotonic() > deadline:
                raise RuntimeError(f"no sign within {self.link.timeout_s:g} s")
            time.sleep(POLL_S)
        self.work.wait()


class StagedWork(Work):
    """A receive into memory of the host, whence it is copied."""

    def __init__(self, work: Work, arrived: Tensor, target: Tensor) -> None:
        self.work, self.arrived, self.target = work, arrived, target

    def wait(self) -> None:
        self.work.wait()
        self.target.copy_(self.arrived)


class BorrowedLink(Link):
    """A link over a group of torch.distributed that somebody else made and will end.

    There is no board, so nobody can be asked who is lost: a transfer from one to one names its
    peer, a collective of two the other one, a larger collective nobody. A group that has lost a
    rank is of no use any more.

        dist.init_process_group("gloo")
        link = BorrowedLink(dist.group.WORLD)
        link.all_reduce(torch.ones(3), "sum").wait()

    Args:
        group: this rank is one of its members.
        timeout_s: the deadline of every wait here, whatever the group's own is.
    """

    def __init__(self, group: Any, *, timeout_s: float = 300.0) -> None:
        self.group, self.timeout_s = group, timeout_s
        self.rank, self.members = dist.get_rank(group), tuple(dist.get_process_group_ranks(group))
        self.kind = str(dist.get_backend(group))
        self._held: list[tuple[dist.P2POp, BorrowedWork]] = []

    @classmethod
    def beside(cls, group: Any, *, timeout_s: float = 300.0) -> BorrowedLink:
        """A link over a group of its own to the same ranks by the same backend.

        Its transfers never come in between those of the owner. All ranks of `group` must call it
        at the same point, and nobody else has to.
        """
        ranks = dist.get_process_group_ranks(group)
        made = dist.new_group(
            ranks,
            timeout=timedelta(seconds=timeout_s),
            backend=dist.get_backend(group),
            # A part of the world makes it without the rest. All of the world counts its groups
            # alike, which makes a name that is new for sure.
            use_local_synchronization=len(ranks) < dist.get_world_size(),
        )
        return cls(made, timeout_s=timeout_s)

    def lost(self, operation: str, peer: int | None, seconds: float, error: Exception) -> PeerLost:
        """The error to raise after a transfer failed, with what can be known of who is lost."""
        if peer is None and self.size == 2:
            peer = 1 - self.rank
        return PeerLost(
            first_line(error),
            rank=self.members[self.rank],
            peer=None if peer is None else self.members[peer],
            operation=operation,
            step=self.step,
            seconds=seconds,
        )

    def _start(
        self, tensor: Tensor, operation: str, begin: Callable[[Tensor], Any], peer: int | None
    ) -> Work:
        self.start_held()
        try:
            return BorrowedWork(self, begin(tensor), tensor, operation, peer)
        except RuntimeError as error:
            raise self.lost(operation, peer, 0.0, error) from None

    def _start_one_to_one(self, kind: Any, data: Tensor, operation: str, peer: int) -> Work:
        """Between GPUs it is held back, and goes with all that is started before somebody waits."""
        if not self._holds(data):
            to = {"group_dst" if kind is dist.isend else "group_src": peer}
            return self._start(
                data, operation, lambda each: kind(each, group=self.group, **to), peer
            )
        work = BorrowedWork(self, None, data, operation, peer)
        self._held.append((dist.P2POp(kind, data, group=self.group, group_peer=peer), work))
        return work

    def _holds(self, data: Tensor) -> bool:
        """NCCL starts what is not grouped one by one, each when the one before is done."""
        return data.device.type != "cpu"

    def start_held(self) -> None:
        """Start the transfers that were held back, as one group: two peers that both send first
        would wait for each other for ever."""
        held, self._held = self._held, []
        if not held:
            return
        first = held[0][1]
        try:
            begun = dist.batch_isend_irecv([transfer for transfer, _ in held])
        except RuntimeError as error:
            raise self.lost(first.operation, first.peer, 0.0, error) from None
        for at, (_, work) in enumerate(held):
            work.work = begun[min(at, len(begun) - 1)]  # NCCL has one for all

    def all_reduce(self, tensor: Tensor, operation: str) -> Work:
        check_summable(tensor, operation)
        self.sent_bytes += 2 * (self.size - 1) * tensor.nbytes // self.size

        def begin(data: Tensor) -> Any:
            return dist.all_reduce(data, group=self.group, async_op=True)

        return self._start(tensor, operation, begin, None)

    def broadcast(self, tensor: Tensor, operation: str, root: int = 0) -> Work:
        check_contiguous(tensor, operation)
        if self.rank == root:
            self.sent_bytes += tensor.nbytes

        def begin(data: Tensor) -> Any:
            return dist.broadcast(data, group=self.group, group_src=root, async_op=True)

        return self._start(as_bytes(tensor), operation, begin, None)

    def send(self, tensor: Tensor, peer: int, operation: str) -> Work:
        check_contiguous(tensor, operation)
        self.sent_bytes += tensor.nbytes
        data = as_bytes(tensor)
        data = data.cpu() if self._stages(data) else data
        return self._start_one_to_one(dist.isend, data, operation, peer)

    def _stages(self, data: Tensor) -> bool:
        """gloo sends from one to one out of the host's memory only."""
        return self.kind == "gloo" and data.device.type != "cpu"

    def receive(self, tensor: Tensor, peer: int, operation: str) -> Work:
        check_contiguous(tensor, operation)
        data = as_bytes(tensor)
        if not self._stages(data):
            return self._start_one_to_one(dist.irecv, data, operation, peer)
        arrived = torch.empty_like(data, device="cpu")
        work = self._start_one_to_one(dist.irecv, arrived, operation, peer)
        return StagedWork(work, arrived, data)

    def alive(self) -> tuple[int, ...]:
        """All of them: nothing here could know better."""
        return tuple(range(self.size))

    def close(self) -> None:
        """Nothing: what is borrowed stays its owner's, whose `destroy_process_group()` ends a group
        of its own too. (Ended sooner, torch 2.13 may give its name to another one, which then meets
        its traces.)"""
