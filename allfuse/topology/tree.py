"""Trees: values are summed towards the root, and the sum comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from allfuse.base.errors import PlanError
from allfuse.topology.base import Topology
from allfuse.topology.layout import Layout
from allfuse.topology.schedule import Phase, Schedule, Transfer

KINDS = ("binomial", "double")
Parents = list[int | None]
"""The parent of each place in a tree; the root has none."""


@dataclass(frozen=True)
class Tree(Topology):
    """A binomial tree, or two binary trees that each carry half of the block.

    2 ceil(log2 n) phases: the fewest there can be. binomial: the root sends the payload
    ceil(log2 n) times. double: a peer inside one tree is a leaf of the other, so that all links are
    busy in both directions and a peer sends the payload twice at most (Sanders, Speck and Träff
    2009, in the shape that NCCL gives it).
    """

    name: ClassVar[str] = "tree"
    exact: ClassVar[bool] = True
    pipelines: ClassVar[bool] = True
    kind: str = "binomial"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PlanError(str(self), f"trees are {' or '.join(KINDS)}", "tree(double)")

    def schedule(self, layout: Layout, round: int = 0, seed: int = 0) -> Schedule:
        order = [peer for group in layout.by_host for peer in group]
        if self.kind == "binomial":
            return Schedule(layout.size, 1, tree_phases(binomial(layout.size), order, 0))
        first = tree_phases(binary(layout.size), order, 0)
        second = tree_phases(binary(layout.size), other_order(order), 1)
        together = tuple(one + two for one, two in zip(first, second, strict=True))
        return Schedule(layout.size, 2, together)

    def bytes_per_peer(self, layout: Layout, payload_bytes: float) -> float:
        times = float((layout.size - 1).bit_length())
        if self.kind == "double":
            times = {1: 0.0, 2: 1.0, 3: 1.5}.get(layout.size, 2.0)
        return times * payload_bytes

    def phases(self, layout: Layout) -> int:
        return 2 * (layout.size - 1).bit_length()


def binomial(n: int) -> Parents:
    """Each place without its lowest set bit: 6 under 4 under 0."""
    return [None, *(place & (place - 1) for place in range(1, n))]


def binary(n: int) -> Parents:
    """A tree in which each place but the root has two below it at most, and odd places none."""
    parents: Parents = [None]
    for place in range(1, n):
        bit = place & -place
        above = (place ^ bit) | (bit << 1)
        parents.append(above if above < n else place ^ bit)
    return parents


def other_order(order: list[int]) -> list[int]:
    """The peers so that those at odd places come to even ones, but for one where n is odd."""
    return order[::-1] if len(order) % 2 == 0 else [*order[1:], order[0]]


def tree_phases(parents: Parents, order: list[int], chunk: int) -> tuple[Phase, ...]:
    """Up to the root and down again. A place that ends in k zero bits has its turn in phase k: in
    both trees those below it end in fewer."""
    levels: list[list[tuple[int, int]]] = [[] for _ in range((len(parents) - 1).bit_length())]
    for place, parent in enumerate(parents):
        if parent is not None:
            level = (place & -place).bit_length() - 1
            levels[level].append((order[place], order[parent]))
    up = [tuple(Transfer(c, p, chunk, chunk + 1, "add") for c, p in level) for level in levels]
    down = [tuple(Transfer(p, c, chunk, chunk + 1, "copy") for c, p in level) for level in levels]
    return (*up, *reversed(down))
