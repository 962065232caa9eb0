"""Gossip: every peer mixes with a few others, and all drift to the mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from allfuse.base.errors import PlanError, nearest
from allfuse.topology.base import Topology
from allfuse.topology.layout import Layout
from allfuse.topology.schedule import Schedule, Transfer

Edges = list[tuple[int, int]]
"""(from, to): as many lead to each peer as from it, so that one weight for all of a peer's values
makes the mixing matrix doubly stochastic."""


@dataclass(frozen=True)
class Gossip(Topology):
    """One phase: a peer's value becomes the mean of its own and those that it hears.

    The mean over all peers stays what it was; the distance from it shrinks by the second largest
    singular value of the mixing matrix in each round (Xiao and Boyd 2004). Graphs:

    ring: both neighbours. exponential: the peers at distances 1, 2, 4, ... one_peer: one of those
    in turn, exact after log2 n rounds for n a power of two (Ying et al. 2021,
    arXiv:2110.13363). matching: pairs drawn at random in each round. full: everybody.
    """

    name: ClassVar[str] = "gossip"
    exact: ClassVar[bool] = False
    graph: str = "exponential"

    def __post_init__(self) -> None:
        if self.graph not in GRAPHS:
            hint = nearest(self.graph, GRAPHS)
            why = f"there is no graph of that name{hint}"
            raise PlanError(str(self), why, allowed=", ".join(GRAPHS))

    def schedule(self, layout: Layout, round: int = 0, seed: int = 0) -> Schedule:
        n = layout.size
        edges = GRAPHS[self.graph](n, round, seed) if n > 1 else []
        heard = [sum(dst == peer for _, dst in edges) for peer in range(n)]
        phase = tuple(
            Transfer(src, dst, 0, 1, "mix", 1.0 / (heard[dst] + 1)) for src, dst in sorted(edges)
        )
        return Schedule(n, 1, (phase,) if phase else ())

    def partner(self, peer: int, n: int, round: int, seed: int) -> int | None:
        """The one that a peer mixes with in its own round, where nobody is in step: those that the
        graph leads to from it, in turn; None where it leads nowhere."""
        edges = GRAPHS[self.graph](n, round, seed) if n > 1 else []
        to = sorted({(dst - src) % n for src, dst in edges if src == peer} - {0})
        return (peer + to[round % len(to)]) % n if to else None

    def bytes_per_peer(self, layout: Layout, payload_bytes: float) -> float:
        n = layout.size
        degrees = {
            "ring": min(2, n - 1),
            "exponential": (n - 1).bit_length(),
            "one_peer": min(1, n - 1),
            "matching": min(1, n - 1),
            "full": n - 1,
        }
        return degrees[self.graph] * payload_bytes

    def phases(self, layout: Layout) -> int:
        return min(1, layout.size - 1)


def _ring(n: int, round: int, seed: int) -> Edges:
    return [(peer, (peer + d) % n) for peer in range(n) for d in {1, n - 1}]


def _exponential(n: int, round: int, seed: int) -> Edges:
    distances = [1 << k for k in range((n - 1).bit_length())]
    return [(peer, (peer + d) % n) for peer in range(n) for d in distances]


def _one_peer(n: int, round: int, seed: int) -> Edges:
    distance = 1 << round % (n - 1).bit_length()
    return [(peer, (peer + distance) % n) for peer in range(n)]


def _matching(n: int, round: int, seed: int) -> Edges:
    peers = list(range(n))
    Random(f"{seed}/{round}").shuffle(peers)  # seeded by text: the same on every machine
    pairs = list(zip(peers[::2], peers[1::2], strict=False))
    return pairs + [(second, first) for first, second in pairs]


def _full(n: int, round: int, seed: int) -> Edges:
    return [(src, dst) for src in range(n) for dst in range(n) if src != dst]


GRAPHS: dict[str, Callable[[int, int, int], Edges]] = {
    "ring": _ring,
    "exponential": _exponential,
    "one_peer": _one_peer,
    "matching": _matching,
    "full": _full,
}
