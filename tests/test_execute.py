"""Schedules run on links: sums are right for any number of peers, size, type and cutting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_topology import ALL, EXACT, GOSSIP, mixing
from torch import Tensor

from allfuse.base.errors import BadMessage, DistributedError, PeerLost
from allfuse.codec import MessageCodec
from allfuse.codec.int8 import Int8
from allfuse.execute import Encoding, plot, run, segments_of
from allfuse.launcher.base import current_world
from allfuse.launcher.thread import first_failure, launch_threads
from allfuse.link import Link
from allfuse.link.runner import Runner
from allfuse.link.thread import Script
from allfuse.topology import Layout, Topology
from allfuse.topology.ring import Ring
from allfuse.topology.tree import Tree

SIZES = [0, 1, 2, 7, 64, 1009]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def open_link(name: str = "test") -> Link:
    world = current_world()
    assert world is not None
    return world.link(name, tuple(range(world.size)), torch.device("cpu"))


def values(n: int, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Whole numbers, whose sums are exact in every type: (n, size)."""
    chance = torch.Generator().manual_seed(n * 10_007 + size)
    return torch.randint(-3, 4, (n, size), generator=chance).to(dtype)


def fuse_all(
    topology: Topology, n: int, size: int, segments: int = 1, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], list[int]]:
    """What every peer ends with, and the bytes that each sent."""
    start = values(n, size, dtype)

    def work() -> tuple[Tensor, int]:
        link = open_link()
        block = start[link.rank].clone()
        run(plot(topology, Layout.of(n), link.rank, 0, 0), link, block, "test", segments)
        return block, link.sent_bytes

    outcomes = all_fine(launch_threads(work, n))
    return [block for block, _ in outcomes], [sent for _, sent in outcomes]


def all_fine(outcomes: list[Any]) -> list[Any]:
    assert first_failure(outcomes) is None
    return outcomes


@pytest.mark.parametrize("topology", EXACT, ids=str)
def test_all_peers_end_with_the_sum_of_all(topology: Topology) -> None:
    for n in (*range(1, 10), 16, 17):
        for size in (5, 40):
            blocks, _ = fuse_all(topology, n, size)
            expected = values(n, size).sum(0)
            assert all(torch.equal(block, expected) for block in blocks), (n, size)


