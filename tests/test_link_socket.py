"""The link over ZeroMQ: what it promises, what it refuses, and how it ends when a peer does."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from test_topology import ALL, EXACT
from torch import Tensor

from allfuse.base.errors import BadMessage, DistributedError, PeerLost, WorkerFailed
from allfuse.execute import plot, run
from allfuse.launcher.base import current_world
from allfuse.launcher.local import launch_local
from allfuse.link.check import SUMMABLE
from allfuse.link.endpoint import Card, Endpoint
from allfuse.link.entrance import MOST_BYTES
from allfuse.link.frame import COLLECTIVES, LAYOUT, Header, Kind, Malformed, parse
from allfuse.link.lookout import Lookout
from allfuse.link.socket import SocketLink
from allfuse.link.stream import PIECE_BYTES, WINDOW_BYTES
from allfuse.link.thread import Hub
from allfuse.topology import Layout, Topology

SIZES = [0, 1, 7, 1009]
DTYPES = sorted(SUMMABLE, key=str)
FLOATS = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
LOCAL = Endpoint(loopback=True)


def value(rank: int, size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return (torch.randn(size, generator=generator) * 8).to(dtype)


def outcomes(
    work: Callable[[SocketLink], Any],
    size: int,
    *,
    name: str = "test",
    hub: Hub | None = None,
    endpoint: Endpoint = LOCAL,
    timeout_s: float = 20.0,
) -> list[Any]:
    """What `work` returns or raises on each of so many links, in a thread each."""
    board = hub or Hub(size)
    results: list[Any] = [None] * size
    members = tuple(range(size))

    def act(rank: int) -> None:
        try:
            link = SocketLink(board, rank, name, members, timeout_s=timeout_s, endpoint=endpoint)
            with contextlib.closing(link):
                results[rank] = work(link)
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=act, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def together(work: Callable[[SocketLink], Any], size: int, **options: Any) -> list[Any]:
    """The same where nothing may fail."""
    results = outcomes(work, size, **options)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@contextlib.contextmanager
def pair(timeout_s: float = 20.0, **options: Any) -> Iterator[tuple[SocketLink, SocketLink]]:
    """Two links in this thread. Closed without a farewell where the test has broken them."""
    hub, made = Hub(2), [None, None]
    endpoint = options.pop("endpoint", LOCAL)

    def make(rank: int) -> None:
        link = SocketLink(hub, rank, "pair", (0, 1), timeout_s=timeout_s, endpoint=endpoint)
        made[rank] = link  # type: ignore[call-overload]

    threads = [threading.Thread(target=make, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = made
    assert isinstance(first, SocketLink)
    assert isinstance(second, SocketLink)
    try:
        yield first, second
    finally:
        first.close()
        second.close()


def vanish(link: SocketLink) -> None:
    """As kill -9: the connections end, nothing is said."""
    with link.lock:
        for peer in link.peers.values():
            peer.drop(failure_of("this rank is gone"))
    link._carrier.stop()


def failure_of(reason: str) -> Any:
    from allfuse.link.transfer import Failure

    return Failure(PeerLost, reason)


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether it came true in that time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


# The contract


@pytest.mark.parametrize("size", [2, 3, 5])
def test_all_reduce_sums_in_the_order_of_ranks_and_all_end_equal(size: int) -> None:
    def work(link: SocketLink) -> list[Tensor]:
        made = [value(link.rank, count, dtype) for dtype in DTYPES for count in SIZES]
        for tensor in made:
            link.all_reduce(tensor, "sum").wait()
        return made

    results = together(work, size)
    for place, (dtype, count) in enumerate((dtype, count) for dtype in DTYPES for count in SIZES):
        expected = value(0, count, dtype)
        for rank in range(1, size):
            expected = expected + value(rank, count, dtype)
        for result in results:
            assert torch.equal(result[place], expected)


def test_many_sums_may_be_under_way_and_waited_for_in_any_order() -> None:
    def work(link: SocketLink) -> list[Tensor]:
        made = [value(link.rank, 13, torch.float64, seed) for seed in range(50)]
        started = [link.all_reduce(tensor, f"sum {seed}") for seed, tensor in enumerate(made)]
        for transfer in (*reversed(started), *started):  # waiting again changes nothing
            transfer.wait()
        return made

    for result in together(work, 3):
        for seed, tensor in enumerate(result):
            expected = sum(value(rank, 13, torch.float64, seed) for rank in range(3))
            torch.testing.assert_close(tensor, expected)


@pytest.mark.parametrize("root", [0, 2])
def test_broadcast_gives_every_peer_the_tensor_of_the_root(root: int) -> None:
    def work(link: SocketLink) -> tuple[Tensor, Tensor]:
        mask = torch.arange(6) % 2 == link.rank % 2
        weights = torch.nn.Parameter(value(link.rank, 6, torch.float32))  # needs a gradient
        link.broadcast(mask, "mask", root).wait()
        link.broadcast(weights, "weights", root).wait()
        return mask, weights.detach()

    for mask, weights in together(work, 3):
        assert torch.equal(mask, torch.arange(6) % 2 == root % 2)
        assert torch.equal(weights, value(root, 6, torch.float32))


@pytest.mark.parametrize("encrypt", [False, True])
def test_tensors_of_any_type_and_size_arrive_in_order_bit_for_bit(encrypt: bool) -> None:
    dtypes = [*FLOATS, torch.bool, torch.int16, torch.complex64]
    made = [
        value(0, size, torch.float32).to(dtype)
        for dtype in dtypes
        for size in (0, 1, 7919, PIECE_BYTES // 2 + 1)
    ]
    made.append(value(1, 2_500_001, torch.float32))  # 10 MB, in several pieces

    def work(link: SocketLink) -> list[Tensor]:
        if link.rank == 1:
            for transfer in [link.send(tensor, 0, "move") for tensor in made]:
                transfer.wait()
            return made
        targets = [torch.empty_like(tensor) for tensor in made]
        transfers = [link.receive(tensor, 1, "move") for tensor in targets]
        for transfer in reversed(transfers):
            transfer.wait()
        return targets

    both = together(work, 2, endpoint=Endpoint(loopback=True, encrypt=encrypt))
    for sent, got in zip(*both, strict=True):
        assert sent.dtype == got.dtype
        assert torch.equal(sent.view(torch.uint8), got.view(torch.uint8))


def test_transfers_and_collectives_of_a_pair_do_not_wait_for_each_other() -> None:
    """More than a window is on its way to a rank that does not yet want it."""
    block = value(0, WINDOW_BYTES // 2, torch.float32)

    def work(link: SocketLink) -> float:
        total = torch.ones(1000)
        if link.rank == 0:
            sending = link.send(block, 1, "bulk")
            link.all_reduce(total, "sum").wait()
            sending.wait()
        else:
            target = torch.zeros_like(block)
            link.all_reduce(total, "sum").wait()
            link.receive(target, 0, "bulk").wait()
            assert torch.equal(target, block)
        return float(total[0])

    assert together(work, 2) == [2.0, 2.0]


def test_what_is_sent_to_one_who_does_not_receive_is_bounded() -> None:
    block = torch.ones(3 * WINDOW_BYTES // 4)
    with pair(timeout_s=0.5) as (first, second):
        sending = first.send(block, 1, "bulk")
        assert until(lambda: second.peers[0].incoming[0]._held > WINDOW_BYTES - 2 * PIECE_BYTES)
        with pytest.raises(PeerLost, match="no sign within the deadline"):
            sending.wait()
        assert second.peers[0].incoming[0]._held <= WINDOW_BYTES


@pytest.mark.parametrize("size", [2, 3, 5])
def test_sent_bytes_are_those_of_the_formula(size: int) -> None:
    def work(link: SocketLink) -> int:
        link.all_reduce(torch.ones(1000), "sum").wait()
        link.broadcast(torch.ones(10), "copy").wait()
        if link.rank == 0:
            link.send(torch.ones(100), 1, "one").wait()
        elif link.rank == 1:
            link.receive(torch.ones(100), 0, "one").wait()
        return link.sent_bytes

    reduced = 2 * (size - 1) * 4000 // size
    assert together(work, size) == [reduced + 40 * (size - 1) + 400] + [reduced] * (size - 1)


@pytest.mark.parametrize("topology", EXACT, ids=str)
def test_every_exact_topology_sums_over_it_and_counts_its_bytes(topology: Topology) -> None:
    count = 3840  # what every number of chunks here divides

    def work(link: SocketLink) -> tuple[Tensor, Tensor, int]:
        mine = plot(topology, Layout.of(link.size), link.rank, 0, 0)
        whole = torch.full((count,), float(link.rank + 1), dtype=torch.float64)
        run(mine, link, whole, "whole numbers", 2)
        sent = link.sent_bytes
        rounded = value(link.rank, 1009, torch.float32)
        run(mine, link, rounded, "rounded", 3)
        return whole, rounded, sent

    for size in (2, 3, 4):
        results = together(work, size)
        for whole, rounded, _ in results:
            assert whole.eq(size * (size + 1) / 2).all()
            assert torch.equal(rounded, results[0][1])
        declared = topology.bytes_per_peer(Layout.of(size), count * 8)
        assert max(sent for _, _, sent in results) == declared


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [0, 1, 1009])
def test_topologies_take_every_type_and_size(dtype: torch.dtype, count: int) -> None:
    def work(link: SocketLink) -> list[Tensor]:
        blocks = [torch.full((count,), float(link.rank), dtype=dtype) for _ in ALL]
        for topology, block in zip(ALL, blocks, strict=True):
            run(plot(topology, Layout.of(3), link.rank, 0, 0), link, block, str(topology), 2)
        return blocks

    for result in together(work, 3):
        for topology, block in zip(ALL, result, strict=True):
            assert not topology.exact or block.eq(3).all()


def test_a_large_block_is_summed_over_a_topology_and_by_all_reduce_alike() -> None:
    from allfuse.topology.ring import Ring

    def work(link: SocketLink) -> None:
        block = torch.arange(2_500_000, dtype=torch.float32) % 100 + link.rank
        other = block.clone()
        run(plot(Ring(), Layout.of(2), link.rank, 0, 0), link, block, "ring", 3)
        link.all_reduce(other, "sum").wait()
        assert torch.equal(block, other)
        assert torch.equal(block, torch.arange(2_500_000, dtype=torch.float32) % 100 * 2 + 1)

    together(work, 2)


def test_links_of_one_name_do_not_mix_and_several_run_at_once() -> None:
    hub, barrier = Hub(2), threading.Barrier(2)

    def work(first: SocketLink) -> tuple[float, float]:
        second = SocketLink(hub, first.rank, "test/2", (0, 1), timeout_s=20, endpoint=LOCAL)
        with contextlib.closing(second):
            one, two = torch.ones(1), torch.full((1,), 10.0)
            pairs = [(first, one), (second, two)]
            if first.rank == 1:
                pairs.reverse()  # this rank reaches the second link first
            started = [link.all_reduce(tensor, "sum") for link, tensor in pairs]
            for transfer in started:
                transfer.wait()
            barrier.wait(20)
            return float(one), float(two)

    assert together(work, 2, name="test/1", hub=hub) == [(2.0, 20.0)] * 2


def test_members_are_named_by_their_rank_in_the_whole_plan() -> None:
    hub, members, told = Hub(2), (3, 8), {}

    def work(member: int) -> None:
        link = SocketLink(hub, member, "axis", members, timeout_s=20, endpoint=LOCAL)
        with contextlib.closing(link):
            total = torch.full((3,), float(member))
            link.all_reduce(total, "sum").wait()
            told[member] = (link.rank, link.size, link.members, link.kind, float(total[0]))

    threads = [threading.Thread(target=work, args=(member,)) for member in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == {3: (0, 2, members, "zeromq", 11.0), 8: (1, 2, members, "zeromq", 11.0)}


@pytest.mark.parametrize(
    ("tensor", "operation"),
    [
        (torch.ones(4), "another"),
        (torch.ones(5), "sum"),
        (torch.ones(4, dtype=torch.float64), "sum"),
    ],
    ids=["operation", "size", "type"],
)
def test_peers_that_disagree_get_a_bad_message_that_names_both(
    tensor: Tensor, operation: str
) -> None:
    def work(link: SocketLink) -> None:
        link.step = 7
        block = torch.ones(4) if link.rank == 0 else tensor.clone()
        link.all_reduce(block, "sum" if link.rank == 0 else operation).wait()

    results = outcomes(work, 2)
    assert all(isinstance(result, DistributedError) for result in results)
    error = next(result for result in results if isinstance(result, BadMessage))
    assert (error.step, error.peer) == (7, 1 - error.rank)
    assert operation in str(error)
    assert "elements of torch." in str(error)


@pytest.mark.parametrize("late", [False, True])
def test_a_received_tensor_of_another_size_is_a_bad_message(late: bool) -> None:
    def work(link: SocketLink) -> None:
        if link.rank == 0:
            link.send(torch.ones(1), 1, "one").wait()
        else:
            if late:  # the sender has said farewell by then
                assert until(lambda: link.peers[0].left)
            link.receive(torch.zeros(5), 0, "one").wait()

    error = outcomes(work, 2)[1]
    assert isinstance(error, BadMessage)
    assert (error.rank, error.peer, error.operation) == (1, 0, "one")


def test_what_cannot_be_moved_is_refused_before_it_is_sent() -> None:
    def work(link: SocketLink) -> None:
        with pytest.raises(ValueError, match=r"cannot sum torch\.bool"):
            link.all_reduce(torch.ones(2, dtype=torch.bool), "flags")
        with pytest.raises(ValueError, match="strides"):
            link.all_reduce(torch.ones(4, 4).t()[:2], "slice")
        with pytest.raises(ValueError, match="strides"):
            link.send(torch.ones(4, 4)[:, 1], 1 - link.rank, "column")
        assert link.sent_bytes == 0

    together(work, 2)


# Who comes and goes


def test_a_link_goes_on_with_the_others_when_a_peer_has_left() -> None:
    gone = threading.Event()

    def work(link: SocketLink) -> Any:
        if link.rank == 1:
            gone.set()
            return None
        assert gone.wait(20)
        other = 2 - link.rank
        assert until(lambda: link.alive() == (0, 2))
        with pytest.raises(PeerLost, match="closed its link") as caught:
            link.send(torch.ones(1), 1, "to the lost").wait()
        assert (caught.value.rank, caught.value.peer) == (link.rank, 1)
        with pytest.raises(PeerLost, match="closed its link"):
            link.receive(torch.ones(1), 1, "from the lost").wait()
        for number in range(3):
            sending = link.send(torch.full((5,), float(link.rank + number)), other, "go on")
            target = torch.zeros(5)
            link.receive(target, other, "go on").wait()
            sending.wait()
            assert target.tolist() == [other + number] * 5
        return True

    assert together(work, 3) == [True, None, True]


def test_what_a_leaving_peer_had_sent_still_arrives() -> None:
    block = value(0, WINDOW_BYTES // 8, torch.float32)  # half of the window: nobody must wait
    left = threading.Event()

    def work(link: SocketLink) -> None:
        if link.rank == 0:
            link.send(block, 1, "last words").wait()
            link.send(torch.ones(3), 1, "goodbye")  # not waited for
            left.set()
            return
        assert left.wait(20)
        assert until(lambda: link.alive() == (1,))
        target, words = torch.zeros_like(block), torch.zeros(3)
        link.receive(target, 0, "last words").wait()
        link.receive(words, 0, "goodbye").wait()
        assert torch.equal(target, block)
        assert words.tolist() == [1.0] * 3
        with pytest.raises(PeerLost):
            link.receive(words, 0, "more").wait()

    together(work, 2)


@pytest.mark.parametrize("stream", ["transfers", "collectives"])
def test_a_peer_that_is_silent_is_lost_at_the_deadline_and_for_good(stream: str) -> None:
    over = threading.Event()

    def work(link: SocketLink) -> Any:
        if link.rank == 1:
            over.wait(20)
            return None
        link.step, total, begin = 3, torch.ones(3), time.monotonic()
        with pytest.raises(PeerLost, match="no sign within the deadline") as caught:
            if stream == "transfers":
                link.receive(total, 1, "what never comes").wait()
            else:
                link.all_reduce(total, "what never comes").wait()
        over.set()
        assert 0.3 <= time.monotonic() - begin < 3
        assert (caught.value.peer, caught.value.step) == (1, 3)
        assert caught.value.operation == "what never comes"
        assert link.alive() == (0,)
        return True

    assert together(work, 2, timeout_s=0.3)[0]


def test_a_member_that_never_comes_is_named_when_the_link_is_formed() -> None:
    hub = Hub(3)
    told: list[Any] = [None, None]

    def form(rank: int) -> None:
        with pytest.raises(PeerLost) as caught:
            SocketLink(hub, rank, "half", (0, 1, 2), timeout_s=0.3, endpoint=LOCAL)
        told[rank] = caught.value

    threads = [threading.Thread(target=form, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [error.peer for error in told] == [2, 2]
    assert "form link half" in str(told[0])


@pytest.mark.parametrize("victim", range(3))
@pytest.mark.parametrize("moment", [0.0, 0.002, 0.005, 0.01, 0.02, 0.04])
def test_who_dies_in_a_sum_never_hangs_others_and_never_makes_a_wrong_sum(
    victim: int, moment: float
) -> None:
    count, doomed = 1_500_001, threading.Event()

    def work(link: SocketLink) -> Tensor | None:
        link.step = 4
        block = torch.full((count,), float(link.rank + 1))
        if link.rank == victim:
            doomed.set()
            link.all_reduce(block, "sum")
            time.sleep(moment)  # chooses where in the sum it dies
            vanish(link)
            return None
        doomed.wait(20)
        link.all_reduce(block, "sum").wait()
        return block

    begin = time.monotonic()
    results = outcomes(work, 3)
    assert time.monotonic() - begin < 10  # not the deadline: the connection tells
    for rank, result in enumerate(results):
        if rank == victim:
            continue
        if isinstance(result, Tensor):
            assert result.eq(6).all()
        else:
            assert isinstance(result, PeerLost)
            assert (result.peer, result.rank, result.step) == (victim, rank, 4)


def test_who_breaks_a_collective_off_and_leaves_is_not_blamed_by_those_who_still_send() -> None:
    left = threading.Event()

    def work(link: SocketLink) -> Tensor | None:
        block = torch.ones(4 * WINDOW_BYTES, dtype=torch.uint8)
        if link.rank == 1:
            spread = link.broadcast(block, "spread", root=1)
            left.wait(20)
            spread.wait()
        elif link.rank == 2:
            with link.lock:
                link.peers[1].say(Kind.BROKEN, COLLECTIVES, 0, b"stands still")
        else:
            link.broadcast(block, "spread", root=1).wait()
        if link.rank == 2:
            link.close()
            left.set()
        return None

    (_, error, _) = outcomes(work, 3)
    assert isinstance(error, PeerLost)
    assert (error.peer, error.rank, error.reason) == (0, 1, "stands still")


@pytest.mark.parametrize("topology", EXACT, ids=str)
def test_who_dies_in_a_schedule_never_makes_a_wrong_sum(topology: Topology) -> None:
    """The others end too: each closes its link when it has lost a peer."""

    def work(link: SocketLink, victim: int, moment: int) -> Tensor | None:
        block = torch.full((12,), float(link.rank + 1))
        mine = plot(topology, Layout.of(3), link.rank, 0, 0)
        if link.rank == victim:
            mine = mine._replace(turns=mine.turns[:moment])
        run(mine, link, block, "round 1", 1)
        if link.rank == victim:
            vanish(link)
            return None
        return block

    most = max(len(plot(topology, Layout.of(3), rank, 0, 0).turns) for rank in range(3))
    for victim in range(3):
        for moment in sorted({0, most // 2, most - 1}):
            results = outcomes(functools.partial(work, victim=victim, moment=moment), 3)
            for rank, result in enumerate(results):
                if rank != victim and isinstance(result, Tensor):
                    assert result.eq(6).all()
                elif rank != victim:
                    assert isinstance(result, PeerLost)
                    assert "round 1" in str(result) or "form link test" in str(result)


def test_closing_waits_for_nobody_and_ends_what_is_waited_for() -> None:
    with pair() as (first, _second):
        works = [first.all_reduce(torch.ones(10), f"sum {number}") for number in range(3)]
        works.append(first.receive(torch.ones(10), 1, "never"))
        begin = time.monotonic()
        first.close()
        assert time.monotonic() - begin < 2
        for work in works:
            with pytest.raises((PeerLost, ValueError), match="closed"):
                work.wait()
        with pytest.raises(ValueError, match="was closed"):
            first.send(torch.ones(1), 1, "too late")
        first.close()


def test_a_closed_link_leaves_no_port_no_thread_and_no_file() -> None:
    def work(link: SocketLink) -> list[int]:
        link.all_reduce(torch.ones(100_000), "sum").wait()
        said = link.board.get(f"link/test/0-1-2/socket/{link.rank}")
        assert said is not None
        ports: dict[str, int] = json.loads(said.partition(b"\n")[2])["ports"]
        return list(ports.values())

    together(work, 3)  # pyzmq keeps a thread and a few files for sends without a copy
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    ports = list(itertools.chain(*together(work, 3)))
    assert len(ports) == 3
    assert until(lambda: threading.active_count() <= before[0])
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("allfuse-socket")]
    assert until(lambda: len(os.listdir("/proc/self/fd")) <= before[1])
    for port in ports:
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", port))


# Messages and connections that are not what they should be


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda good: b"XXXX" + good[4:], "begins with"),
        (lambda good: good[:4] + b"\x09" + good[5:], "version 9"),
        (lambda good: good[:5] + b"\x63" + good[6:], "kind 99"),
        (lambda good: good[:6] + b"\x63" + good[7:], "type 99"),
        (lambda good: good[:7] + b"\x63" + good[8:], "stream 99"),
        (lambda good: good[:8] + b"\x05\0\0\0" + good[12:], "in the name of rank 5"),
        (lambda good: good[:12] + bytes(8) + good[20:], "another link"),
        (lambda good: good[:28] + b"\x09" + good[29:], "byte 0 of tensor 9; next is byte 0"),
        (lambda good: good[:36] + b"\x04" + good[37:], "byte 4 of tensor 0"),
        (lambda good: good[:44] + b"\xff" * 8 + good[52:], "4 bytes from byte 0 on of"),
        (lambda good: good[:-1], "a header of"),
        (lambda good: b"", "a header of 0 bytes"),
        (lambda good: random.Random(0).randbytes(MOST_BYTES // 2), "a header of"),
    ],
)
def test_a_garbled_message_of_a_member_is_an_error_that_names_it(
    change: Callable[[bytes], bytes], why: str
) -> None:
    with pair() as (first, second):
        second.step, target = 5, torch.zeros(1)
        receiving = second.receive(target, 0, "one")
        good = Header(Kind.DATA, first.about, 0, dtype=torch.float32, amount=1).pack()
        with first.lock:
            first.peers[1].socket.send_multipart([change(good), b"1234"])
            first.nudge(first.peers[1])
        with pytest.raises(BadMessage, match=why) as caught:
            receiving.wait()
        error = caught.value
        assert (error.rank, error.peer, error.operation, error.step) == (1, 0, "one", 5)
        assert target.tolist() == [0.0]
        with pytest.raises(PeerLost):  # the connection is given up
            first.receive(target, 1, "one").wait()


@pytest.mark.parametrize(
    ("header", "frames", "why"),
    [
        (Header(Kind.CREDIT, 0, 0, amount=1), 1, "credit for 1 bytes that were not sent"),
        (Header(Kind.HELLO, 0, 0), 1, "a second HELLO"),
        (Header(Kind.BYE, 0, 0), 0, "a message of 1 frames"),
        (Header(Kind.BYE, 0, 0), 2, "a message of 3 frames"),
    ],
)
def test_what_is_not_agreed_is_an_error(header: Header, frames: int, why: str) -> None:
    with pair() as (first, second):
        receiving = second.receive(torch.zeros(1), 0, "one")
        packed = header._replace(link=first.about).pack()
        with first.lock:
            first.peers[1].socket.send_multipart([packed, *[b""] * frames])
            first.nudge(first.peers[1])
        with pytest.raises(BadMessage, match=why):
            receiving.wait()


def test_more_than_the_window_is_an_error() -> None:
    with pair() as (first, second):
        first.peers[1].outgoing[0].credit = 10 * WINDOW_BYTES
        first.send(torch.ones(WINDOW_BYTES // 2), 1, "flood")
        assert until(lambda: second.alive() == (1,))
        with pytest.raises(BadMessage, match="more than it was given credit for"):
            second.send(torch.ones(1), 0, "answer")


def test_an_oversized_message_is_not_read() -> None:
    with pair() as (first, second):
        receiving = second.receive(torch.zeros(1), 0, "one")
        with first.lock:
            first.peers[1].socket.send_multipart([bytes(MOST_BYTES + 1), b""])
            first.nudge(first.peers[1])
        with pytest.raises(PeerLost):
            receiving.wait()


def test_random_headers_are_refused_and_nothing_else() -> None:
    chance = random.Random(1)
    good = Header(Kind.DATA, 7, 1, amount=3).pack()
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(chance.randint(1, 6)):
            data[chance.randrange(LAYOUT.size)] = chance.randrange(256)
        try:
            header = parse(bytes(data), link=7, sender=1)
        except Malformed:
            continue
        assert (header.link, header.sender) == (7, 1)
        assert isinstance(header.kind, Kind)


def strangers(port: int, member: int) -> list[Callable[[], Any]]:
    """Ways to come to a port without being asked."""

    def shout(what: bytes) -> None:
        with socket.create_connection(("127.0.0.1", port)) as line:
            with contextlib.suppress(OSError):
                line.sendall(what)
                line.settimeout(5)
                while line.recv(1000):
                    pass

    def speak(**options: Any) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        stranger = context.socket(zmq.PAIR)
        for name, option in options.items():
            setattr(stranger, name, option)
        stranger.reconnect_ivl = -1
        monitor = stranger.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        stranger.connect(f"tcp://127.0.0.1:{port}")
        try:
            with contextlib.suppress(zmq.Again):  # sent away already
                stranger.send_multipart([Header(Kind.HELLO, 0, member).pack(), b""], zmq.NOBLOCK)
            assert monitor.poll(15_000)
        finally:
            stranger.disable_monitor()
            context.destroy(0)

    name = str(member).encode()
    return [
        lambda: shout(b"GET / HTTP/1.0\r\n\r\n" * 50),
        lambda: shout(random.Random(2).randbytes(100_000)),
        lambda: shout(b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\0NULL" + bytes(100)),
        lambda: speak(),
        lambda: speak(plain_username=name, plain_password=b"guess"),
        lambda: speak(
            **dict(zip(("curve_publickey", "curve_secretkey"), zmq.curve_keypair(), strict=True)),
            curve_serverkey=zmq.curve_keypair()[0],
        ),
    ]


@pytest.mark.parametrize("encrypt", [False, True])
def test_strangers_are_refused_and_counted_and_change_nothing(encrypt: bool) -> None:
    with pair(endpoint=Endpoint(loopback=True, encrypt=encrypt)) as (first, second):
        said = first.board.get("link/pair/0-1/socket/0")
        assert said is not None
        port = json.loads(said.partition(b"\n")[2])["ports"]["1"]
        target = torch.zeros(3)
        receiving = first.receive(target, 1, "between")
        for number, come in enumerate(strangers(port, 1), start=1):
            come()
            assert until(lambda number=number: first.refused == number), number
        second.send(torch.ones(3), 0, "between").wait()
        receiving.wait()
        assert target.tolist() == [1.0] * 3
        assert first.alive() == (0, 1)
        assert (first.refused, second.refused) == (6, 0)


def test_one_without_the_token_of_the_job_is_not_believed() -> None:
    hub, told = Hub(2), {}

    def form(rank: int) -> None:
        endpoint = Endpoint(loopback=True, token=b"secret" if rank == 0 else b"guess")
        with pytest.raises(DistributedError) as caught:
            SocketLink(hub, rank, "token", (0, 1), timeout_s=5, endpoint=endpoint)
        told[rank] = caught.value

    threads = [threading.Thread(target=form, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("the token of this job does not sign" in str(error) for error in told.values())
    assert {type(error) for error in told.values()} == {BadMessage}


def test_a_key_that_is_not_on_the_board_opens_nothing() -> None:
    """Who knows the address and the public key of a rank, but owns no member's key."""
    with pair(endpoint=Endpoint(loopback=True, encrypt=True)) as (first, _second):
        said = first.board.get("link/pair/0-1/socket/0")
        assert said is not None
        card = json.loads(said.partition(b"\n")[2])
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        stranger = context.socket(zmq.PAIR)
        stranger.curve_publickey, stranger.curve_secretkey = zmq.curve_keypair()
        stranger.curve_serverkey = card["key"].encode()
        stranger.connect(f"tcp://127.0.0.1:{card['ports']['1']}")
        assert until(lambda: first.refused >= 1)
        context.destroy(0)
        assert first.alive() == (0, 1)


