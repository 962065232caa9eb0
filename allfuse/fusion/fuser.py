"""A fusion at work: blocks of values of all peers of an axis become one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from allfuse.execute import plot, run, segments_of
from allfuse.fusion.base import Fusion
from allfuse.link.runner import Runner
from allfuse.rule import GatherRule
from allfuse.topology import Layout, Native

if TYPE_CHECKING:
    from torch import Tensor

    from allfuse.link import Link, Work


class Fuser:
    """A fusion on the link of its axis.

    Blocks are fused in the order in which they are started, which is the same on all peers. The
    link's own all-reduce runs wherever the link runs it; a schedule runs in a thread beside the
    caller, who alone must not use the link meanwhile.

    Args:
        layout: which peers share a host; None is one host for all.
        seed: of topologies that draw (gossip in random pairs).
    """

    def __init__(
        self, fusion: Fusion, link: Link, layout: Layout | None = None, seed: int = 0
    ) -> None:
        self.fusion, self.link = fusion, link
        self.layout = layout or Layout.of(link.size)
        self.seed = seed
        self._runner = Runner(f"allfuse-fuse-{link.rank}")

    @property
    def mixes(self) -> bool:
        """Whether peers come closer only, and do not end equal."""
        return not self.fusion.topology.exact

    def start(
        self, block: Tensor, operation: str, round: int = 0, weights: Sequence[float] = ()
    ) -> Work:
        """Start to sum a contiguous block over the peers, in place; or to mix it.

        A rule that gathers fuses it with the peers' `weights` (all alike if there are none). 2
        (n-1)/n of its bytes are sent by each peer with native; see each topology for its own.
        """
        topology, link = self.fusion.topology, self.link
        if link.size == 1 or isinstance(topology, Native):
            return link.all_reduce(block, operation)
        number = round if self.mixes else 0  # the others do the same in every round
        mine = plot(topology, self.layout, link.rank, number, self.seed)
        segments = segments_of(topology, block.nbytes)
        gather = None
        if isinstance(rule := self.fusion.rule, GatherRule):
            exact = torch.promote_types(block.dtype, torch.float32)
            shares = torch.tensor(weights or [1.0] * link.size, dtype=exact, device=block.device)
            gather = functools.partial(rule.fuse, weights=shares)
        return self._runner.start(lambda: run(mine, link, block, operation, segments, gather))

    def close(self) -> None:
        """Waits for nobody."""
        self._runner.close()
