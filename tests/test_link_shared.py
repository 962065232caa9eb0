"""Transfers in shared memory: what they promise, and how they end when a rank does."""

from __future__ import annotations

import ast
import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_topology import ALL, mixing
from torch import Tensor

from allfuse.base.errors import AllfuseError, BadMessage, PeerLost, WorkerFailed
from allfuse.execute import plot, run
from allfuse.launcher.base import World, current_world
from allfuse.launcher.local import launch_local
from allfuse.link import Link, mail, meeting, shared
from allfuse.link.check import SUMMABLE
from allfuse.link.mail import CELL_BYTES, CELLS, mail_bytes
from allfuse.link.meeting import SLOT_BYTES
from allfuse.link.shared import SharedLink
from allfuse.topology import Layout

pytestmark = pytest.mark.skipif(not shared.AVAILABLE, reason="no shared memory without names here")

CPU = torch.device("cpu")
FINE_BYTES = 4096


def world() -> World:
    found = current_world()
    assert found is not None
    return found


def open_link(name: str = "test") -> SharedLink:
    link = world().link(name, tuple(range(world().size)), CPU)
    assert isinstance(link, SharedLink)
    return link


def cut_finely() -> None:
    """Let this rank's links cut even small tensors into many pieces."""
    meeting.SLOT_BYTES, meeting.SHORT_BYTES, mail.CELL_BYTES = FINE_BYTES, FINE_BYTES // 4, 512


def gather(value: Any) -> list[str]:
    """What every rank says, on all of them."""
    board = world().board
    board.set(f"told/{world().rank}", repr(value).encode())
    return [board.wait(f"told/{rank}", 60).decode() for rank in range(world().size)]


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_sums_are_right_for_any_size_and_type_and_equal_on_all_ranks(workers: int) -> None:
    def work() -> list[str]:
        cut_finely()
        link, wrong = open_link(), []
        for dtype in SUMMABLE:
            for size in (0, 1, 2, 7, 127, 1009, 3 * FINE_BYTES + 13):
                ranks = range(link.size)
                parts = [((torch.arange(size) + rank) % 5).to(dtype) for rank in ranks]
                block = parts[link.rank].clone()
                link.all_reduce(block, "sum").wait()
                if not torch.equal(block, torch.stack(parts).sum(0).to(dtype)):
                    wrong.append((dtype, size))
        assert not wrong
        return gather(rounded_sums(link))

    told = launch_local(work, workers)
    assert len(told) == workers
    assert len(set(told)) == 1


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_parts_are_summed_where_they_belong_in_the_order_of_ranks(workers: int) -> None:
    def work() -> None:
        cut_finely()
        link = open_link()
        for dtype in SUMMABLE:
            for size in (0, 1, 7, 127, 1009, FINE_BYTES + 13):
                made = [
                    torch.randn(
                        link.size, size, generator=torch.Generator().manual_seed(rank)
                    ).mul(8).to(dtype)
                    for rank in range(link.size)
                ]  # fmt: skip
                target, sent = torch.full((size,), 3).to(dtype), link.sent_bytes
                link.reduce_scatter(target, made[link.rank], "sum parts").wait()
                assert link.sent_bytes - sent == (link.size - 1) * target.nbytes
                expected = made[0][link.rank].clone()
                for other in made[1:]:
                    expected += other[link.rank]
                assert torch.equal(target, expected), (dtype, size)
                link.all_reduce(target, "sum in between").wait()  # over the same slots

    launch_local(work, workers)


def rounded_sums(link: Link) -> list[float]:
    """What sums of numbers that must be rounded come to: two of them short, the last in pieces."""
    found = []
    for size in (10, 1_001, 10_001):
        block = torch.randn(size, generator=torch.Generator().manual_seed(link.rank))
        sent = link.sent_bytes
        link.all_reduce(block, "sum").wait()
        assert link.sent_bytes - sent == 2 * (link.size - 1) * block.nbytes // link.size
        found.append(block.double().sum().item())
    return found


@pytest.mark.parametrize("threads", [1, 2])
def test_sums_and_broadcasts_are_right_in_pieces_of_the_real_size(threads: int) -> None:
    def work() -> None:
        torch.set_num_threads(threads)
        link = open_link()
        size = SLOT_BYTES + 13  # of 4 bytes: five pieces
        for shift in range(2):  # the second one begins in another slot
            block = torch.arange(size, dtype=torch.float32) % 100 + link.rank + shift
            link.all_reduce(block, "sum").wait()
            assert torch.equal(block, (torch.arange(size) % 100 * 2 + 1 + 2 * shift).float())
        block += link.rank
        link.broadcast(block, "tell", root=1).wait()
        assert torch.equal(block, (torch.arange(size) % 100 * 2 + 4).float())

    launch_local(work, 2)


