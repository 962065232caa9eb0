"""The link over process groups, between real processes: sums, and ranks that are lost."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from allfuse.base.errors import PeerLost, WorkerFailed
from allfuse.launcher import watch
from allfuse.launcher.base import World, current_world
from allfuse.launcher.local import launch_local, open_store
from allfuse.link import Link, shared
from allfuse.link.check import SUMMABLE
from allfuse.link.group import GroupLink, StoreBoard
from allfuse.link.lookout import Lookout

CPU = torch.device("cpu")
SIZES = [0, 1, 7, 1009]


def world() -> World:
    found = current_world()
    assert found is not None
    return found


def open_link(name: str = "data") -> Link:
    return world().link(name, tuple(range(world().size)), CPU)


def value(rank: int, size: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(size, generator=torch.Generator().manual_seed(rank)) * 8).to(dtype)


def transfers() -> dict[str, Any]:
    """Every operation once, on every rank; sums are collected by rank 0 for comparison."""
    link = open_link()
    me, size = link.rank, link.size
    made = {
        f"{dtype} {count}": value(me, count, dtype)
        for dtype in sorted(SUMMABLE, key=str)
        for count in SIZES
    }
    started = [link.all_reduce(tensor, name) for name, tensor in made.items()]
    for transfer in reversed(started):
        transfer.wait()
    reduced_bytes = link.sent_bytes
    own, parts = torch.zeros(7), value(me, 7 * size, torch.float32).view(size, 7)
    link.reduce_scatter(own, parts, "sum parts").wait()
    total = sum(value(rank, 7 * size, torch.float32).view(size, 7)[me] for rank in range(size))
    assert torch.equal(own, total)
    assert link.sent_bytes - reduced_bytes == (size - 1) * own.nbytes
    mask = torch.arange(6) % 2 == me % 2
    weights = torch.nn.Parameter(value(me, 6, torch.float32))
    short = torch.arange(5, dtype=torch.int16) * me
    for tensor in (mask, weights, short):
        link.broadcast(tensor, "spread", 1).wait()
    flags = torch.zeros(2, dtype=torch.bool)
    if me == 0:
        link.receive(flags, 1, "one").wait()  # comes later than one slice of waiting
    elif me == 1:
        time.sleep(1.2)  # emulated work
        link.send(torch.tensor([False, True]), 0, "one").wait()
    again, total = open_link(), torch.ones(1)  # a second link of the same name
    again.all_reduce(total, "sum on another link").wait()
    seen = [torch.zeros_like(tensor) for tensor in made.values()]
    equal = True
    for other in range(size):
        for name, tensor, copy in zip(made, made.values(), seen, strict=True):
            copy.copy_(tensor)
            link.broadcast(copy, name, other).wait()
            equal &= torch.equal(copy, tensor)
    with pytest.raises(ValueError, match="cannot sum"):
        link.all_reduce(mask, "mask")
    with pytest.raises(ValueError, match="strides"):
        link.all_reduce(torch.ones(4, 6)[:, ::2], "columns")
    link.close()
    again.close()
    return {
        "sums": made,
        "equal": equal,
        "reduced_bytes": reduced_bytes,
        "spread": (mask, weights.detach(), short),
        "flags": flags,
        "total": float(total),
    }


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_transfers_between_processes_give_what_they_promise(workers: int) -> None:
    got = launch_local(transfers, workers, timeout_s=60)
    assert got["equal"]  # every rank's result was compared with every other's, bit for bit
    expected_bytes = 0
    for name, summed in got["sums"].items():
        kind, count = name.split()
        dtype = getattr(torch, kind.removeprefix("torch."))
        expected = value(0, int(count), dtype)
        for rank in range(1, workers):
            expected = expected + value(rank, int(count), dtype)
        fine = torch.finfo(dtype).eps * 64 if dtype.is_floating_point else 0
        torch.testing.assert_close(summed, expected, rtol=0, atol=fine)
        expected_bytes += 2 * (workers - 1) * summed.nbytes // workers
    assert got["reduced_bytes"] == expected_bytes
    mask, weights, short = got["spread"]
    assert torch.equal(mask, torch.arange(6) % 2 == 1)
    assert torch.equal(weights, value(1, 6, torch.float32))
    assert torch.equal(short, torch.arange(5, dtype=torch.int16))
    assert got["flags"].tolist() == [False, True]
    assert got["total"] == workers


def test_parts_are_summed_by_messages_over_gloo_and_small_ones_as_a_whole() -> None:
    """Its own reduce-scatter sums everything, and so sends twice as much."""

    def work() -> None:
        shared.AVAILABLE = False
        link = open_link()
        assert type(link) is GroupLink
        sizes = (0, 5, 1009, 16_384, 300_000)
        makes = [[value(rank, 3 * size, torch.float32).view(3, size) for size in sizes]
                 for rank in range(3)]  # fmt: skip
        targets, before = [torch.zeros(size) for size in sizes], link.sent_bytes
        works = [link.reduce_scatter(target, parts, f"sum parts of {len(target)}")
                 for target, parts in zip(targets, makes[link.rank], strict=True)]  # fmt: skip
        for each in works:
            each.wait()
        *small, by_messages, last = (target.nbytes for target in targets)
        assert link.sent_bytes - before == 4 * sum(small) + 2 * (by_messages + last)
        for at, target in enumerate(targets):
            first, second, third = (made[at][link.rank] for made in makes)
            total = first + second + third
            assert torch.equal(target, total) or target.nbytes < 65_536
            torch.testing.assert_close(target, total, rtol=0, atol=1e-5)
            target.zero_()
            works[at].wait()
            assert not target.any()  # it is over, and nothing comes twice
        link.close()

    launch_local(work, 3, timeout_s=60)


def train_until(victim: int, fault: Callable[[], Any]) -> None:
    """Sums, step by step; at step 3 something happens to one rank."""
    link = open_link()
    total = torch.ones(3)
    for step in range(10):
        link.step = world().step = step
        if step == 3 and link.rank == victim:
            fault()
            return
        link.all_reduce(total, f"sum of step {step}").wait()
    raise AssertionError("the run was to end at step 3")


def failing(fault: Callable[[], Any], workers: int, victim: int, **options: Any) -> WorkerFailed:
    with pytest.raises(WorkerFailed) as caught:
        launch_local(lambda: train_until(victim, fault), workers, **options)
    return caught.value


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fall_silent() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def complain() -> None:
    raise ValueError("no more")


def check_survivors(error: WorkerFailed, workers: int, victim: int, why: str) -> None:
    lines = str(error).splitlines()
    for rank in range(workers):
        if rank == victim:
            continue
        told = [line for line in lines if line.startswith(f"rank {rank} lost ")]
        assert len(told) == 1, error
        assert f"lost rank {victim} in sum of step 3 at step 3 after" in told[0]
        assert why in told[0]


@pytest.mark.parametrize(
    ("workers", "victim"),
    [
        (3, 0),
        pytest.param(2, 1, marks=pytest.mark.slow),
        pytest.param(3, 1, marks=pytest.mark.slow),
        pytest.param(4, 3, marks=pytest.mark.slow),
    ],
)
def test_every_rank_names_the_one_that_was_killed(workers: int, victim: int) -> None:
    begin = time.monotonic()
    error = failing(die, workers, victim, timeout_s=60)
    assert time.monotonic() - begin < 20  # not the deadline of 60 s: a closed connection tells
    assert error.rank == victim
    assert str(error).startswith(f"rank {victim} was killed by SIGKILL")
    check_survivors(error, workers, victim, "was killed by SIGKILL")


def test_every_rank_names_the_one_that_fell_silent_at_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "GRACE_S", 15.0)  # a loaded machine; ends early, see below
    error = failing_and_freed(3, victim=1, timeout_s=2.0)
    check_survivors(error, 3, 1, "gave no answer to the roll call")
    seconds = [float(found) for found in re.findall(r"after ([0-9.]+) s", str(error))]
    assert all(second < 10 for second in seconds)
    assert max(seconds) >= 2.0


def test_the_launcher_does_not_wait_for_one_that_all_others_have_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "GRACE_S", 60.0)
    begin = time.monotonic()
    error = failing(fall_silent, 2, victim=1, timeout_s=1.0)
    assert time.monotonic() - begin < 40
    check_survivors(error, 2, 1, "gave no answer to the roll call")


def failing_and_freed(workers: int, victim: int, timeout_s: float) -> WorkerFailed:
    """A run with a stopped rank, which is killed when all others have told whom they lost."""
    with pytest.raises(WorkerFailed) as caught:
        launch_local(lambda: train_until_stopped(victim, workers), workers, timeout_s=timeout_s)
    return caught.value


def train_until_stopped(victim: int, workers: int) -> None:
    board = world().board
    board.set(f"pid/{world().rank}", str(os.getpid()).encode())
    try:
        train_until(victim, fall_silent)
    except PeerLost:
        board.set(f"told/{world().rank}", b"")
        if world().rank == (victim + 1) % workers:
            for rank in range(workers):
                if rank != victim:
                    board.wait(f"told/{rank}", 30)
            os.kill(int(board.wait(f"pid/{victim}", 1)), signal.SIGKILL)
        raise


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        pytest.param(lambda: None, "had finished its work", id="returns"),
        pytest.param(complain, "ended with ValueError: no more", id="raises"),
    ],
)
def test_a_rank_that_ends_early_says_so_to_the_others(
    fault: Callable[[], Any], why: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        try:
            train_until(1, fault)
        except PeerLost as lost:
            print(lost, flush=True)
            raise

    with pytest.raises(WorkerFailed) as caught:
        launch_local(work, 3, timeout_s=60)
    told = capfd.readouterr().out.splitlines()
    assert len(told) == 2
    for rank in (0, 2):
        line = next(line for line in told if line.startswith(f"rank {rank} "))
        assert "lost rank 1 in sum of step 3 at step 3" in line
        assert why in line
    if "ValueError" in why:
        assert caught.value.rank == 1
        assert str(caught.value) == "rank 1 failed at step 3: ValueError: no more"


def test_a_member_that_never_comes_is_named_when_the_link_is_formed() -> None:
    def work() -> str:
        if world().rank == 1:
            world().board.wait("over", 60)
            return ""
        with pytest.raises(PeerLost) as caught:
            open_link()
        world().board.set("over", b"")
        return str(caught.value)

    told = launch_local(work, 2, timeout_s=1.0)
    assert "rank 0 lost rank 1 in form link data" in told
    assert "is alive but did not come; it is in its own work" in told


def test_a_rank_that_is_somewhere_else_is_named_with_where_it_is() -> None:
    def work() -> str:
        link, other = open_link(), open_link("other")
        with pytest.raises(PeerLost) as caught:
            if link.rank == 0:
                link.all_reduce(torch.ones(1), "sum of gradients").wait()
            else:
                other.all_reduce(torch.ones(1), "exchange of losses").wait()
        told = world().board
        told.set(f"told/{link.rank}", str(caught.value).encode())
        for rank in range(2):
            told.wait(f"told/{rank}", 30)
        return str(caught.value)

    told = launch_local(work, 2, timeout_s=1.5)
    assert "rank 0 lost rank 1 in sum of gradients" in told
    assert "it is in exchange of losses" in told


def test_closing_a_link_waits_for_nobody() -> None:
    def work() -> float:
        link = open_link()
        if link.rank == 0:
            for number in range(3):  # rank 1 never takes part
                link.all_reduce(torch.ones(10), f"sum {number}")
            begin = time.monotonic()
            link.close()
            took = time.monotonic() - begin
            world().board.set("closed", b"")
            return took
        world().board.wait("closed", 60)
        return 0.0

    assert launch_local(work, 2, timeout_s=40) < 10


class Words:
    """A board in this process."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:
        self.values[key] = value

    def get(self, key: str) -> bytes | None:
        return self.values.get(key)

    def wait(self, key: str, timeout_s: float) -> bytes:
        return self.values[key]


