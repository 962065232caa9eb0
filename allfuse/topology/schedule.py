"""Who sends what to whom, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

Op: TypeAlias = Literal["copy", "add", "collect", "mix"]
"""What a receiver does with what arrives: take it instead of its own; add it to its own; keep it
until all peers' values are there and sum them, its own among them, in the order of peers; or take
the weighted mean of both. Under a rule that gathers, what would be added is collected."""


class Transfer(NamedTuple):
    """Chunks `start` to `stop` of one block go from one peer to another.

    weight: of what arrives, with `mix`; the receiver's own weight is what is left of 1.
    """

    src: int
    dst: int
    start: int
    stop: int
    op: Op
    weight: float = 1.0


Phase: TypeAlias = tuple[Transfer, ...]
"""Transfers that can go at once: each sends what its peer held before the phase. What arrives at a
peer is taken in the order in which it is listed here."""


class Piece(NamedTuple):
    """One peer's side of a transfer: chunks `start` to `stop`, to or from `peer`."""

    peer: int
    start: int
    stop: int
    op: Op
    weight: float


class Turn(NamedTuple):
    """What one peer does in one phase."""

    sends: tuple[Piece, ...]
    receives: tuple[Piece, ...]


@dataclass(frozen=True)
class Schedule:
    """The phases in which `peers` fuse a block that is cut into so many equal chunks.

    >>> Schedule(2, 1, ((Transfer(1, 0, 0, 1, "add"),),)).bytes_sent(100)
    [0.0, 100.0]
    """

    peers: int
    chunks: int
    phases: tuple[Phase, ...]

    def turns(self, peer: int) -> tuple[Turn, ...]:
        """This peer's part, phase by phase."""
        return tuple(
            Turn(
                tuple(Piece(t.dst, *t[2:]) for t in phase if t.src == peer),
                tuple(Piece(t.src, *t[2:]) for t in phase if t.dst == peer),
            )
            for phase in self.phases
        )

    def bytes_sent(self, payload_bytes: float) -> list[float]:
        """Bytes that each peer sends for a payload that the chunks cut evenly."""
        sent = [0.0] * self.peers
        for phase in self.phases:
            for transfer in phase:
                sent[transfer.src] += (transfer.stop - transfer.start) * payload_bytes / self.chunks
        return sent
