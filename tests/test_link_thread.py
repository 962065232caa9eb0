"""The thread link: sums, agreement, faults at every operation, and what errors say."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from allfuse.base.errors import BadMessage, PeerLost
from allfuse.launcher.base import World, current_world
from allfuse.launcher.thread import first_failure, launch_threads
from allfuse.link import Link
from allfuse.link.check import SUMMABLE
from allfuse.link.lone import LoneLink
from allfuse.link.scatter import Scattered
from allfuse.link.thread import Killed, Script

CPU = torch.device("cpu")
SIZES = [0, 1, 7, 1009]
DTYPES = sorted(SUMMABLE, key=str)


def world() -> World:
    found = current_world()
    assert found is not None
    return found


def open_link(name: str = "data") -> Link:
    return world().link(name, tuple(range(world().size)), CPU)


def value(rank: int, size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return (torch.randn(size, generator=generator) * 8).to(dtype)


def run(function: Callable[[], Any], workers: int, **options: Any) -> list[Any]:
    results = launch_threads(function, workers, **options)
    failure = first_failure(results)
    if failure is not None:
        raise failure
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("workers", [2, 3, 5])
def test_all_reduce_sums_in_the_order_of_ranks_and_all_end_equal(
    workers: int, dtype: torch.dtype
) -> None:
    def work() -> list[Tensor]:
        link = open_link()
        made = [value(link.rank, size, dtype) for size in SIZES]
        for tensor in made:
            link.all_reduce(tensor, "sum").wait()
        return made

    outcomes = run(work, workers)
    for place, size in enumerate(SIZES):
        expected = value(0, size, dtype)
        for rank in range(1, workers):
            expected = expected + value(rank, size, dtype)
        for outcome in outcomes:
            assert torch.equal(outcome[place], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("workers", [2, 3, 5])
def test_reduce_scatter_sums_each_part_in_the_order_of_ranks(
    workers: int, dtype: torch.dtype
) -> None:
    """On this link, and by messages, as links do it that have no own way."""

    def work() -> list[tuple[Tensor, Tensor, int, int]]:
        link, found = open_link(), []
        for size in SIZES:
            parts = value(link.rank, workers * size, dtype).view(workers, size)
            kept, sent = parts.clone(), [link.sent_bytes]
            targets = [torch.full((size,), 3).to(dtype) for _ in range(2)]
            link.reduce_scatter(targets[0], parts, "sum parts").wait()
            sent.append(link.sent_bytes)
            Scattered(link, targets[1], parts, "sum parts").wait()
            sent.append(link.sent_bytes)
            assert torch.equal(parts, kept)
            found.append((targets[0], targets[1], sent[1] - sent[0], sent[2] - sent[1]))
        return found

    outcomes = run(work, workers)
    for place, size in enumerate(SIZES):
        expected = value(0, workers * size, dtype)
        for rank in range(1, workers):
            expected = expected + value(rank, workers * size, dtype)
        for rank, outcome in enumerate(outcomes):
            own, by_messages, *sent = outcome[place]
            assert torch.equal(own, expected.view(workers, size)[rank])
            assert torch.equal(by_messages, own)
            assert sent == [(workers - 1) * own.nbytes] * 2


def test_parts_that_do_not_fit_are_refused() -> None:
    link = LoneLink()
    with pytest.raises(ValueError, match=r"parts of \(2, 3\).*allowed: \(1, \*\(3,\)\)"):
        link.reduce_scatter(torch.zeros(3), torch.zeros(2, 3), "sum")
    target = torch.zeros(3)
    link.reduce_scatter(target, torch.ones(1, 3), "sum").wait()
    assert target.tolist() == [1, 1, 1]


def test_many_transfers_may_be_under_way_and_waited_for_in_any_order() -> None:
    def work() -> list[Tensor]:
        link = open_link()
        made = [value(link.rank, 13, torch.float64, seed) for seed in range(50)]
        started = [link.all_reduce(tensor, f"sum {seed}") for seed, tensor in enumerate(made)]
        for transfer in reversed(started):
            transfer.wait()
        for transfer in started:  # waiting again changes nothing
            transfer.wait()
        return made

    outcomes = run(work, 3)
    for seed in range(50):
        expected = sum(value(rank, 13, torch.float64, seed) for rank in range(3))
        for outcome in outcomes:
            torch.testing.assert_close(outcome[seed], expected)


@pytest.mark.parametrize("root", [0, 2])
def test_broadcast_gives_every_peer_the_tensor_of_the_root(root: int) -> None:
    def work() -> tuple[Tensor, Tensor]:
        link = open_link()
        mask = torch.arange(6) % 2 == link.rank % 2
        weights = torch.nn.Parameter(value(link.rank, 6, torch.float32))  # needs a gradient
        link.broadcast(mask, "mask", root).wait()
        link.broadcast(weights, "weights", root).wait()
        return mask, weights.detach()

    for mask, weights in run(work, 3):
        assert torch.equal(mask, torch.arange(6) % 2 == root % 2)
        assert torch.equal(weights, value(root, 6, torch.float32))


def test_sent_tensors_arrive_in_order_as_they_were_when_sent() -> None:
    def work() -> list[float]:
        link = open_link()
        after, before = (link.rank + 1) % link.size, (link.rank - 1) % link.size
        tensor = torch.zeros(3)
        for number in range(4):
            tensor.fill_(10 * link.rank + number)
            link.send(tensor, after, "ring")
        got = [torch.empty(3) for _ in range(4)]
        for tensor in got:
            link.receive(tensor, before, "ring").wait()
        return [float(tensor[0]) for tensor in got]

    for rank, got in enumerate(run(work, 3)):
        assert got == [10 * ((rank - 1) % 3) + number for number in range(4)]


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_sent_bytes_are_those_of_the_formula(workers: int) -> None:
    def work() -> int:
        link = open_link()
        link.all_reduce(torch.ones(1000), "sum").wait()
        link.broadcast(torch.ones(10), "copy").wait()
        if link.rank == 0:
            link.send(torch.ones(100), 1, "one")
        elif link.rank == 1:
            link.receive(torch.ones(100), 0, "one").wait()
        return link.sent_bytes

    reduced = 2 * (workers - 1) * 4000 // workers
    assert run(work, workers) == [reduced + 40 + 400] + [reduced] * (workers - 1)


def test_links_of_one_name_made_one_after_the_other_do_not_meet() -> None:
    def work() -> tuple[float, float]:
        first, second = open_link("statistics"), open_link("statistics")
        one, two = torch.ones(1), torch.full((1,), 10.0)
        pairs = [(first, one), (second, two)]
        if first.rank == 1:
            pairs.reverse()  # this rank reaches the second link first
        started = [link.all_reduce(tensor, "sum") for link, tensor in pairs]
        for transfer in started:
            transfer.wait()
        return float(one), float(two)

    assert run(work, 2) == [(2.0, 20.0)] * 2


@pytest.mark.parametrize(
    ("tensor", "operation"),
    [
        (torch.ones(4), "another"),
        (torch.ones(5), "sum"),
        (torch.ones(4, dtype=torch.float64), "sum"),
    ],
    ids=["operation", "shape", "type"],
)
def test_peers_that_disagree_get_a_bad_message_that_names_both(
    tensor: Tensor, operation: str
) -> None:
    def work() -> None:
        link = open_link()
        link.step = 7
        if link.rank == 0:
            link.all_reduce(torch.ones(4), "sum").wait()
        else:
            link.all_reduce(tensor.clone(), operation).wait()

    results = launch_threads(work, 2)
    assert sorted(type(result).__name__ for result in results) == ["BadMessage", "PeerLost"]
    error = first_failure(results)
    assert isinstance(error, BadMessage)
    assert error.step == 7
    assert "sum of (4,) torch.float32" in str(error)
    assert operation in str(error)


def test_a_received_tensor_of_another_size_is_a_bad_message() -> None:
    def work() -> None:
        link = open_link()
        if link.rank == 0:
            link.send(torch.ones(1), 1, "one")  # would spread over the five by broadcasting
        else:
            link.receive(torch.zeros(5), 0, "one").wait()

    error = first_failure(launch_threads(work, 2))
    assert isinstance(error, BadMessage)
    assert error.peer == 0


def test_what_cannot_be_summed_is_refused_before_it_is_sent() -> None:
    def work() -> None:
        link = open_link()
        with pytest.raises(ValueError, match=r"cannot sum torch\.bool"):
            link.all_reduce(torch.ones(2, dtype=torch.bool), "flags")
        with pytest.raises(ValueError, match="strides"):
            link.all_reduce(torch.ones(4, 4).t()[:2], "slice")
        with pytest.raises(ValueError, match="strides"):
            link.broadcast(torch.ones(4, 4)[:, 1], "column")
        assert link.sent_bytes == 0

    run(work, 2)


def script_of_five() -> list[Tensor]:
    """Five operations of different kinds; each rank takes part in each of them."""
    link = open_link()
    link.step = 3
    total, copied, last = torch.full((3,), float(link.rank + 1)), torch.zeros(2), torch.ones(1)
    link.all_reduce(total, "sum of threes").wait()  # 0
    if link.rank == 0:
        copied += 5
    early = link.all_reduce(last, "overlapped sum")  # 1
    link.broadcast(copied, "spread").wait()  # 2
    got = torch.zeros(1)
    after, before = (link.rank + 1) % link.size, (link.rank - 1) % link.size
    link.send(torch.full((1,), float(link.rank)), after, "pass on")  # 3
    link.receive(got, before, "pass on").wait()  # 4
    early.wait()
    return [total, copied, last, got]


@pytest.mark.parametrize("fault", ["kill", "stall"])
@pytest.mark.parametrize("count", range(5))
@pytest.mark.parametrize("rank", range(3))
def test_a_fault_at_any_operation_never_hangs_and_never_sums_wrongly(
    rank: int, count: int, fault: str
) -> None:
    deadline = 0.2
    begin = time.monotonic()
    results = launch_threads(
        script_of_five, 3, script=Script(**{fault: {(rank, count)}}), timeout_s=deadline
    )
    assert time.monotonic() - begin < 20 * deadline + 5
    assert isinstance(results[rank], Killed)
    survivors = [result for other, result in enumerate(results) if other != rank]
    for other, result in enumerate(results):
        if other == rank:
            continue
        if isinstance(result, list):  # all that it needed had been sent before
            total, copied, last, got = result
            assert total.tolist() == [6.0] * 3
            assert copied.tolist() == [5.0] * 2
            assert last.tolist() == [3.0]
            assert got.tolist() == [float((other - 1) % 3)]
            continue
        assert isinstance(result, PeerLost)
        assert result.rank == other
        assert result.step == 3
        assert result.seconds < 20 * deadline + 5
        assert result.operation in str(result)
        if result.peer != rank:  # only one that waited for the lost one itself may be named
            assert isinstance(results[result.peer], PeerLost)
            assert "lost rank" in str(result)
    if count < 4:
        assert any(isinstance(result, PeerLost) for result in survivors)
        assert any(isinstance(result, PeerLost) and result.peer == rank for result in survivors)


def test_the_rank_that_was_killed_is_named_even_by_those_who_come_late() -> None:
    told = threading.Event()

    def work() -> None:
        link = open_link()
        if link.rank == 1:
            told.wait(30)  # rank 0 has given up and left when this one comes
        try:
            link.all_reduce(torch.ones(1), "sum").wait()
            link.all_reduce(torch.ones(1), "sum again").wait()
        finally:
            if link.rank == 0:
                told.set()

    results = launch_threads(work, 3, script=Script(kill={(2, 0)}))
    for rank in (0, 1):
        assert isinstance(results[rank], PeerLost)
        assert results[rank].peer == 2
        assert "killed by the script" in str(results[rank])


@pytest.mark.parametrize(("end", "word"), [("return", "had finished"), ("raise", "KeyError: 'x'")])
def test_a_rank_that_ends_early_is_named_with_its_reason(end: str, word: str) -> None:
    def work() -> None:
        link = open_link()
        if link.rank == 1:
            if end == "raise":
                raise KeyError("x")
            return
        link.all_reduce(torch.ones(1), "sum").wait()

    results = launch_threads(work, 3)
    for rank in (0, 2):
        assert isinstance(results[rank], PeerLost)
        assert results[rank].peer == 1
        assert word in str(results[rank])


def test_alive_leaves_out_those_that_have_ended() -> None:
    def work() -> tuple[int, ...]:
        link = open_link()
        if link.rank == 1:
            return ()
        with pytest.raises(PeerLost):
            link.all_reduce(torch.ones(1), "sum").wait()
        return link.alive()

    results = launch_threads(work, 2)
    assert results[0] == (0,)


def test_the_board_is_seen_by_all_and_waits_no_longer_than_asked() -> None:
    def work() -> bytes:
        board = world().board
        if world().rank == 0:
            board.set("word", b"\x00\xff said")
        with pytest.raises(TimeoutError, match="never"):
            board.wait("never", 0.01)
        assert board.get("never") is None
        return board.wait("word", 10)

    assert run(work, 3) == [b"\x00\xff said"] * 3


def test_scripted_delays_change_no_result() -> None:
    def work() -> float:
        link = open_link()
        total = torch.zeros(1)
        for number in range(3):
            part = torch.full((1,), float(number + link.rank))
            link.all_reduce(part, "sum").wait()
            total += part
        return float(total)

    slow = Script(delay_s=lambda rank, count: 0.01 * ((rank + count) % 3))
    assert run(work, 3, script=slow) == run(work, 3)


def test_a_copied_model_keeps_its_link() -> None:
    def work() -> bool:
        link = open_link()
        return copy.deepcopy({"link": link})["link"] is link

    assert all(run(work, 2))


def test_a_lone_link_moves_nothing_and_has_no_peer() -> None:
    link = LoneLink(3)
    tensor = torch.ones(3)
    link.all_reduce(tensor, "sum").wait()
    link.broadcast(tensor, "copy").wait()
    assert tensor.tolist() == [1.0] * 3
    assert (link.size, link.members, link.sent_bytes, link.alive()) == (1, (3,), 0, (0,))
    with pytest.raises(ValueError, match="no peer"):
        link.send(tensor, 0, "one")
    with pytest.raises(ValueError, match="no peer"):
        link.receive(tensor, 0, "one")
    link.close()
