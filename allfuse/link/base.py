"""Moves bytes between ranks and knows who is alive."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Board(Protocol):
    """Small values that every rank of a run can see: who is where, who is lost, what was written.

    Values are bytes, keys are text. `wait` raises `TimeoutError` at its deadline.
    """

    def set(self, key: str, value: bytes) -> None: ...

    def get(self, key: str) -> bytes | None:
        """The value, or None when nothing was written under the key yet."""

    def wait(self, key: str, timeout_s: float) -> bytes: ...


class Work(ABC):
    """A transfer under way. `wait` returns when the tensor may be used, or raises `PeerLost`."""

    @abstractmethod
    def wait(self) -> None: ...


class Link(ABC):
    """A rank's way to its peers on one axis.

    `rank` and `size` count the peers of this link; `members` names them by their rank in the whole
    plan, as errors do. Every operation has the deadline `timeout_s` and raises `PeerLost` when a
    peer is gone or silent. All peers call collectives in the same order. Tensors are contiguous;
    sums take floating point, int64, int32, int8 and uint8, other transfers any type.
    """

    kind: str = "none"  # what moves the bytes of sums, for people
    rank: int
    members: tuple[int, ...]
    timeout_s: float
    step: int | None = None
    sent_bytes: int = 0
    holds_back: bool = False
    """Whether transfers from one to one are held back until somebody waits, and start as one then:
    those that cross, one each way, must."""

    @property
    def size(self) -> int:
        return len(self.members)

    def __deepcopy__(self, memo: dict[int, object]) -> Link:
        """Itself: a copied model talks over the same link."""
        return self

    @abstractmethod
    def all_reduce(self, tensor: Tensor, operation: str) -> Work:
        """Start to sum a contiguous tensor over all peers, in place; all end equal, bit for bit."""

    def reduce_scatter(self, target: Tensor, parts: Tensor, operation: str) -> Work:
        """Start to sum the parts that all peers have for this rank.

        In the order of ranks, where the link says nothing else. For B bytes of `parts` each of n
        ranks sends (n-1)/n B.

        Args:
            target: contiguous, comes to hold the sum.
            parts: (n, ...), contiguous: one part like `target` for each peer. Is only read, until
                the wait is over.
        """
        from allfuse.link.scatter import Scattered

        return Scattered(self, target, parts, operation)

    @abstractmethod
    def broadcast(self, tensor: Tensor, operation: str, root: int = 0) -> Work:
        """Start to copy the root's tensor to every peer, in place."""

    @abstractmethod
    def send(self, tensor: Tensor, peer: int, operation: str) -> Work:
        """Start to send a contiguous tensor to a peer."""

    @abstractmethod
    def receive(self, tensor: Tensor, peer: int, operation: str) -> Work:
        """Start to receive into a contiguous tensor of the size that the peer sends."""

    def start_held(self) -> None:
        """Start what is held back, on links that do that."""
        assert not self.holds_back

    @abstractmethod
    def alive(self) -> tuple[int, ...]:
        """The peers that are not known to be lost."""

    @abstractmethod
    def close(self) -> None:
        """Give the link back. Waits for nobody."""
