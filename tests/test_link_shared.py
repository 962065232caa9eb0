"""Sums in shared memory: what they promise, and how they end when a rank does."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from allfuse.base.errors import AllfuseError, BadMessage, PeerLost, WorkerFailed
from allfuse.launcher.base import World, current_world
from allfuse.launcher.local import launch_local
from allfuse.link import shared
from allfuse.link.meeting import SLOT_BYTES
from allfuse.link.shared import SharedLink

pytestmark = pytest.mark.skipif(not shared.AVAILABLE, reason="no shared memory without names here")

CPU = torch.device("cpu")
SIZES = [0, 1, 2, 7, 1009, SLOT_BYTES // 8, SLOT_BYTES // 4 + 1, SLOT_BYTES + 13]


def world() -> World:
    found = current_world()
    assert found is not None
    return found


def open_link(name: str = "test") -> SharedLink:
    link = world().link(name, tuple(range(world().size)), CPU)
    assert isinstance(link, SharedLink)
    return link


def gather(value: Any) -> list[str]:
    """What every rank says, on all of them."""
    board = world().board
    board.set(f"told/{world().rank}", repr(value).encode())
    return [board.wait(f"told/{rank}", 60).decode() for rank in range(world().size)]


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_sums_are_right_for_any_size_and_type_and_equal_on_all_ranks(workers: int) -> None:
    def work() -> list[str]:
        link, wrong = open_link(), []
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64):
            for size in SIZES:
                ranks = range(link.size)
                parts = [((torch.arange(size) + rank) % 5).to(dtype) for rank in ranks]
                block = parts[link.rank].clone()
                link.all_reduce(block, "sum").wait()
                if not torch.equal(block, torch.stack(parts).sum(0).to(dtype)):
                    wrong.append((dtype, size))
        assert not wrong
        rounded = torch.randn(10_001, generator=torch.Generator().manual_seed(link.rank))
        sent = link.sent_bytes
        link.all_reduce(rounded, "sum").wait()
        assert link.sent_bytes - sent == 2 * (link.size - 1) * rounded.nbytes // link.size
        return gather(rounded.double().sum().item())

    told = launch_local(work, workers)
    assert len(told) == workers
    assert len(set(told)) == 1


def test_many_sums_may_be_under_way_and_other_transfers_between_them() -> None:
    def work() -> None:
        link = open_link()
        blocks = [torch.full((1000 * i,), float(i + link.rank)) for i in range(1, 30)]
        works = [link.all_reduce(block, f"sum {i}") for i, block in enumerate(blocks)]
        told = torch.full((3,), float(link.rank))
        link.broadcast(told, "tell", root=1).wait()
        assert told.tolist() == [1.0] * 3
        for each in reversed(works):
            each.wait()
        assert all(block.eq(2 * i + 1).all() for i, block in enumerate(blocks, start=1))

    launch_local(work, 2)


def test_a_column_of_a_matrix_is_refused_and_a_matrix_is_not() -> None:
    def work() -> None:
        link = open_link()
        block = torch.ones(4, 6)
        with pytest.raises(ValueError, match="contiguous"):
            link.all_reduce(block[:, 0], "sum")
        link.all_reduce(block, "sum").wait()
        assert block.eq(2).all()

    launch_local(work, 2)


@pytest.mark.parametrize("how", ["killed", "raises"])
def test_a_rank_that_is_lost_is_named_by_all_others(how: str, tmp_path: Path) -> None:
    def work() -> None:
        link = open_link()
        link.all_reduce(torch.ones(10), "first").wait()
        link.step = 7
        if link.rank == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise AllfuseError("enough")
        try:
            link.all_reduce(torch.ones(SLOT_BYTES), "second").wait()
        except PeerLost as lost:
            (tmp_path / str(link.rank)).write_text(str(lost))
            raise

    begin = time.monotonic()
    with pytest.raises(AllfuseError):
        launch_local(work, 3)
    assert time.monotonic() - begin < 20
    for rank in (0, 2):
        assert f"rank {rank} lost rank 1 in second at step 7" in (tmp_path / str(rank)).read_text()


def test_a_rank_that_does_not_come_is_named_after_the_deadline(tmp_path: Path) -> None:
    def work() -> None:
        link = open_link()
        link.timeout_s = 1.0
        if link.rank == 1:
            world().board.wait("over", 60)
            return
        try:
            link.all_reduce(torch.ones(10), "sum").wait()
        except PeerLost as lost:
            (tmp_path / "said").write_text(str(lost))
        world().board.set("over", b"")

    launch_local(work, 2)
    assert "rank 0 lost rank 1 in sum" in (tmp_path / "said").read_text()


def test_ranks_that_call_different_sums_hear_of_it() -> None:
    def work() -> None:
        link = open_link()
        block: Tensor = torch.ones(10 + link.rank)
        with pytest.raises(BadMessage, match="another operation, size or type"):
            link.all_reduce(block, "sum").wait()
        with pytest.raises(BadMessage):
            link.all_reduce(block, "later").wait()  # the ranks are out of step

    launch_local(work, 2)


def test_nothing_is_left_of_the_memory_and_the_sockets() -> None:
    before = set(os.listdir("/dev/shm"))

    def work() -> list[int]:
        counts = []
        for number in range(4):
            link = open_link(f"test {number}")
            link.all_reduce(torch.ones(10), "sum").wait()
            link.close()
            del link
            counts.append(len(os.listdir("/proc/self/fd")))
        os.kill(os.getpid(), signal.SIGKILL)
        return counts

    with pytest.raises(WorkerFailed):
        launch_local(work, 2)
    assert set(os.listdir("/dev/shm")) == before


def test_closed_links_give_their_memory_back() -> None:
    def count() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:allfuse")

    def work() -> list[str]:
        for number in range(4):
            link = open_link(f"test {number}")
            if number % 2:
                link.all_reduce(torch.ones(10), "sum").wait()
            assert count() >= 2
            link.close()
            link.close()
        deadline = time.monotonic() + 10
        while count() and time.monotonic() < deadline:
            time.sleep(0.01)
        return gather(count())

    assert launch_local(work, 2) == ["0", "0"]


def test_where_one_rank_may_not_share_memory_all_take_the_process_group() -> None:
    def work() -> list[str]:
        if world().rank == 1:
            os.memfd_create = _refuse
        link = open_link()
        block = torch.full((10,), float(link.rank))
        link.all_reduce(block, "sum").wait()
        assert block.eq(1).all()
        link.close()
        return gather(link.kind)

    assert launch_local(work, 2) == ["'gloo'", "'gloo'"]


def _refuse(*arguments: Any) -> int:
    raise PermissionError("by design")
