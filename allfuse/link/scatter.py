"""Sums of which each rank gets its own part, by messages from one to one."""

from __future__ import annotations

import torch
from torch import Tensor

from allfuse.link.base import Link, Work
from allfuse.link.check import check_parts


class Scattered(Work):
    """A reduce-scatter of which this rank waits for the parts of others, one after the other.

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
        # the next one first, so that not all send to the same one at a time
        others = [(link.rank + step) % link.size for step in range(1, link.size)]
        self._sent = [link.send(parts[peer], peer, operation) for peer in others]
        self._is_done = False

    @torch.no_grad()
    def wait(self) -> None:
        """Raises PeerLost."""
        if self._is_done:
            return
        self._add_up()
        for work in self._sent:
            work.wait()
        self._is_done = True

    def _add_up(self) -> None:
        link, target = self.link, self.target
        ahead = 2 if target.is_cpu else link.size - 1
        free = [torch.empty_like(target) for _ in range(ahead)]
        coming: list[tuple[Work, Tensor]] = []
        left = [peer for peer in range(link.size) if peer != link.rank]
        for rank in range(link.size):
            while left and free:
                part = free.pop()
                coming.append((link.receive(part, left.pop(0), self.operation), part))
            if rank == link.rank:
                part = self._own
            else:
                work, part = coming.pop(0)
                work.wait()
            target.add_(part) if rank else target.copy_(part)
            if rank != link.rank:
                free.append(part)
