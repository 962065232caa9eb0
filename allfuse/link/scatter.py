"""Sums of which each rank gets its own part, by messages from one to one."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from allfuse.link.base import Link, Work
from allfuse.link.check import check_parts

AHEAD = 2
"""How many parts are received at a time."""


class Scattered(Work):
    """A reduce-scatter of which this rank adds up the parts of others as they come.

    Phases, for B bytes on n ranks:
      1. when it is started: each sends every other one its part, (n-1)/n B in all;
      2. in the wait: each adds up what comes, in the order of ranks. Two parts are under way or
         here at a time, 2/n B of memory; between GPUs all are, since what is received later would
         wait there for what others send sooner.
    """

    def __init__(self, link: Link, target: Tensor, parts: Tensor, operation: str) -> None:
        check_parts(target, parts, link.size, operation)
        self.link, self.target, self.operation = link, target.detach(), operation
        self._own = parts.detach()[link.rank]
        self._left = deque(peer for peer in range(link.size) if peer != link.rank)
        self._coming: deque[tuple[Work, Tensor]] = deque()
        for _ in range(min(AHEAD, len(self._left)) if target.is_cpu else len(self._left)):
            self._receive(torch.empty_like(self.target))
        # the next one first, so that not all send to the same one at a time
        others = [(link.rank + step) % link.size for step in range(1, link.size)]
        self._sent = [link.send(parts[peer], peer, operation) for peer in others]
        self._is_done = False

    def _receive(self, part: Tensor) -> None:
        """Begin to receive from the next one."""
        peer = self._left.popleft()
        self._coming.append((self.link.receive(part, peer, self.operation), part))

    @torch.no_grad()
    def wait(self) -> None:
        """Raises PeerLost."""
        if self._is_done:
            return
        for rank in range(self.link.size):
            if rank == self.link.rank:
                self._add(self._own, rank)
                continue
            work, part = self._coming.popleft()
            work.wait()
            self._add(part, rank)
            if self._left:
                self._receive(part)
        for work in self._sent:
            work.wait()
        self._is_done = True

    def _add(self, part: Tensor, rank: int) -> None:
        if rank:
            self.target.add_(part)
        else:
            self.target.copy_(part)


class Summed(Work):
    """A reduce-scatter for which everything is summed everywhere, in a copy of the parts: as many
    bytes again, and so only for few, of which one sum takes less time than messages."""

    def __init__(self, link: Link, target: Tensor, parts: Tensor, operation: str) -> None:
        check_parts(target, parts, link.size, operation)
        self.target, everything = target.detach(), parts.detach().clone()
        self._own: Tensor | None = everything[link.rank]
        self._work = link.all_reduce(everything, operation)

    def wait(self) -> None:
        """Raises PeerLost."""
        if self._own is not None:
            self._work.wait()
            self.target.copy_(self._own)
            self._own = None
