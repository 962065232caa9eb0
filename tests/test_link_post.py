"""Letters: what arrives is what was sent, what is wrong is refused, and nothing waits for ever."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgpack
import pytest
import torch
import zmq
from torch import Tensor

from allfuse.link import letter as letters
from allfuse.link import wired
from allfuse.link.credentials import Credentials
from allfuse.link.endpoint import Endpoint, host_address
from allfuse.link.frame import DTYPES, Malformed
from allfuse.link.letter import MOST_BYTES, OtherVersion, Oversized, pack, unpack
from allfuse.link.mailroom import DOUBLE, DROP, SWAP, Fault, Mailroom, random_faults, scripted
from allfuse.link.post import Caller, Desk, Letter, Post, wait_any
from allfuse.link.wire import Wire, split_place

TOKEN = b"of the job"
LOCAL = Endpoint(loopback=True, token=TOKEN)
ENCRYPTED = Endpoint(loopback=True, token=TOKEN, encrypt=True)
POSTS: dict[str, Callable[[], Post]] = {
    "plain": lambda: Wire(LOCAL),
    "encrypted": lambda: Wire(ENCRYPTED),
    "mailroom": Mailroom,
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads of torch get in each other's way where others use the machine too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=POSTS)
def post(request: pytest.FixtureRequest) -> Post:
    return POSTS[request.param]()


@contextlib.contextmanager
def ends(post: Post, *names: str) -> Iterator[tuple[Desk, list[Caller]]]:
    """A desk and its callers, of which it has heard."""
    desk = post.desk()
    callers = [post.call(desk.place, name) for name in names]
    try:
        for caller in callers:
            caller.send(Letter("hello"))
        collect(desk, len(names))
        yield desk, callers
    finally:
        for end in (*callers, desk):
            end.close()


def collect(desk: Desk, count: int, within_s: float = 20.0) -> list[tuple[str, Letter]]:
    """So many letters."""
    deadline, found = time.monotonic() + within_s, []
    while len(found) < count and time.monotonic() < deadline:
        found += desk.receive(0.1)
    assert len(found) == count
    return found


def answer(caller: Caller, count: int = 1, within_s: float = 20.0) -> list[Letter]:
    deadline, found = time.monotonic() + within_s, []
    while len(found) < count and time.monotonic() < deadline:
        found += caller.receive(0.1)
    assert len(found) == count
    return found


def until(true: Callable[[], object], within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def values(dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return (torch.randn(tuple(shape), generator=generator) * 8).to(dtype)


def same_bits(first: Tensor, second: Tensor) -> bool:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)]
    return torch.equal(*flat)


# What arrives is what was sent


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_type_and_shape_arrive_bit_for_bit(dtype: torch.dtype) -> None:
    shapes = [(), (1,), (0,), (3, 0, 2), (2, 3, 4), (100_003,)]
    sent = tuple(values(dtype, shape) for shape in shapes)
    strided = values(dtype, (6, 8))[::2, 1::3]
    with ends(Wire(LOCAL), "worker") as (desk, (caller,)):
        caller.send(Letter("push", {}, (*sent, strided, strided.t())))
        ((_, came),) = collect(desk, 1)
    for before, after in zip((*sent, strided, strided.t()), came.tensors, strict=True):
        assert same_bits(before, after)
        assert after.is_contiguous()
        assert not after.requires_grad


def test_fields_arrive_as_they_were_both_ways(post: Post) -> None:
    fields = {
        "none": None,
        "numbers": [0, -1, 2**63 - 1, -(2**63), 2**64 - 1, 0.1, float("inf"), True],
        "text": "\u00fcber",
        "bytes": b"\x00\xff",
        "nest": {"": [], "a": {"b": [[1], {}]}},
    }
    with ends(post, "worker") as (desk, (caller,)):
        caller.send(Letter("there", {**fields, "pair": (1, "x")}))
        ((name, came),) = collect(desk, 1)
        assert (name, came.kind, came.fields) == ("worker", "there", {**fields, "pair": [1, "x"]})
        assert desk.send("worker", Letter("back", fields))
        (back,) = answer(caller)
    assert (back.kind, back.fields, back.tensors) == ("back", fields, ())


def test_tensors_that_arrive_may_be_changed_and_are_nobody_elses(post: Post) -> None:
    sent = torch.ones(100_000)
    with ends(post, "worker") as (desk, (caller,)):
        caller.send(Letter("push", {}, (sent, sent[:10])))
        ((_, came),) = collect(desk, 1)
        for tensor in came.tensors:
            tensor += 1
            assert tensor.eq(2).all()
    assert sent.eq(1).all()


def test_letters_of_a_pair_come_in_their_order_whatever_their_sizes(post: Post) -> None:
    names = ("a", "b", "c")
    chance = random.Random(0)
    with ends(post, *names) as (desk, callers):
        for number in range(100):
            for caller in callers:
                tensor = torch.full((chance.choice((0, 10, 100_000)),), float(number))
                caller.send(Letter("push", {"number": number}, (tensor,)))
                assert desk.send(caller.name, Letter("weights", {"number": number}, (tensor,)))
        came = collect(desk, 300)
        for caller in callers:
            own = [each for name, each in came if name == caller.name]
            assert [each.fields["number"] for each in own] == list(range(100))
            assert all((each.tensors[0] == each.fields["number"]).all() for each in own)
            back = answer(caller, 100)
            assert [each.fields["number"] for each in back] == list(range(100))


@pytest.mark.parametrize(
    "letter",
    [
        Letter("x", {"value": object()}),
        Letter("x", {"value": 2**64}),
        Letter("x", {"value": torch.ones(1)}),
        Letter("x", {}, (torch.ones(2, 2).to_sparse(),)),
        Letter("x", {}, (torch.ones(1, dtype=torch.int8).view(torch.uint8).to(torch.uint16),)),
        Letter("x", {}, (torch.empty(MOST_BYTES, dtype=torch.uint8),)),
        Letter("x", {"value": "x" * letters.MOST_HEADER_BYTES}),
    ],
    ids=["object", "integer", "tensor in a field", "sparse", "type", "large", "large fields"],
)
def test_what_cannot_travel_is_an_error_of_the_sender(post: Post, letter: Letter) -> None:
    with ends(post, "worker") as (desk, (caller,)):
        with pytest.raises(ValueError, match="letter"):
            caller.send(letter)
        with pytest.raises(ValueError, match="letter"):
            desk.send("worker", letter)
        caller.send(Letter("good"))
        assert collect(desk, 1)[0][1].kind == "good"


def test_the_largest_letter_passes_encrypted() -> None:
    spare = len(pack(Letter("x", {}, (torch.empty(MOST_BYTES - 200, dtype=torch.uint8),)))[0])
    largest = torch.empty(MOST_BYTES - spare, dtype=torch.uint8).fill_(7)
    with ends(Wire(ENCRYPTED), "worker") as (desk, (caller,)):
        with pytest.raises(ValueError, match="allowed"):
            caller.send(Letter("x", {}, (torch.empty(MOST_BYTES - spare + 1, dtype=torch.uint8),)))
        caller.send(Letter("x", {}, (largest,)))
        ((_, came),) = collect(desk, 1)
        assert torch.equal(came.tensors[0], largest)


def test_complex_values_that_torch_has_only_marked_arrive_as_they_read() -> None:
    tensor = torch.complex(torch.arange(3.0), torch.ones(3)).conj()
    came = unpack(pack(Letter("x", {}, (tensor, tensor.imag))))
    assert torch.equal(came.tensors[0], tensor)
    assert torch.equal(came.tensors[1], -torch.ones(3))


def test_large_tensors_are_sent_from_their_own_memory_until_they_have_gone() -> None:
    """As cheap as that is, the sender must know until when."""
    tensor = torch.ones(4_000_000)
    frames = pack(Letter("push", {}, (tensor,)))
    assert torch.frombuffer(frames[1], dtype=torch.float32).data_ptr() == tensor.data_ptr()
    with ends(Wire(LOCAL), "worker") as (desk, (caller,)):
        for _ in range(20):
            caller.send(Letter("push", {}, (tensor,)))
        assert caller.unsent_bytes() > 0
        collect(desk, 20)
        assert until(lambda: caller.unsent_bytes() == 0)


# Who is there


def test_only_callers_that_are_there_are_sent_to(post: Post) -> None:
    with ends(post, "worker") as (desk, (caller,)):
        assert not desk.send("nobody", Letter("x"))
        assert not desk.send("", Letter("x"))
        assert desk.send("worker", Letter("x"))
        assert [each.kind for each in answer(caller)] == ["x"]


def test_a_caller_that_leaves_is_lost_after_its_last_letter_and_once(post: Post) -> None:
    with ends(post, "a", "b") as (desk, (first, second)):
        first.send(Letter("last"))
        first.close()
        assert collect(desk, 1) == [("a", Letter("last"))]
        found: list[str] = []
        assert until(lambda: found.extend(desk.lost()) or found)
        assert found == ["a"]
        assert not desk.send("a", Letter("x"))
        assert desk.send("b", Letter("x"))
        assert desk.lost() == []
        assert answer(second) == [Letter("x")]


def test_a_wait_ends_when_a_caller_is_lost(post: Post) -> None:
    with ends(post, "worker") as (desk, (caller,)):
        caller.close()
        begin = time.monotonic()
        assert desk.receive(timeout_s=10) == []
        assert time.monotonic() - begin < 5
        assert desk.lost() == ["worker"]


def test_a_second_caller_of_a_name_takes_the_place_of_the_first(post: Post) -> None:
    with (
        ends(post, "worker") as (desk, _),
        contextlib.closing(post.call(desk.place, "worker")) as b,
    ):
        b.send(Letter("again"))
        collect(desk, 1)
        assert desk.send("worker", Letter("x"))
        assert answer(b) == [Letter("x")]


CALLER = """
import sys, time
from allfuse.link.endpoint import Endpoint
from allfuse.link.post import Letter
from allfuse.link.wire import Wire
post = Wire(Endpoint(loopback=True, token=b"of the job", encrypt=sys.argv[2] == "True"))
caller = post.call(sys.argv[1], "worker")
caller.send(Letter("hello"))
time.sleep(60)
"""


@pytest.mark.parametrize("encrypt", [False, True])
def test_a_killed_process_is_found_within_a_second(encrypt: bool) -> None:
    with ends(Wire(ENCRYPTED if encrypt else LOCAL), "other") as (desk, (other,)):
        command = [sys.executable, "-c", CALLER, desk.place, str(encrypt)]
        process = subprocess.Popen(command)
        try:
            assert collect(desk, 1, within_s=60) == [("worker", Letter("hello"))]
            process.send_signal(signal.SIGKILL)
            process.wait()  # its end may take longer than finding it does
            begin = time.monotonic()
            found: list[str] = []
            assert until(lambda: found.extend(desk.lost()) or found, 1.0)
            assert found == ["worker"]
            assert time.monotonic() - begin < 1.0
        finally:
            process.kill()
            process.wait()
        other.send(Letter("still here"))
        assert collect(desk, 1) == [("other", Letter("still here"))]


def test_callers_go_on_with_a_desk_that_starts_again_at_its_place(post: Post) -> None:
    with ends(post, "a", "b") as (desk, callers):
        place = desk.place
        desk.close()
        for caller in callers:
            assert caller.send(Letter("meanwhile"))
        with contextlib.closing(post.desk(place)) as second:
            assert second.place == place
            came = collect(second, 2)
            assert sorted(name for name, _ in came) == ["a", "b"]
            for caller in callers:
                assert second.send(caller.name, Letter("welcome"))
                assert answer(caller) == [Letter("welcome")]
            assert second.lost() == []


def test_wait_any_names_the_ends_that_have_something(post: Post) -> None:
    with ends(post, "worker") as (one, (to_one,)), ends(post, "worker") as (two, (to_two,)):
        assert wait_any([one, two, to_one, to_two], 0.02) == []
        assert two.send("worker", Letter("x"))
        assert wait_any([to_one, to_two], 10) == [to_two]
        to_one.send(Letter("x"))
        assert wait_any([two, one], 10) == [one]
        assert wait_any([], 10) == []


def test_a_wait_is_ended_by_a_letter_from_another_thread(post: Post) -> None:
    with ends(post, "worker") as (desk, (caller,)):
        thread = threading.Timer(0.1, lambda: caller.send(Letter("x")))
        thread.start()
        begin = time.monotonic()
        assert wait_any([desk], 20) == [desk]
        assert time.monotonic() - begin < 10
        thread.join()


# Who may come, and what is refused


@contextlib.contextmanager
def bare(
    desk: Desk, token: bytes | None, encrypt: bool = False, name: bytes = b"bad"
) -> Iterator[zmq.Socket[bytes]]:
    """A DEALER of bare ZeroMQ that says what it likes."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as caller:
        caller.set(zmq.LINGER, 0)
        if name:
            caller.set(zmq.ROUTING_ID, name)
        if token is not None:
            Credentials(token, encrypt).show(caller)
        caller.connect(f"tcp://{desk.place}")
        yield caller


