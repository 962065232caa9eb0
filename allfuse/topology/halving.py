"""Recursive halving, then recursive doubling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from allfuse.topology.base import Topology
from allfuse.topology.layout import Layout
from allfuse.topology.schedule import Phase, Schedule, Transfer


@dataclass(frozen=True)
class Halving(Topology):
    """Few phases and few bytes: partners at half the distance exchange half the block each time.

    For n a power of two, 2 log2 n phases and 2 (n-1)/n of the payload sent by each peer
    (Rabenseifner 2004; Thakur, Rabenseifner and Gropp 2005). Else each peer beyond the largest
    power of two p first hands its value to a partner and at last receives the result: 2 phases
    more, in which the partner sends the payload once more.
    """

    name: ClassVar[str] = "halving"
    exact: ClassVar[bool] = True

    def schedule(self, layout: Layout, round: int = 0, seed: int = 0) -> Schedule:
        order = [peer for group in layout.by_host for peer in group]
        power, extra = _split(layout.size)
        guests = [(order[2 * i + 1], order[2 * i]) for i in range(extra)]
        hosts = [order[2 * i] for i in range(extra)] + order[2 * extra :]
        before = tuple(Transfer(guest, host, 0, power, "add") for guest, host in guests)
        after = tuple(Transfer(host, guest, 0, power, "copy") for guest, host in guests)
        ends = ((before,), (after,)) if extra else ((), ())
        return Schedule(layout.size, power, (*ends[0], *_halve_and_double(hosts), *ends[1]))

    def bytes_per_peer(self, layout: Layout, payload_bytes: float) -> float:
        power, extra = _split(layout.size)
        return (2 * (power - 1) / power + (extra > 0)) * payload_bytes

    def phases(self, layout: Layout) -> int:
        power, extra = _split(layout.size)
        return 2 * (power.bit_length() - 1) + 2 * (extra > 0)


def _split(n: int) -> tuple[int, int]:
    """The largest power of two up to n, and what is left."""
    power = 1 << (n.bit_length() - 1)
    return power, n - power


def _halve_and_double(order: list[int]) -> tuple[Phase, ...]:
    """A power of two of peers; chunk i ends up whole at place i, and is handed out from there.

    Near partners come first, with half the block, and far ones last: neighbours share a host.
    """
    n = len(order)
    down: list[Phase] = []
    up: list[Phase] = []
    held = [(0, n)] * n
    for level in range(n.bit_length() - 1):
        distance = 1 << level
        reduce, gather = [], []
        for place, (start, stop) in enumerate(held):
            partner, middle = place ^ distance, (start + stop) // 2
            kept = (middle, stop) if place & distance else (start, middle)
            given = (start, middle) if place & distance else (middle, stop)
            reduce.append(Transfer(order[place], order[partner], *given, "add"))
            gather.append(Transfer(order[place], order[partner], *kept, "copy"))
            held[place] = kept
        down.append(tuple(reduce))
        up.append(tuple(gather))
    return (*down, *reversed(up))