@pytest.mark.parametrize("workers", [2, 4])
def test_every_topology_runs_over_shared_memory(workers: int) -> None:
    def work() -> list[str]:
        cut_finely()
        link = open_link()
        told: list[tuple[str, float, float | None]] = []
        for topology in ALL:
            mine = plot(topology, Layout.of(link.size), link.rank, 0, 0)
            for size in (0, 1, 1009, 9_600):
                start = torch.randint(
                    -3, 4, (link.size, size), generator=torch.Generator().manual_seed(size)
                ).float()
                block, sent = start[link.rank].clone(), link.sent_bytes
                run(mine, link, block, f"{topology} of {size}", segments=2)
                if topology.exact:
                    assert torch.equal(block, start.sum(0)), (topology, size)
                else:
                    mixed = torch.tensor(mixing(topology, link.size)).float() @ start
                    torch.testing.assert_close(block, mixed[link.rank])
            declared = topology.bytes_per_peer(Layout.of(link.size), block.nbytes)
            told.append((str(topology), link.sent_bytes - sent, declared))
            if topology.exact:
                block = torch.randn(1009, generator=torch.Generator().manual_seed(link.rank))
                run(mine, link, block, f"{topology}, rounded", segments=3)
                told.append((str(topology), block.double().sum().item(), None))
        return gather(told)

    ranks = [ast.literal_eval(each) for each in launch_local(work, workers)]
    for found in zip(*ranks, strict=True):
        topology, _, declared = found[0]
        if declared is None:
            assert len(set(found)) == 1, topology  # equal on all ranks, bit for bit
        else:
            assert max(sent for _, sent, _ in found) == declared, topology


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


def test_a_column_of_a_matrix_and_another_device_are_refused_and_a_matrix_is_not() -> None:
    def work() -> None:
        link = open_link()
        block = torch.ones(4, 6)
        peer = 1 - link.rank
        for wrong, why in ((block[:, 0], "contiguous"), (block.to("meta"), "cpu")):
            with pytest.raises(ValueError, match=why):
                link.all_reduce(wrong, "sum")
            with pytest.raises(ValueError, match=why):
                link.broadcast(wrong, "tell")
            with pytest.raises(ValueError, match=why):
                link.send(wrong, peer, "message")
            with pytest.raises(ValueError, match=why):
                link.receive(wrong, peer, "message")
        link.all_reduce(block, "sum").wait()
        assert block.eq(2).all()

    launch_local(work, 2)


def test_messages_may_be_waited_for_in_any_order_and_match_in_order_between_two_ranks() -> None:
    def work() -> None:
        cut_finely()
        link = open_link()
        peers = [rank for rank in range(link.size) if rank != link.rank]
        sizes = [0, 1, 7, 250, 20_000, 3, 100_003, 0, 16]
        sent = link.sent_bytes
        works, blocks = [], {}
        for peer in peers:
            for i, size in enumerate(sizes):
                blocks[peer, i] = torch.empty(size)
                works.append(link.receive(blocks[peer, i], peer, "message"))
        for i, size in enumerate(sizes):
            for peer in reversed(peers):
                value = torch.arange(size, dtype=torch.float32) + 100 * link.rank + i
                works.append(link.send(value, peer, "message"))
        order = torch.randperm(len(works), generator=torch.Generator().manual_seed(link.rank))
        for place in order.tolist():
            works[place].wait()
        for (peer, i), block in blocks.items():
            assert torch.equal(block, torch.arange(len(block)).float() + 100 * peer + i)
        assert link.sent_bytes - sent == 4 * sum(sizes) * len(peers)

    launch_local(work, 3)


def test_messages_pass_while_both_ranks_wait_for_something_else() -> None:
    def work() -> None:
        cut_finely()
        link = open_link()
        block, told = torch.full((50_000,), 3.0), torch.zeros(3)
        if link.rank == 0:
            sent = link.send(block, 1, "message")
            link.broadcast(told, "tell").wait()  # rank 1 comes after it has the message
            sent.wait()
        else:
            found = torch.zeros(50_000)
            link.receive(found, 0, "message").wait()
            assert torch.equal(found, block)
            link.broadcast(told, "tell").wait()

    launch_local(work, 2)