def serves(desk: Desk, caller: Caller) -> bool:
    """Whether the desk still hears a good caller and nobody else, and answers it."""
    caller.send(Letter("good", {}, (torch.arange(3),)))
    ((name, came),) = collect(desk, 1)
    assert (name, came.kind, came.tensors[0].tolist()) == (caller.name, "good", [0, 1, 2])
    return desk.send(name, Letter("yes")) and answer(caller) == [Letter("yes")]


@pytest.mark.parametrize("encrypt", [False, True])
def test_who_has_another_token_is_refused_and_counted(encrypt: bool) -> None:
    with ends(Wire(ENCRYPTED if encrypt else LOCAL), "worker") as (desk, (good,)):
        with bare(desk, b"guess", encrypt) as bad:
            bad.send_multipart(pack(Letter("bad")))
            assert until(lambda: desk.receive(0.01) or desk.refused["token"])
            assert serves(desk, good)
        assert set(desk.refused) == {"token"}
        assert desk.lost() == []


@pytest.mark.parametrize(("encrypt", "token"), [(False, None), (True, None), (False, TOKEN)])
def test_who_shows_no_token_or_in_another_way_is_refused_and_counted(
    encrypt: bool, token: bytes | None
) -> None:
    """Either side may be the first to see that they do not fit, so the reason varies."""
    with ends(Wire(ENCRYPTED if encrypt else LOCAL), "worker") as (desk, (good,)):
        with bare(desk, token, not encrypt) as bad:
            bad.send_multipart(pack(Letter("bad")))
            assert until(lambda: desk.receive(0.01) or desk.refused)
            assert serves(desk, good)
        assert set(desk.refused) <= {"token", "handshake"}
        assert desk.lost() == []


