"""Topologies tried against each other, on the link itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from allfuse.execute import plot, run, segments_of
from allfuse.topology import Layout, Native, Topology

if TYPE_CHECKING:
    from torch import Tensor

    from allfuse.link import Link

ROUNDS = 2


def race(
    link: Link, layout: Layout, topologies: Sequence[Topology], block: Tensor
) -> tuple[float, ...]:
    """Seconds that a sum of this block takes over each topology: the best of `ROUNDS`, in turns.

    A round takes as long as its slowest peer. All peers must call it, and nothing else may use the
    link meanwhile; all end with the same numbers. The block is summed over and over.

    Phases: (`ROUNDS` + 1) sums over each topology, of which the first does not count; one sum over
    the peers of what they took.

    Raises:
        PeerLost, BadMessage: from the link.
    """
    took = torch.zeros(len(topologies), ROUNDS, link.size, dtype=torch.float64)
    for round in range(-1, ROUNDS):
        for number, topology in enumerate(topologies):
            seconds = _time(link, layout, topology, block)
            if round >= 0:
                took[number, round, link.rank] = seconds
    took = took.to(block.device)
    link.all_reduce(took, "race").wait()
    return tuple(took.amax(2).amin(1).tolist())


def _time(link: Link, layout: Layout, topology: Topology, block: Tensor) -> float:
    link.all_reduce(block.new_zeros(1), "race").wait()
    begin = time.perf_counter()
    if isinstance(topology, Native):
        link.all_reduce(block, "race").wait()
    else:
        mine = plot(topology, layout, link.rank, 0, 0)
        run(mine, link, block, "race", segments_of(topology, block.nbytes))
    if block.device.type == "cuda":
        torch.cuda.synchronize(block.device)
    return time.perf_counter() - begin