def test_two_threads_may_wait_for_messages_at_once() -> None:
    def work() -> None:
        cut_finely()
        link = open_link()
        peer, size = 1 - link.rank, 20_000

        def exchange(blocks: list[Tensor]) -> None:
            for block in blocks:
                works[id(block)].wait()

        received = [torch.empty(size) for _ in range(20)]
        works = {id(block): link.receive(block, peer, "message") for block in received}
        sent = [torch.full((size,), float(i)) for i in range(20)]
        works |= {id(block): link.send(block, peer, "message") for block in sent}
        threads = [
            threading.Thread(target=exchange, args=(received[i::2] + sent[i::2],)) for i in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(block.eq(i).all() for i, block in enumerate(received))

    launch_local(work, 2)


def test_what_a_rank_sent_before_it_left_arrives() -> None:
    def work() -> None:
        link = open_link()
        if link.rank == 0:
            link.send(torch.arange(1000.0), 1, "message").wait()
            link.close()
            world().board.set("left", b"")
        else:
            world().board.wait("left", 60)
            for name in ("message", "another"):
                block = torch.zeros(1000)
                received = link.receive(block, 0, name)
                if name == "another":
                    with pytest.raises(PeerLost, match="another"):
                        received.wait()
                else:
                    received.wait()
                    assert torch.equal(block, torch.arange(1000.0))

    launch_local(work, 2)


def test_messages_of_another_size_and_garbage_are_refused() -> None:
    def work() -> None:
        link = open_link()
        link.step = 3
        if link.rank == 0:
            link.send(torch.zeros(10), 1, "message").wait()
            lane = link._mail._sends[2]
            link.send(torch.zeros(10), 2, "message").wait()
            lane._map[lane._first : lane._first + 16] = b"\xff" * 16
        gather("sent")
        if link.rank > 0:
            with pytest.raises(BadMessage, match="same size") as caught:
                link.receive(torch.zeros(10 + (link.rank == 1)), 0, "message").wait()
            error = caught.value
            assert (error.rank, error.peer, error.step) == (link.rank, 0, 3)
            assert error.operation == "message"
            with pytest.raises(BadMessage):
                link.receive(torch.zeros(10), 0, "later").wait()  # they are out of step

    launch_local(work, 3)


@pytest.mark.parametrize("how", ["killed", "silent"])
def test_who_is_lost_in_a_message_is_named_within_the_deadline(how: str, tmp_path: Path) -> None:
    def work() -> None:
        link = open_link()
        link.step, link.timeout_s = 7, 20.0 if how == "killed" else 0.5
        link.all_reduce(torch.ones(10), "first").wait()
        if link.rank == 1 and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        begin, block = time.monotonic(), torch.zeros(CELLS * CELL_BYTES)  # more than cells hold
        if link.rank != 1:
            move = link.send if link.rank == 0 else link.receive
            try:
                move(block, 1, "second").wait()
            except PeerLost as lost:
                assert time.monotonic() - begin < 10
                (tmp_path / str(link.rank)).write_text(str(lost))
            world().board.set(f"over/{link.rank}", b"")
        for rank in (0, 2):
            world().board.wait(f"over/{rank}", 60)

    with contextlib.suppress(AllfuseError):
        launch_local(work, 3)
    for rank in (0, 2):
        assert f"rank {rank} lost rank 1 in second at step 7" in (tmp_path / str(rank)).read_text()


def test_memory_stays_the_same_whatever_is_sent() -> None:
    def shared_kb() -> int:
        lines = Path("/proc/self/smaps").read_text().splitlines()
        heads = [i for i, line in enumerate(lines) if "memfd:allfuse" in line]
        return sum(int(lines[i + 1].split()[1]) for i in heads)

    def work() -> None:
        link = open_link()
        before = shared_kb()
        assert before * 1024 <= 2 * (3 * SLOT_BYTES + mail_bytes(2) + 8192)
        block = torch.zeros(20_000_000)
        received = link.receive(torch.empty_like(block), 1 - link.rank, "message")
        link.send(block, 1 - link.rank, "message").wait()
        received.wait()
        link.all_reduce(block, "sum").wait()
        assert shared_kb() == before

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


def test_nothing_is_left_of_killed_ranks(tmp_path: Path) -> None:
    def work() -> None:
        old = set(opened())
        for number in range(3):
            link = open_link(f"test {number}")
            link.all_reduce(torch.ones(10), "sum").wait()
            link.send(torch.ones(10), 1 - link.rank, "message").wait()
        new = set(opened()) - old
        assert any("socket" in name for name in new)
        assert all(name.startswith("/memfd:") for name in new if name[0] == "/"), new
        assert "/dev/shm/" not in Path("/proc/self/maps").read_text()
        gather((tmp_path / str(link.rank)).write_text("\n".join(new)))
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(WorkerFailed, match="SIGKILL"):
        launch_local(work, 2)
    nodes = [line.split()[6] for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    for rank in range(2):
        names = (tmp_path / str(rank)).read_text().splitlines()
        assert not {f"socket:[{node}]" for node in nodes} & set(names)


def opened() -> list[str]:
    """What this process holds open: no file has a name that could be left behind."""
    found = []
    for handle in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{handle}"))
    return found


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
            os.memfd_create = _refuse  # type: ignore[assignment]
        link = open_link()
        block = torch.full((10,), float(link.rank))
        link.all_reduce(block, "sum").wait()
        assert block.eq(1).all()
        link.close()
        return gather(link.kind)

    assert launch_local(work, 2) == ["'gloo'", "'gloo'"]


def _refuse(*arguments: Any) -> int:
    raise PermissionError("by design")