def test_what_travels_beyond_loopback_is_encrypted() -> None:
    assert Endpoint(address="192.0.2.7").encrypted
    assert not Endpoint(loopback=True).encrypted
    assert Endpoint(address="127.0.0.1", encrypt=True).encrypted
    with pytest.raises(ValueError, match="in the clear"):
        Endpoint(address="192.0.2.7", encrypt=False)


def test_the_address_that_peers_are_told_may_be_another_than_that_listened_on() -> None:
    everywhere = Endpoint(address="0.0.0.0", advertised="127.0.0.1", token=b"of the job")

    def work(link: SocketLink) -> float:
        total = torch.ones(1)
        link.all_reduce(total, "sum").wait()
        return float(total)

    assert together(work, 2, endpoint=everywhere) == [2.0, 2.0]
    assert Card("::1", {3: 99}, "", "").place(3) == "tcp://[::1]:99"


# Between processes


def open_link(timeout_s: float, lookout: bool) -> SocketLink:
    world = current_world()
    assert world is not None
    return SocketLink(
        world.board,
        world.rank,
        "test",
        tuple(range(world.size)),
        timeout_s=timeout_s,
        endpoint=LOCAL,
        lookout=world._lookout if lookout else None,  # type: ignore[attr-defined]
    )


def lose_one(folder: str, signal_number: int, timeout_s: float, lookout: bool) -> None:
    """Rank 1 gets a signal in the middle; the others write down what they see."""
    world = current_world()
    assert world is not None
    world.board.set(f"pid/{world.rank}", str(os.getpid()).encode())
    link = open_link(timeout_s, lookout)
    link.step, total = 3, torch.ones(1_000_000)
    link.all_reduce(total, "sum that works").wait()
    if link.rank == 1:
        os.kill(os.getpid(), signal_number)
    begin = time.monotonic()
    try:
        link.all_reduce(total, "sum in which one is lost").wait()
        told = "nothing was raised"
    except PeerLost as error:
        told = str(error)
    took = time.monotonic() - begin
    goes_on = True
    if not lookout:
        other, target = 2 - link.rank, torch.zeros(3)
        sending = link.send(torch.full((3,), 5.0), other, "go on")
        link.receive(target, other, "go on").wait()
        sending.wait()
        goes_on = target.tolist() == [5.0] * 3
    found = {"told": told, "took": took, "alive": link.alive(), "goes on": goes_on}
    Path(folder, str(link.rank)).write_text(json.dumps(found), encoding="utf-8")
    world.board.set(f"told/{link.rank}", b"")
    if link.rank == 0 and signal_number == signal.SIGSTOP:
        world.board.wait("told/2", 30)
        os.kill(int(world.board.wait("pid/1", 1)), signal.SIGKILL)
    begin = time.monotonic()
    link.close()
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize("lookout", [False, True], ids=["alone", "lookout"])
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
def test_all_who_wait_name_the_one_that_was_killed_or_stopped(
    signal_number: int, lookout: bool, tmp_path: Path
) -> None:
    timeout_s = 60.0 if signal_number == signal.SIGKILL else 3.0
    with pytest.raises(WorkerFailed) as caught:
        launch_local(
            lambda: lose_one(str(tmp_path), signal_number, timeout_s, lookout), 3, timeout_s=60
        )
    assert caught.value.rank == 1
    for rank in (0, 2):
        found = json.loads((tmp_path / str(rank)).read_text(encoding="utf-8"))
        words = "lost rank 1 in sum in which one is lost at step 3"
        assert found["told"].startswith(f"rank {rank} {words}"), found
        assert found["took"] < 3.0 + 10  # a roll call that a silent rank does not answer takes 2 s
        assert 1 not in found["alive"]
        assert found["goes on"]