@pytest.mark.parametrize("topology", EXACT, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("segments", [1, 3, 10])
def test_any_size_and_cutting(topology: Topology, size: int, segments: int) -> None:
    blocks, _ = fuse_all(topology, 4, size, segments)
    assert all(torch.equal(block, values(4, size).sum(0)) for block in blocks)


@pytest.mark.parametrize("topology", EXACT, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_float_type(topology: Topology, dtype: torch.dtype) -> None:
    blocks, _ = fuse_all(topology, 5, 33, 2, dtype)
    assert all(torch.equal(block, values(5, 33).sum(0).to(dtype)) for block in blocks)


@pytest.mark.parametrize("topology", EXACT, ids=str)
@pytest.mark.parametrize("segments", [1, 4])
def test_rounded_sums_are_equal_on_all_peers_bit_for_bit(topology: Topology, segments: int) -> None:
    def work() -> Tensor:
        link = open_link()
        torch_random = torch.Generator().manual_seed(link.rank)
        block = torch.randn(1001, generator=torch_random)
        run(plot(topology, Layout.of(7, 3), link.rank, 0, 0), link, block, "test", segments)
        return block

    blocks = all_fine(launch_threads(work, 7))
    assert all(torch.equal(block, blocks[0]) for block in blocks)


@pytest.mark.parametrize("topology", ALL, ids=str)
def test_bytes_on_the_link_are_those_declared(topology: Topology) -> None:
    for n in (2, 3, 4, 6, 8):
        size = 3840  # what every number of chunks here divides
        _, sent = fuse_all(topology, n, size, 2)
        assert max(sent) == topology.bytes_per_peer(Layout.of(n), size * 8)


@pytest.mark.parametrize("topology", GOSSIP, ids=str)
def test_gossip_mixes_by_its_matrix(topology: Topology) -> None:
    for n in (2, 3, 5, 8):
        blocks, _ = fuse_all(topology, n, 6)
        expected = torch.tensor(mixing(topology, n)) @ values(n, 6)
        torch.testing.assert_close(torch.stack(blocks), expected)


def last_operation(topology: Topology, n: int, rank: int) -> int:
    """How many transfers a rank has a part in."""
    turns = plot(topology, Layout.of(n), rank, 0, 0).turns
    return sum(len(turn.sends) + len(turn.receives) for turn in turns)


@pytest.mark.parametrize("topology", ALL, ids=str)
@pytest.mark.parametrize("how", ["kill", "stall"])
def test_a_peer_that_is_lost_at_any_moment_is_named_and_no_sum_is_wrong(
    topology: Topology, how: str
) -> None:
    n, size = (4, 12) if how == "kill" else (3, 6)
    start = values(n, size)
    expected = start.sum(0)

    def work() -> Tensor:
        link = open_link()
        link.timeout_s = 0.02 if how == "stall" else 10.0
        block = start[link.rank].clone()
        run(plot(topology, Layout.of(n), link.rank, 0, 0), link, block, "round 1", 1)
        return block

    for victim in range(n):
        for count in range(last_operation(topology, n, victim)):
            script = Script(**{how: {(victim, count)}})
            outcomes = launch_threads(work, n, script=script)
            for rank, outcome in enumerate(outcomes):
                if isinstance(outcome, DistributedError):
                    assert isinstance(outcome, PeerLost)
                    assert "round 1" in str(outcome)
                elif rank != victim and topology.exact:  # it needed nothing of the victim any more
                    assert torch.equal(outcome, expected)


@pytest.mark.parametrize("topology", ALL, ids=str)
@pytest.mark.parametrize("codec", [None, Int8()], ids=str)
def test_garbage_at_any_moment_is_named_and_no_sum_is_wrong(
    topology: Topology, codec: MessageCodec | None
) -> None:
    if codec is not None and (not topology.exact or topology.name == "native"):
        return  # a pairing that is refused
    n, size = 4, 12
    start = values(n, size)

    def work() -> Tensor:
        link = open_link()
        link.timeout_s = 10.0
        block = start[link.rank].clone()
        encoding = None
        if codec is not None:
            encoding = Encoding(codec=codec, error=torch.zeros_like(block), seed=0)
        run(
            plot(topology, Layout.of(n), link.rank, 0, 0), link, block, "round 1", encoding=encoding
        )
        return block

    fine = all_fine(launch_threads(work, n))
    for culprit in range(n):
        for count in range(last_operation(topology, n, culprit)):
            outcomes = launch_threads(work, n, script=Script(garble={(culprit, count)}))
            errors = [outcome for outcome in outcomes if isinstance(outcome, DistributedError)]
            found = [error for error in errors if isinstance(error, BadMessage)]
            assert bool(found) == bool(errors)  # an operation that receives sends no garbage
            assert all(error.peer == culprit and "round 1" in str(error) for error in found)
            for rank, outcome in enumerate(outcomes):
                if isinstance(outcome, Tensor):
                    assert torch.equal(outcome, fine[rank])


def test_a_garbled_message_is_an_error() -> None:
    def work() -> None:
        link = open_link()
        block = torch.zeros(10 + link.rank)
        run(plot(Ring(), Layout.of(2), link.rank, 0, 0), link, block, "test", 1)

    assert isinstance(first_failure(launch_threads(work, 2)), DistributedError)


def test_a_runner_works_beside_its_owner_and_in_order() -> None:
    def work() -> tuple[list[Tensor], int]:
        link = open_link()
        runner = Runner("test runner")
        blocks = [torch.full((100,), float(i + link.rank)) for i in range(20)]
        mine = plot(Tree("double"), Layout.of(3), link.rank, 0, 0)

        def job(block: Tensor) -> Callable[[], None]:
            return lambda: run(mine, link, block, "test", 3)

        works = [runner.start(job(block)) for block in blocks]
        for each in reversed(works):
            each.wait()
        runner.close()
        return blocks, link.rank

    for blocks, _ in all_fine(launch_threads(work, 3)):
        assert [float(block[0]) for block in blocks] == [3.0 * i + 3 for i in range(20)]


def test_after_an_error_a_runner_does_nothing_more() -> None:
    runner, done = Runner("test runner"), []
    fails = runner.start(lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    later = runner.start(lambda: done.append(1))
    for work in (fails, later):
        with pytest.raises(ZeroDivisionError):
            work.wait()
    runner.close()
    assert done == []


def test_large_blocks_are_cut_and_small_ones_are_not() -> None:
    assert segments_of(Ring(), 1000) == 1
    assert segments_of(Ring(), 20_000_000) == 2
    assert segments_of(Ring(), 1_000_000_000) == 20
    assert segments_of(Tree(), 4_000_000) > segments_of(Ring(), 4_000_000)
    assert segments_of(Tree(), 10**12) <= 64