@pytest.mark.parametrize(
    ("words", "peer", "why"),
    [
        ({"left/1": "ended with PeerLost", "gone/2": "had finished"}, 2, "had finished"),
        ({"gone/1": "had finished", "lost/2": "was killed"}, 2, "was killed"),
        (
            {"left/1": "ended with PeerLost", "here/2": '{"operation": "sum", "step": 4}'},
            1,
            "ended",
        ),
        ({"here/1": '{"operation": "sum", "step": 4}', "here/2": "{}"}, 2, "its own work"),
        (
            {
                "here/1": '{"operation": "sum", "step": 4}',
                "here/2": '{"operation": "sum", "step": 3}',
            },
            2,
            "step 3",
        ),
    ],
)
def test_the_roll_call_blames_the_cause_before_its_victims(
    words: dict[str, str], peer: int, why: str
) -> None:
    board = Words()
    board.values = {key: word.encode() for key, word in words.items()}
    lookout = Lookout(board, rank=0, size=1)
    found = lookout.who_is_lost((0, 1, 2), "sum", 4)
    assert found[0] == peer
    assert why in found[1]
    assert board.values["alarm"] == b"0"


def test_who_ended_after_a_loss_is_not_blamed_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even if its own code took the error for no failure."""
    monkeypatch.setattr("allfuse.link.lookout.GRACE_S", 0.1)
    board = Words()
    other = Lookout(board, rank=2, size=3)
    assert other.who_is_lost((0, 1, 2), "sum", 4)[0] in (0, 1)  # none of them answers
    other.close("had finished its work", lost_a_peer=False)
    assert Lookout(board, rank=0, size=1).who_is_lost((0, 1, 2), "sum", 4)[0] == 1


def test_if_all_are_there_the_network_is_suspected() -> None:
    board = Words()
    board.values = {f"here/{rank}": b'{"operation": "sum", "step": 4}' for rank in (1, 2)}
    peer, why = Lookout(board, rank=0, size=1).who_is_lost((0, 1, 2), "sum", 4)
    assert peer is None
    assert "network" in why


def test_when_the_board_dies_its_host_is_named_and_the_lookout_ends() -> None:
    store = open_store()
    board = StoreBoard(store)

    def dead(*anything: object) -> bool:
        raise RuntimeError("connection reset")

    class Dead:
        check = staticmethod(dead)
        set = get = staticmethod(dead)

    board.store = Dead()  # type: ignore[assignment]
    lookout = Lookout(board, rank=1, size=2, host=0)
    assert lookout.alarmed.wait(10)
    assert lookout.who_is_lost((0, 1), "sum", None)[0] == 0
    lookout.close("had finished its work", lost_a_peer=False)
    assert "allfuse-lookout" not in [thread.name for thread in threading.enumerate()]


def test_many_worlds_one_after_the_other_leave_no_threads_and_no_files_open() -> None:
    def work() -> list[tuple[int, list[str]]]:
        from allfuse.base.torch_private import PrefixStore
        from allfuse.launcher.base import entered
        from allfuse.launcher.store import StoreWorld

        store = world().store_board.store  # type: ignore[attr-defined]
        counts = []
        for number in range(6):
            inner = StoreWorld(
                PrefixStore(f"inner/{number}", store),
                world().rank,
                world().size,
                loopback=True,
                timeout_s=60,
            )
            with entered(inner):
                link = open_link()
                total = torch.ones(1)
                link.all_reduce(total, "sum").wait()
                link.close()
            names = [thread.name for thread in threading.enumerate()]
            counts.append((len(os.listdir("/proc/self/fd")), names))
        return counts

    counts = launch_local(work, 2, timeout_s=60)
    handles = [handles for handles, _ in counts]
    assert handles[-1] <= handles[1] + 1  # the first may open something for good
    assert counts[-1][1] == counts[0][1]


def test_repeated_launches_leave_nothing_open_in_the_launcher() -> None:
    launch_local(os.getpid, 2)
    before = sorted(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        launch_local(os.getpid, 2)
    assert (sorted(os.listdir("/proc/self/fd")), threading.active_count()) == before
