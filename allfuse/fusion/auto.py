"""Which topology is the fastest, by the clock."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from allfuse.base.errors import PeerLost, PlanError
from allfuse.base.units import format_bytes, format_seconds
from allfuse.charge import charge
from allfuse.codec import Codec, MessageCodec
from allfuse.fusion.base import tells_all
from allfuse.fusion.race import race
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
    from torch import Tensor

    from allfuse.link import Board, Link

MARGIN = 0.1  # by which another must be faster than the first: the clock errs by 4 to 8 %
DOUBT = 0.25  # by which it may err on one topology
LONGEST_S = 0.2  # that a sum is charged when it is tried: of a larger block it is a part
MOST_AT_ONCE = 1024  # transfers of a phase: with more, nothing is fast and the clock is slow


@dataclass(frozen=True, kw_only=True)
class Pick:
    """A topology, the seconds that a fusion by it is charged, and why it was taken, for people.

    seconds is None where there was nothing to compare. elements: of the block. rival: another that
    may be faster for all that the clock can tell; only beside the link's own sum, of which it knows
    no more than that it is a ring.
    """

    topology: Topology
    seconds: float | None
    why: str
    elements: int = 0
    rival: Topology | None = None


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
    first = seconds[0]
    best = first if first[0] <= ranked[0][0] * (1 + MARGIN) else ranked[0]
    rival = None
    if isinstance(first[1], Native) and first[0] <= ranked[0][0] * (1 + DOUBT):
        rival = next((t for _, t in (ranked[0], first) if t is not best[1]), None)
    others = [entry for entry in ranked if entry[1] is not best[1]]
    why = _why(layout, elements * element_bytes, [best, *others[:1]])
    return Pick(topology=best[1], seconds=best[0], why=why, elements=elements, rival=rival)


def _why(layout: Layout, size: int, ranked: Sequence[tuple[float, Topology]]) -> str:
    """The seconds of the one that is taken, and of the next."""
    best, *others = [(str(topology), format_seconds(seconds)) for seconds, topology in ranked]
    why = f"{best[0]}: {best[1]} for {format_bytes(size)} over {_hosts(layout)}"
    return why + "".join(f"; next {name} {seconds}" for name, seconds in others)


class Auto:
    """Picks the topology of each block of a fusion whose plan leaves it open.

    `costs` are measured when the first block asks, or set before: those of a run that is resumed,
    so that it goes on bit for bit. All peers ask for the same blocks in the same order. Where the
    clock cannot tell whether the link's own sum is faster, `settle` tries both; `tried` is what
    came out, or comes from the run that is resumed.

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
        self.tried: dict[tuple[int, int], str] = {}  # by elements of a block, and bytes of each
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

    def settle(self, block: Tensor) -> Pick:
        """The fastest topology for blocks like this one, by trying where the clock cannot tell.

        Nothing else may use the link meanwhile. The block itself is only looked at.
        """
        key = block.numel(), block.element_size()
        found = self.pick(*key)
        if found.rival is None or not self.codec.lossless:  # of what is encoded other blocks go
            return found
        rivals = {str(each): each for each in (found.topology, found.rival)}
        if (known := rivals.get(self.tried.get(key, ""))) is not None:
            why = f"{known}: tried before, for {format_bytes(block.nbytes)}"
            found = replace(found, topology=known, why=why, rival=None)
        else:
            part = LONGEST_S / max(found.seconds or 0.0, LONGEST_S)
            sample = block.new_zeros(max(1, int(block.numel() * part)))
            seconds = self._race(list(rivals.values()), sample)
            ranked = sorted(zip(seconds, rivals.values(), strict=True), key=lambda each: each[0])
            why = f"{_why(self.layout, sample.nbytes, ranked)}, as tried"
            found = replace(found, topology=ranked[0][1], why=why, rival=None)
            self.tried[key] = str(found.topology)
        self._picks[key] = found
        return found

    def _race(self, rivals: Sequence[Topology], sample: Tensor) -> tuple[float, ...]:
        notice = self._notice and self._notice.of(f"{sample.numel()}/{sample.element_size()}")
        if not self._leads:
            assert notice is not None
            return tuple(map(float, json.loads(notice.read(self.link))))
        seconds = race(self.link, self.layout, rivals, sample)
        if notice is not None and self.link.rank == 0:
            notice.write(json.dumps(seconds).encode())
        return seconds

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

    def of(self, name: str) -> Notice:
        """Another place, below this one."""
        return replace(self, key=f"{self.key}/{name}")

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
