"""The link of a world of one: every operation is done already."""

from __future__ import annotations

from typing import TYPE_CHECKING

from allfuse.link.base import Link, Work

if TYPE_CHECKING:
    from torch import Tensor


class Done(Work):
    """A transfer that needed no transfer."""

    def wait(self) -> None:
        return


class LoneLink(Link):
    """A link without peers. Callers take the same path and nothing is moved."""

    def __init__(self, member: int = 0) -> None:
        self.rank, self.members, self.timeout_s = 0, (member,), 0.0

    def all_reduce(self, tensor: Tensor, operation: str) -> Work:
        return Done()

    def broadcast(self, tensor: Tensor, operation: str, root: int = 0) -> Work:
        return Done()

    def send(self, tensor: Tensor, peer: int, operation: str) -> Work:
        raise ValueError("a world of one has no peer to send to")

    def receive(self, tensor: Tensor, peer: int, operation: str) -> Work:
        raise ValueError("a world of one has no peer to receive from")

    def alive(self) -> tuple[int, ...]:
        return (0,)

    def close(self) -> None:
        return
