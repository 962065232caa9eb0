"""Which topology is the fastest, by the clock."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from allfuse.base.errors import PeerLost, PlanError
from allfuse.base.units import format_bytes, format_seconds
from allfuse.charge import charge
from allfuse.codec import Codec, MessageCodec
from allfuse.fusion.base import tells_all
from allfuse.link.costs import Costs
from allfuse.link.memo import known_costs
from allfuse.plan.pairing import refuse_pairing
from allfuse.rule import Rule
from allfuse.topology import TOPOLOGIES, Layout, Native, Topology
from allfuse.topology.central import Central
from allfuse.topology.exchange import Exchange
from allfuse.topology.tree import Tree

if TYPE_CHECKING:
    import torch

    from allfuse.link import Board, Link

MARGIN = (
    0.05  # by which another must be faster than the first that can be: the clock errs by 4 to 8 %
)
MOST_AT_ONCE = 1024  # transfers of a phase: with more, nothing is fast and the clock is slow


@dataclass(frozen=True, kw_only=True)
class Pick:
    """A topology, the seconds that a fusion by it is charged, and why it was taken, for people.

    seconds is None where there was nothing to compare. elements: of the block.
    """

    topology: Topology
    seconds: float | None
    why: str
    elements: int = 0


def candidates(rule: Rule, codec: Codec, peers: int) -> tuple[Topology, ...]:
    """The topologies that make all peers equal and can carry this rule and codec; native first.

    >>> from allfuse.codec import Identity
    >>> from allfuse.rule import Median
    >>> [str(topology) for topology in candidates(Median(), Identity(), 4)]
    ['central', 'exchange']
    """
    if tells_all(codec, peers):
        return (Exchange(),)
    named = [cls() for cls in TOPOLOGIES.values()]
    return tuple(
        each for each in (*named, Tree("double")) if each.exact and _fits(rule, each, codec)
    )


def _fits(rule: Rule, topology: Topology, codec: Codec) -> bool:
    try:
        refuse_pairing(rule, topology, codec)
    except PlanError:
        return False
    return True


def settled(layout: Layout, topologies: Sequence[Topology]) -> Pick | None:
    """What is taken without measuring: there is one way only, or one host alone. There it is the
    link's own sum, or where that cannot be central, in which nothing passes through two peers.

    None where the costs of the link must be known.
    """
    if len(topologies) == 1:
        return Pick(topology=topologies[0], seconds=None, why=f"{topologies[0]}: no other can be")
    for kind in (Native, Central):
        for topology in topologies:
            if isinstance(topology, kind) and len(layout.by_host) == 1:
                why = f"{topology}: all workers are on one host"
                return Pick(topology=topology, seconds=None, why=why)
    return None


def pick(
    layout: Layout,
    costs: Costs,
    topologies: Sequence[Topology],
    elements: int,
    *,
    element_bytes: int = 4,
    codec: Codec | None = None,
) -> Pick:
    """The fastest topology for a block of so many elements.

    The first of them stays unless another is faster by `MARGIN`. A pure function: equal on all
    peers, and in every run with equal costs.
    """
    encoded = codec.encoded_bytes if isinstance(codec, MessageCodec) else None
    charged = [
        (charge(t, layout, costs, elements, element_bytes=element_bytes, encoded_bytes=encoded), t)
        for t in _feasible(layout, topologies)
    ]
    seconds = [(each.seconds, topology) for each, topology in charged]
    ranked = sorted(seconds, key=lambda entry: entry[0])  # stable: of equals the first stays
    best = ranked[0]
    if seconds[0][0] <= best[0] * (1 + MARGIN):
        best = seconds[0]
    others = [entry for entry in ranked if entry[1] is not best[1]]
    size = format_bytes(elements * element_bytes)
    why = f"{best[1]}: {format_seconds(best[0])} for {size} over {_hosts(layout)}"
    if others:
        why += f"; next {others[0][1]} {format_seconds(others[0][0])}"
    return Pick(topology=best[1], seconds=best[0], why=why, elements=elements)


class Auto:
    """Picks the topology of each block of a fusion whose plan leaves it open.

    `costs` are measured when the first block asks, or set before: those of a run that is resumed,
    so that it goes on bit for bit. All peers ask for the same blocks in the same order.

    An axis may have several groups of peers, which must pick alike: all ranks of a replica follow
    one decision. So the `layout` is that of the first group, which alone measures and tells the
    others.

    Args:
        notice: where the groups meet; None where there is only this one.
        leads: whether this is the first group.
    """

    def __init__(
        self,
        link: Link,
        layout: Layout,
        topologies: Sequence[Topology],
        codec: Codec,
        device: torch.device | str,
        notice: Notice | None = None,
        leads: bool = True,
    ) -> None:
        self.link, self.layout, self.topologies = link, layout, topologies
        self.codec, self.device = codec, device
        self._notice, self._leads = notice, leads
        self.costs: Costs | None = None
        self.measured_s: float | None = None  # None where they were known already
        self._picks: dict[tuple[int, int], Pick] = {}

    def pick(self, elements: int, element_bytes: int) -> Pick:
        """The fastest topology for a block of so many values."""
        key = elements, element_bytes
        if key not in self._picks:
            if self.costs is None:
                self._measure()
            assert self.costs is not None
            self._picks[key] = pick(
                self.layout,
                self.costs,
                self.topologies,
                elements,
                element_bytes=element_bytes,
                codec=self.codec,
            )
        return self._picks[key]

    def _measure(self) -> None:
        begin, now = time.perf_counter(), True
        if self._leads:
            self.costs, now = known_costs(self.link, self.layout.hosts, self.device)
            if self._notice is not None and self.link.rank == 0:
                self._notice.write(json.dumps(self.costs.numbers()).encode())
        else:
            assert self._notice is not None
            self.costs = Costs.from_numbers(json.loads(self._notice.read(self.link)))
        self.measured_s = time.perf_counter() - begin if now else None


@dataclass(frozen=True, kw_only=True)
class Notice:
    """A place on a board where one rank writes something for all.

    Args:
        author: the rank that writes.
    """

    board: Board
    key: str
    author: int

    def write(self, text: bytes) -> None:
        self.board.set(self.key, text)

    def read(self, link: Link) -> bytes:
        """Wait for what is written.

        Raises:
            PeerLost: nothing is, within the deadline of the link.
        """
        try:
            return self.board.wait(self.key, link.timeout_s)
        except TimeoutError:
            raise PeerLost(
                "did not say what its links cost",
                rank=link.members[link.rank],
                peer=self.author,
                operation=f"read {self.key}",
                step=link.step,
                seconds=link.timeout_s,
            ) from None


def _feasible(layout: Layout, topologies: Sequence[Topology]) -> list[Topology]:
    """Those that the clock can play in good time; all where that would leave none."""
    few = [
        topology
        for topology in topologies
        if all(len(phase) <= MOST_AT_ONCE for phase in topology.schedule(layout).phases)
    ]
    return few or list(topologies)


def _hosts(layout: Layout) -> str:
    hosts = len(layout.by_host)
    return f"{hosts} hosts" if hosts > 1 else f"{layout.size} workers of one host"
