"""A link between hosts whose messages inside a host take another way."""

from __future__ import annotations

import pytest
import torch
from test_execute import all_fine, values
from test_topology import EXACT
from torch import Tensor

from allfuse.base.errors import PeerLost
from allfuse.execute import plot, run
from allfuse.launcher.base import current_world
from allfuse.launcher.thread import launch_threads
from allfuse.link import Link
from allfuse.link.bridged import BridgedLink
from allfuse.link.thread import Script
from allfuse.topology import Layout, Topology

HOSTS = Layout(("a", "b", "a", "b", "b"))


def open_links() -> tuple[BridgedLink, Link, Link]:
    """The bridged link of this rank, and what it is made of."""
    world = current_world()
    assert world is not None
    cpu = torch.device("cpu")
    outer = world.link("outer", tuple(range(5)), cpu)
    mates = next(group for group in HOSTS.by_host if world.rank in group)
    inner = world.link("inner", mates, cpu)
    return BridgedLink(outer, inner), outer, inner


@pytest.mark.parametrize("topology", EXACT, ids=str)
def test_sums_are_right_and_bytes_go_where_they_belong(topology: Topology) -> None:
    start = values(5, 40)

    def work() -> tuple[Tensor, int, int]:
        link, outer, inner = open_links()
        block = start[link.rank].clone()
        run(plot(topology, HOSTS, link.rank, 0, 0), link, block, "test", 2)
        assert link.sent_bytes == outer.sent_bytes + inner.sent_bytes
        return block, outer.sent_bytes, inner.sent_bytes

    outcomes = all_fine(launch_threads(work, 5))
    assert all(torch.equal(block, start.sum(0)) for block, _, _ in outcomes)
    sent = {"outer": 0.0, "inner": 0.0}
    schedule = topology.schedule(HOSTS)
    for phase in schedule.phases:
        for src, dst, first, stop, *_ in phase:
            where = "inner" if HOSTS.hosts[src] == HOSTS.hosts[dst] else "outer"
            sent[where] += (stop - first) / schedule.chunks * start[0].nbytes
    assert sum(outside for _, outside, _ in outcomes) == pytest.approx(sent["outer"], rel=0.1)
    assert sum(inside for _, _, inside in outcomes) == pytest.approx(sent["inner"], rel=0.1)


def test_a_peer_lost_on_either_side_is_named_with_the_step() -> None:
    def work() -> None:
        link, _, _ = open_links()
        link.step = 7
        for peer in range(5):
            if peer != link.rank:
                link.send(torch.zeros(3), peer, "greet").wait()
        for peer in range(5):
            if peer != link.rank:
                link.receive(torch.zeros(3), peer, "greet").wait()

    for count in range(4):
        outcomes = launch_threads(work, 5, script=Script(kill={(2, count)}))
        lost = [outcome for outcome in outcomes if isinstance(outcome, PeerLost)]
        assert lost
        assert all(error.peer == 2 and error.step == 7 for error in lost)


def test_collectives_take_the_outer_link() -> None:
    def work() -> tuple[float, float]:
        link, _, inner = open_links()
        total = torch.tensor([float(link.rank)])
        link.all_reduce(total, "sum").wait()
        told = torch.tensor([float(link.rank)])
        link.broadcast(told, "tell", root=3).wait()
        assert inner.sent_bytes == 0
        assert link.kind == "thread, thread inside hosts"
        assert link.rank in link.alive()
        return float(total), float(told)

    assert all_fine(launch_threads(work, 5)) == [(10.0, 3.0)] * 5