def test_a_stopped_peer_is_noticed_by_heartbeats_without_waiting_for_it(tmp_path: Path) -> None:
    def work() -> None:
        world = current_world()
        assert world is not None
        world.board.set(f"pid/{world.rank}", str(os.getpid()).encode())
        link = open_link(2.0, lookout=False)
        if link.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        noticed = until(lambda: link.alive() == (0,), 10)
        (tmp_path / "noticed").write_text(str(noticed), encoding="utf-8")
        os.kill(int(world.board.wait("pid/1", 1)), signal.SIGKILL)
        link.close()

    with pytest.raises(WorkerFailed):
        launch_local(work, 2, timeout_s=60)
    assert (tmp_path / "noticed").read_text(encoding="utf-8") == "True"


def test_an_alarm_ends_a_wait_for_a_rank_that_is_there() -> None:
    """With a lookout: rank 0 waits for rank 1, which raised because rank 2 was lost."""
    hub, members = Hub(3), (0, 1, 2)
    told: dict[int, Any] = {}

    def act(rank: int) -> None:
        lookout = Lookout(hub, rank, 3)
        link = SocketLink(
            hub, rank, "alarm", members, timeout_s=20, endpoint=LOCAL, lookout=lookout
        )
        if rank == 2:
            hub.set("lost/2", b"was killed by SIGKILL")
            vanish(link)
        else:
            with pytest.raises(PeerLost) as caught:
                link.receive(torch.ones(1), rank + 1, "pass on").wait()
            told[rank] = caught.value
        hub.set(f"done/{rank}", b"")
        for other in members:
            hub.wait(f"done/{other}", 20)
        link.close()
        lookout.close("had finished its work", lost_a_peer=False)

    begin = time.monotonic()
    threads = [threading.Thread(target=act, args=(rank,)) for rank in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - begin < 10
    assert [error.peer for error in told.values()] == [2, 2]
    assert all("was killed by SIGKILL" in str(error) for error in told.values())
