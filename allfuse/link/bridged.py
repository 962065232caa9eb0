"""A link between hosts that knows the way inside one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from allfuse.link.base import Link, Work

if TYPE_CHECKING:
    from torch import Tensor


class BridgedLink(Link):
    """Messages between ranks of one host go through its memory, all else over the network.

    `outer` joins all members, `inner` those of this rank's host. A schedule that goes inside hosts
    first (hierarchy) then leaves the network alone for that part.
    """

    def __init__(self, outer: Link, inner: Link) -> None:
        self.outer, self.inner = outer, inner
        self.rank, self.members, self.timeout_s = outer.rank, outer.members, outer.timeout_s
        self.kind = f"{outer.kind}, {inner.kind} inside hosts"
        self._inside = {
            outer.members.index(member): rank for rank, member in enumerate(inner.members)
        }

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "step":  # errors of both name it
            self.outer.step = self.inner.step = self.step

    @property
    def sent_bytes(self) -> int:  # type: ignore[override]
        return self.outer.sent_bytes + self.inner.sent_bytes

    def all_reduce(self, tensor: Tensor, operation: str) -> Work:
        return self.outer.all_reduce(tensor, operation)

    def broadcast(self, tensor: Tensor, operation: str, root: int = 0) -> Work:
        return self.outer.broadcast(tensor, operation, root)

    def send(self, tensor: Tensor, peer: int, operation: str) -> Work:
        if peer in self._inside:
            return self.inner.send(tensor, self._inside[peer], operation)
        return self.outer.send(tensor, peer, operation)

    def receive(self, tensor: Tensor, peer: int, operation: str) -> Work:
        if peer in self._inside:
            return self.inner.receive(tensor, self._inside[peer], operation)
        return self.outer.receive(tensor, peer, operation)

    def alive(self) -> tuple[int, ...]:
        return self.outer.alive()

    def close(self) -> None:
        self.inner.close()
        self.outer.close()