@pytest.mark.parametrize("encrypt", [False, True])
def test_a_caller_learns_why_it_is_not_let_in(encrypt: bool) -> None:
    post = Wire(ENCRYPTED if encrypt else LOCAL)
    other = Wire(Endpoint(loopback=True, token=b"guess", encrypt=encrypt))
    with ends(post, "worker") as (desk, (good,)):
        with contextlib.closing(other.call(desk.place, "bad")) as bad:
            assert until(lambda: desk.receive(0.01) or bad.ready() or "token" in bad.trouble)
        assert good.receive(0.01) == []
        assert good.trouble == ""


def test_a_caller_whose_desk_is_not_there_says_so_and_closes_at_once() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        caller = Wire(LOCAL).call(f"127.0.0.1:{reserved.getsockname()[1]}", "worker")
        for _ in range(10):
            assert caller.send(Letter("push", {}, (torch.ones(100_000),)))
        assert caller.receive(0.05) == []
        assert caller.trouble == "nobody answers"
        begin = time.monotonic()
        caller.close()
        assert time.monotonic() - begin < wired.LINGER_S + 2


def test_a_desk_with_letters_for_one_that_reads_nothing_closes_within_its_time() -> None:
    with ends(Wire(LOCAL), "worker") as (desk, (caller,)):
        tensor = torch.ones(1_000_000)
        while desk.unsent_bytes() < 40 * tensor.nbytes:
            assert desk.send("worker", Letter("weights", {}, (tensor,)))
        for end in (desk, caller):
            begin = time.monotonic()
            end.close()
            assert time.monotonic() - begin < wired.LINGER_S + 2


GOOD = pack(Letter("push", {"lease": 1}, (torch.ones(3), torch.zeros(2, dtype=torch.bool))))


def header(**changes: object) -> bytes:
    """The header of GOOD with some entries changed."""
    packed: bytes = msgpack.packb({**msgpack.unpackb(GOOD[0]), **changes})
    return packed


def deep(levels: int) -> object:
    return [] if levels == 0 else [deep(levels - 1)]


BAD: dict[str, tuple[type[Malformed], list[Any]]] = {
    "no frames": (Malformed, []),
    "no header": (Malformed, [b"", *GOOD[1:]]),
    "not msgpack": (Malformed, [b"\xc1" * 30, *GOOD[1:]]),
    "not a dict": (Malformed, [msgpack.packb([1, 2]), *GOOD[1:]]),
    "version": (OtherVersion, [header(version=2), *GOOD[1:]]),
    "version that is text": (Malformed, [header(version="1"), *GOOD[1:]]),
    "more entries": (Malformed, [header(more=1), *GOOD[1:]]),
    "kind": (Malformed, [header(kind=7), *GOOD[1:]]),
    "fields": (Malformed, [header(fields=[]), *GOOD[1:]]),
    "keys": (Malformed, [header(fields={b"a": 1}), *GOOD[1:]]),
    "extension": (Malformed, [header(fields={"a": msgpack.ExtType(4, b"x")}), *GOOD[1:]]),
    "time": (Malformed, [header(fields={"a": msgpack.Timestamp(1)}), *GOOD[1:]]),
    "depth": (Malformed, [header(fields={"a": deep(40)}), *GOOD[1:]]),
    "far depth": (Malformed, [b"\x91" * 100_000]),
    "fewer frames": (Malformed, GOOD[:2]),
    "more frames": (Malformed, [*GOOD, b"x"]),
    "truncated": (Malformed, [GOOD[0], GOOD[1][:-1], GOOD[2]]),
    "longer": (Malformed, [GOOD[0], GOOD[1], bytes(3)]),
    "type": (Malformed, [header(tensors=[[len(DTYPES), [3]], [9, [2]]]), *GOOD[1:]]),
    "negative size": (Malformed, [header(tensors=[[1, [-3]], [9, [2]]]), *GOOD[1:]]),
    "size that is no number": (Malformed, [header(tensors=[[1, [3.0]], [9, [2]]]), *GOOD[1:]]),
    "not a shape": (Malformed, [header(tensors=[3, 4]), *GOOD[1:]]),
    "many dims": (Malformed, [header(tensors=[[1, [1] * 1000]]), GOOD[1]]),
    "huge": (Oversized, [header(tensors=[[1, [2**40]]]), GOOD[1]]),
    "huge and empty": (Oversized, [header(tensors=[[1, [2**40, 2**40, 0]]])]),
    "overflow": (Oversized, [header(tensors=[[1, [2**62, 2**62]]]), GOOD[1]]),
    "many frames": (Oversized, [GOOD[0], *[b""] * (letters.MOST_TENSORS + 1)]),
    "much in sum": (Oversized, [GOOD[0], bytes(MOST_BYTES // 2), bytes(MOST_BYTES // 2)]),
    "truth values": (Malformed, [GOOD[0], GOOD[1], b"\x01\x02"]),
}


@pytest.mark.parametrize("name", BAD)
def test_what_no_sender_makes_is_refused(name: str) -> None:
    kind, frames = BAD[name]
    with pytest.raises(kind) as raised:
        unpack(frames)
    assert type(raised.value) is kind


def test_a_desk_counts_what_it_refuses_by_the_reason_and_goes_on() -> None:
    reasons = {Malformed: "malformed", OtherVersion: "version", Oversized: "oversized"}
    expected: dict[str, int] = {}
    with ends(Wire(LOCAL), "worker") as (desk, (good,)), bare(desk, TOKEN) as bad:
        for kind, frames in BAD.values():
            if frames not in ([], [b""]):
                bad.send_multipart(frames)
                expected[reasons[kind]] = expected.get(reasons[kind], 0) + 1
        assert until(
            lambda: desk.receive(0.01) or sum(desk.refused.values()) == sum(expected.values())
        )
        assert desk.refused == expected
        assert serves(desk, good)


def test_a_frame_beyond_the_limit_ends_its_connection_before_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wired, "MOST_BYTES", 1_000_000)
    with ends(Wire(LOCAL), "worker") as (desk, (good,)), bare(desk, TOKEN) as bad:
        bad.send_multipart([b""])
        bad.send_multipart(GOOD)
        assert until(lambda: desk.receive(0.01))  # who is not known yet is not lost
        bad.send_multipart([*GOOD[:1], bytes(2_000_000)])
        found: list[str] = []
        assert until(lambda: desk.receive(0.01) or found.extend(desk.lost()) or found)
        assert found[0] == "bad"
        assert serves(desk, good)


@pytest.mark.parametrize("name", [b"", b"\xff\xfe", b"a\nb"])
def test_a_caller_without_a_readable_name_is_refused(name: bytes) -> None:
    with ends(Wire(LOCAL), "worker") as (desk, (good,)), bare(desk, TOKEN, name=name) as bad:
        bad.send_multipart(GOOD)
        assert until(lambda: desk.receive(0.01) or desk.refused["name"])
        assert serves(desk, good)


def mutated(chance: random.Random) -> list[bytes]:
    """The frames of a good letter with some bytes changed, cut off, put in, or frames moved."""
    frames = [bytearray(frame) for frame in GOOD]
    for _ in range(chance.randint(1, 3)):
        frame = chance.choice(frames)
        place = chance.randrange(len(frame) + 1)
        what = chance.randrange(5)
        if what == 0 and place < len(frame):
            frame[place] = chance.randrange(256)
        elif what == 1:
            del frame[place:]
        elif what == 2:
            frame[place:place] = chance.randbytes(chance.randint(1, 8))
        elif what == 3:
            chance.shuffle(frames)
        else:
            frames.append(bytearray(chance.randbytes(chance.randint(0, 30))))
    return [bytes(frame) for frame in frames]


def test_two_thousand_broken_letters_are_refused_or_plain_and_the_desk_serves_on() -> None:
    chance = random.Random(0)
    with ends(Wire(LOCAL), "worker") as (desk, (good,)), bare(desk, TOKEN) as bad:
        refused = heard = 0
        for number in range(2000):
            frames = mutated(chance) if number % 4 else [chance.randbytes(chance.randint(1, 99))]
            try:
                came = unpack(frames)
                assert came.tensors == () or all(t.numel() < 100 for t in came.tensors)
                heard += 1
            except Malformed:
                refused += 1
            bad.send_multipart(frames)
            if number % 500 == 499:
                names = [name for name, _ in collect(desk, heard)]
                assert names == ["bad"] * heard
                heard = 0
                assert until(lambda: desk.receive(0.01) or desk.refused.total() == refused)  # noqa: B023
                assert serves(desk, good)
        assert refused > 1000
        assert desk.lost() == []


@pytest.mark.parametrize("encrypt", [False, True])
def test_random_bytes_instead_of_a_handshake_are_sent_away_and_counted(encrypt: bool) -> None:
    chance = random.Random(0)
    with ends(Wire(ENCRYPTED if encrypt else LOCAL), "worker") as (desk, (good,)):
        host, port = split_place(desk.place)
        for number in range(60):
            greeting = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x00PLAIN" if number % 2 else b""
            with socket.create_connection((host, port)) as raw, contextlib.suppress(OSError):
                raw.sendall(greeting + chance.randbytes(chance.randint(0, 300)))
            if number % 20 == 19:
                assert serves(desk, good)
        assert until(lambda: desk.receive(0.01) or desk.refused.total() == 60)
        assert set(desk.refused) <= {"token", "handshake"}
        assert serves(desk, good)
        assert desk.lost() == []


# Encryption


class Tap:
    """Stands between caller and desk, and keeps all that passes."""

    def __init__(self, place: str) -> None:
        host, port = split_place(place)
        self.seen = bytearray()
        self._target = (host, port)
        self._listener = socket.create_server((host, 0))
        self.place = f"{host}:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._serve)]
        self._threads[0].start()

    def _serve(self) -> None:
        came, _ = self._listener.accept()
        gone = socket.create_connection(self._target)
        back = threading.Thread(target=self._pass, args=(gone, came))
        back.start()
        self._pass(came, gone)
        back.join()
        came.close()
        gone.close()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.seen += data
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._threads[0].join(10)
        self._listener.close()


def tapped(endpoint: Endpoint) -> bytes:
    """What someone between caller and desk sees of secrets both ways."""
    post = Wire(endpoint)
    secret = torch.frombuffer(bytearray(b"a secret tensor " * 100), dtype=torch.uint8)
    desk = post.desk()
    tap = Tap(desk.place)
    caller = post.call(tap.place, "worker")
    caller.send(Letter("secret kind", {"secret field": "secret value"}, (secret,)))
    ((_, came),) = collect(desk, 1)
    assert torch.equal(came.tensors[0], secret)
    desk.send("worker", came)
    assert torch.equal(answer(caller)[0].tensors[0], secret)
    for end in (caller, desk, tap):
        end.close()
    return bytes(tap.seen)


def test_beyond_loopback_nothing_can_be_read_on_the_way() -> None:
    endpoint = Endpoint(address=host_address(), token=TOKEN)
    if endpoint.is_local:
        endpoint = ENCRYPTED
    seen = tapped(endpoint)
    assert len(seen) > 2 * 1600
    assert b"secret" not in seen
    assert TOKEN not in seen


def test_on_loopback_letters_travel_in_the_clear_and_the_token_does_not() -> None:
    """Also shows that a tap would see what is not encrypted."""
    seen = tapped(LOCAL)
    assert seen.count(b"a secret tensor") == 200
    assert TOKEN not in seen


def test_beyond_loopback_there_is_no_desk_and_no_caller_without_a_token() -> None:
    with pytest.raises(ValueError, match="token"):
        Wire(Endpoint(address="192.0.2.7")).desk()
    with pytest.raises(ValueError, match="token"):
        Wire().call("example.org:7077", "worker")


def test_a_port_that_is_taken_is_named() -> None:
    with contextlib.closing(Wire(LOCAL).desk()) as desk:
        with pytest.raises(OSError, match=desk.place):
            Wire(LOCAL).desk(desk.place)


@pytest.mark.parametrize("place", ["", "host", "host:", ":70", "host:x", "host:0", "host:70000"])
def test_a_place_that_is_none_is_refused(place: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        Wire(LOCAL).call(place, "worker")


@pytest.mark.parametrize("name", ["", "x" * 256, "a\0b"])
def test_a_name_that_cannot_travel_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        Wire(LOCAL).call("127.0.0.1:7077", name)


# What is held, and what is left


def test_a_desk_that_does_not_read_makes_senders_hold_and_never_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wired, "SENT_LETTERS", 20)
    monkeypatch.setattr(wired, "COME_LETTERS", 4)
    tensor = torch.ones(250_000)
    with ends(Wire(LOCAL), "worker") as (desk, (caller,)):
        taken, begin = 0, time.monotonic()
        while caller.send(Letter("push", {"number": taken}, (tensor,))):
            taken += 1
            assert taken < 1000
        assert time.monotonic() - begin < 10
        came = collect(desk, taken)
        assert [each.fields["number"] for _, each in came] == list(range(taken))
        assert caller.send(Letter("push", {"number": taken}, (tensor,)))


@pytest.mark.parametrize("encrypt", [False, True])
def test_nothing_is_left_of_ends_that_are_closed(encrypt: bool) -> None:
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    def files() -> int:
        return len(os.listdir("/proc/self/fd"))

    def use() -> str:
        with ends(Wire(ENCRYPTED if encrypt else LOCAL), "a", "b") as (desk, callers):
            for caller in callers:
                caller.send(Letter("push", {}, (torch.ones(100_000),)))
            collect(desk, 2)
            place = desk.place
            desk.close()  # and again at the end: once more does nothing
        return place

    use()  # pyzmq's own thread, which frees what was sent, starts here and stays
    before = threads(), files()
    place = use()
    assert until(lambda: threads() <= before[0])
    assert until(lambda: files() <= before[1])
    with socket.socket() as probe:
        assert probe.connect_ex(split_place(place)) != 0


# The mailroom's faults


def kinds(letters: Sequence[tuple[str, Letter]]) -> list[int]:
    return [letter.fields["number"] for _, letter in letters]


def test_scripted_faults_fall_to_the_letters_that_they_name() -> None:
    now = [0.0]
    script = {
        ("worker", "server", "push", 1): DROP,
        ("worker", "server", "push", 2): DOUBLE,
        ("worker", "server", "push", 4): SWAP,
        ("worker", "server", "push", 6): Fault(delay_s=5),
        ("server", "worker", "weights", 0): Fault(copies=2, delay_s=1),
    }
    post = Mailroom(scripted(script), clock=lambda: now[0])
    desk, caller = post.desk("server"), post.call("server", "worker")
    other = post.call("server", "other")
    for number in range(8):
        caller.send(Letter("push", {"number": number}))
        other.send(Letter("push", {"number": number}))
    came = desk.receive(0)
    assert kinds([each for each in came if each[0] == "worker"]) == [0, 2, 2, 3, 5, 4, 7]
    assert kinds([each for each in came if each[0] == "other"]) == list(range(8))
    now[0] = 5.0
    assert kinds(desk.receive(0)) == [6]
    desk.send("worker", Letter("weights", {"number": 0}))
    desk.send("worker", Letter("weights", {"number": 1}))
    assert [each.fields["number"] for each in caller.receive(0)] == [1]
    now[0] = 6.0
    assert [each.fields["number"] for each in caller.receive(0)] == [0, 0]


def test_a_letter_that_nothing_overtakes_still_comes() -> None:
    post = Mailroom(scripted({("worker", "server", "push", 0): Fault(copies=2, behind=3)}))
    desk, caller = post.desk("server"), post.call("server", "worker")
    caller.send(Letter("push", {"number": 0}))
    assert desk.receive(0) == []
    assert kinds(desk.receive(10)) == [0, 0]


def test_random_faults_come_at_their_rates_and_are_the_same_for_a_seed() -> None:
    def play(seed: int) -> list[int]:
        now = [0.0]
        faults = random_faults(seed, drop=0.1, double=0.1, swap=0.1, delay=0.2, delay_s=3.0)
        post = Mailroom(faults, clock=lambda: now[0])
        desk, caller = post.desk("server"), post.call("server", "worker")
        came = []
        for number in range(1000):
            now[0] += 1.0
            caller.send(Letter("push", {"number": number}))
            came += kinds(desk.receive(0))
        now[0] += 10.0
        return came + kinds(desk.receive(0))

    came = play(1)
    assert 60 < 1000 - len(set(came)) < 140
    assert 60 < len(came) - len(set(came)) < 140
    assert 100 < sum(after < before for before, after in itertools.pairwise(came)) < 400
    assert came == play(1)
    assert came != play(2)


def test_a_cut_takes_what_is_on_its_way_to_a_caller_and_it_comes_back_by_itself() -> None:
    post = Mailroom()
    desk, caller = post.desk("server"), post.call("server", "worker")
    caller.send(Letter("before"))
    assert desk.send("worker", Letter("x"))
    post.cut("worker")
    assert desk.lost() == []  # its letter is still to be read
    assert desk.receive(0) == [("worker", Letter("before"))]
    assert desk.lost() == ["worker"]
    assert not desk.send("worker", Letter("x"))
    assert caller.receive(0) == []
    caller.send(Letter("after"))
    assert desk.receive(0) == [("worker", Letter("after"))]
    assert desk.send("worker", Letter("y"))
    assert caller.receive(0) == [Letter("y")]
