"""Parts of the launcher without processes: frames, verdicts, worlds, ranks as threads."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import threading
from typing import Any

import pytest
import torch

from allfuse.base.errors import (
    CheckpointError,
    Interrupted,
    JobError,
    NonFiniteLoss,
    PeerLost,
    PlanError,
    UserError,
    WorkerFailed,
)
from allfuse.launcher.alone import AloneWorld
from allfuse.launcher.base import World, current_world, entered
from allfuse.launcher.channel import Channel, receive_frame, send_frame
from allfuse.launcher.local import threads_each
from allfuse.launcher.outcome import Failure, Outcome, describe_failure, how_it_ended, judge
from allfuse.launcher.signals import catch_signals
from allfuse.launcher.thread import first_failure, launch_threads
from allfuse.launcher.torchrun import environment_number, started_by_torchrun

LOST = PeerLost("gone", rank=1, peer=0, operation="sum", step=2, seconds=0.1)


@pytest.fixture
def ends() -> Any:
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    yield channel, theirs
    channel.close()
    theirs.close()


def test_frames_of_any_size_pass_both_ways_without_blocking_the_launcher(ends: Any) -> None:
    channel, theirs = ends
    bodies = [b"", b"x", bytes(3_000_000), b"last"]
    for body in bodies:
        channel.post(body)
    channel.push()
    assert channel.has_outgoing  # nobody has read: the rest waits in line, not in a call
    back: list[bytes | None] = []
    reader = threading.Thread(target=lambda: back.extend(receive_frame(theirs) for _ in bodies))
    reader.start()
    while channel.has_outgoing:
        channel.push()
    reader.join()
    assert back == bodies

    writer = threading.Thread(target=lambda: [send_frame(theirs, body) for body in bodies])
    writer.start()
    got: list[bytes] = []
    while len(got) < len(bodies):
        got += channel.pull()
    writer.join()
    assert got == bodies
    assert not channel.closed


def test_half_a_frame_is_no_frame(ends: Any) -> None:
    channel, theirs = ends
    theirs.sendall((5).to_bytes(8, "little") + b"abc")
    assert channel.pull() == []
    theirs.close()
    assert channel.pull() == []
    assert channel.closed


def test_a_worker_that_died_gets_nothing_more_and_nobody_waits_for_it(ends: Any) -> None:
    channel, theirs = ends
    theirs.close()
    channel.post(bytes(1_000_000))
    channel.push()
    assert not channel.has_outgoing


def test_a_worker_sees_that_its_launcher_closed(ends: Any) -> None:
    channel, theirs = ends
    channel.post(bytes(100))
    channel._outgoing.pop()  # the launcher dies between header and body
    channel.push()
    channel.close()
    assert receive_frame(theirs) is None


def failed(error: BaseException, rank: int, order: int, step: int | None = None) -> Outcome:
    return Outcome(rank, status=1, failure=describe_failure(error, step), order=order)


def done(rank: int, value: object = None) -> Outcome:
    return Outcome(rank, status=0, result=pickle.dumps(value))


def killed(rank: int, order: int, here: bool = False) -> Outcome:
    return Outcome(rank, status=-signal.SIGKILL, order=order, killed_here=here)


def test_the_result_is_that_of_rank_0() -> None:
    assert judge([done(0, "mine"), done(1, "other")], interrupted=False) == "mine"


def test_the_first_failure_in_time_is_shown_not_that_of_the_lowest_rank() -> None:
    outcomes = [failed(KeyError("late"), 0, order=1), failed(ValueError("early"), 1, order=0)]
    with pytest.raises(WorkerFailed, match="rank 1 failed before the first step: ValueError"):
        judge(outcomes, interrupted=False)


def test_the_loss_of_a_peer_is_never_the_cause() -> None:
    outcomes = [failed(LOST, 0, order=0), failed(ValueError("cause"), 1, order=1, step=4)]
    with pytest.raises(WorkerFailed) as caught:
        judge(outcomes, interrupted=False)
    assert caught.value.rank == 1
    assert str(caught.value) == "rank 1 failed at step 4: ValueError: cause"
    assert "ValueError: cause" in caught.value.trace
    assert any(caught.value.trace in note for note in caught.value.__notes__)


def test_an_error_that_tells_where_it_came_from_is_not_blamed_on_who_said_so_first() -> None:
    error = NonFiniteLoss("the loss is nan on rank 1 at step 3")
    with pytest.raises(WorkerFailed) as caught:
        judge([failed(error, 0, order=0), failed(error, 1, order=1)], interrupted=False)
    assert str(caught.value) == "the loss is nan on rank 1 at step 3"


def test_a_worker_that_the_launcher_killed_is_no_cause_and_is_not_blamed() -> None:
    outcomes = [killed(0, order=2, here=True), killed(1, order=0), failed(LOST, 2, order=1)]
    with pytest.raises(WorkerFailed) as caught:
        judge(outcomes, interrupted=False)
    assert caught.value.rank == 1
    assert str(caught.value).splitlines() == [
        "rank 1 was killed by SIGKILL; was memory short?",
        str(LOST),
    ]


def test_a_kill_is_named_beside_the_error_that_it_caused() -> None:
    outcomes = [failed(RuntimeError("connection reset"), 0, order=0), killed(1, order=1)]
    with pytest.raises(WorkerFailed, match="rank 1 was killed by SIGKILL") as caught:
        judge(outcomes, interrupted=False)
    assert "connection reset" in str(caught.value)


def test_if_all_only_lost_each_other_all_are_quoted() -> None:
    with pytest.raises(WorkerFailed) as caught:
        judge([failed(LOST, 0, order=1), failed(LOST, 1, order=0)], interrupted=False)
    assert str(caught.value).count("lost rank 0 in sum") == 2
    assert caught.value.rank == 1


@pytest.mark.parametrize(
    "error",
    [
        UserError("bad"),
        JobError("bad job"),
        PlanError("data(x)", "x is no number", "data(1)"),
        Interrupted("interrupted after step 3"),
    ],
)
def test_bad_input_keeps_its_class_and_text(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        judge([failed(error, 0, order=0)], interrupted=False)
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)
    assert vars(caught.value) == vars(error)


def test_errors_of_allfuse_need_no_traceback() -> None:
    with pytest.raises(WorkerFailed) as caught:
        judge([failed(CheckpointError("disk full"), 1, order=0, step=9)], interrupted=False)
    assert str(caught.value) == "rank 1 failed at step 9: disk full"
    assert caught.value.trace == ""
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("others", [[], [killed(1, order=1, here=True)], [failed(LOST, 1, 1)]])
def test_an_interrupt_is_told_as_such(others: list[Outcome]) -> None:
    stopped = failed(Interrupted("interrupted after step 7"), 0, order=0)
    with pytest.raises(Interrupted, match="interrupted after step 7"):
        judge([stopped, *others], interrupted=True)


def test_an_interrupt_hides_no_error() -> None:
    outcomes = [failed(Interrupted("interrupted"), 0, 0), failed(ValueError("bug"), 1, 1)]
    with pytest.raises(WorkerFailed, match="bug") as caught:
        judge(outcomes, interrupted=True)
    assert caught.value.rank == 1


def test_all_that_ended_well_in_spite_of_an_interrupt_counts() -> None:
    assert judge([done(0, 5)], interrupted=True) == 5


def unreadable() -> object:
    raise RuntimeError("not here")


class Unreadable:
    def __reduce__(self) -> Any:
        return unreadable, ()


def test_a_result_that_cannot_be_read_here_is_a_clear_error() -> None:
    with pytest.raises(UserError, match="cannot be read here: RuntimeError: not here"):
        judge([done(0, Unreadable())], interrupted=False)


class Mute(Exception):
    exit_code = "no number"

    def __str__(self) -> str:
        raise RuntimeError("no text")


def describe(error: BaseException) -> Failure:
    try:
        raise error
    except BaseException as raised:
        return describe_failure(raised, 1)


def test_any_exception_can_be_described() -> None:
    failure = describe(Mute())
    assert failure.text == "(its text cannot be shown: RuntimeError)"
    assert (failure.type, failure.exit_code, failure.expected) == ("Mute", 1, False)
    assert "Mute" in failure.trace
    assert pickle.loads(pickle.dumps(failure)) == failure
    assert describe(LOST).peer_lost


@pytest.mark.parametrize(
    ("code", "expected"), [(None, 0), (0, 0), (3, 3), (True, 1), ("no", 1), (256, 0), (-1, 255)]
)
def test_exit_codes_are_those_that_python_would_end_with(code: Any, expected: int) -> None:
    assert describe(SystemExit(code)).exit_code == expected


def test_an_interrupt_of_python_ends_like_ours() -> None:
    assert describe(KeyboardInterrupt()).exit_code == Interrupted.exit_code


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (0, "ended with exit code 0 and no word why"),
        (7, "ended with exit code 7 and no word why"),
        (-11, "was killed by SIGSEGV"),
        (-9, "was killed by SIGKILL; was memory short?"),
        (-35, "was killed by signal 35"),
        (None, "ended, nobody knows how"),
    ],
)
def test_every_end_can_be_said(status: int | None, text: str) -> None:
    assert how_it_ended(status) == text


class Plain(World):
    def __init__(self, spans_process: bool) -> None:
        super().__init__()
        self.spans_process = spans_process
        self.closed_with: list[BaseException | None] = []

    def link(
        self, name: str, members: tuple[int, ...], device: torch.device, groups: Any = ()
    ) -> Any: ...

    def form_replica(self, replica: tuple[int, ...], backend: str) -> None: ...

    def close(self, error: BaseException | None = None) -> None:
        self.closed_with.append(error)


@pytest.mark.parametrize("spans_process", [True, False])
def test_threads_of_a_worker_belong_to_its_world(spans_process: bool) -> None:
    seen: list[World | None] = []
    outer = current_world()
    with entered(Plain(spans_process)) as world:
        thread = threading.Thread(target=lambda: seen.append(current_world()))
        thread.start()
        thread.join()
        assert current_world() is world
    assert seen == [world if spans_process else None]
    assert current_world() is outer


def test_a_world_is_closed_with_the_error_that_ended_it() -> None:
    world = Plain(spans_process=True)
    error = ValueError("end")
    with pytest.raises(ValueError, match="end"), entered(world):
        raise error
    with entered(world):
        pass
    assert world.closed_with == [error, None]


def test_a_stop_is_heeded_after_the_step_while_training_and_at_once_otherwise() -> None:
    world = Plain(spans_process=False)
    with pytest.raises(KeyboardInterrupt):
        world.ask_to_stop()
    world.step = 0
    world.ask_to_stop()
    assert world.stop_requested.is_set()
    with pytest.raises(KeyboardInterrupt):
        world.ask_to_stop()


def test_a_world_of_one_answers_to_signals_only_while_it_is_open() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    world = AloneWorld()
    world.step = 3
    signal.raise_signal(signal.SIGTERM)
    assert world.stop_requested.is_set()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    world.close()
    world.close()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_terminal_that_closes_asks_once_however_often_it_is_said() -> None:
    world = AloneWorld()
    world.step = 3
    signal.raise_signal(signal.SIGHUP)
    signal.raise_signal(signal.SIGHUP)
    assert world.stop_requested.is_set()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    world.close()


def test_what_the_caller_ignores_stays_ignored_and_others_handlers_stay() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        world = AloneWorld()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        mine = signal.signal(signal.SIGINT, signal.default_int_handler)
        world.close()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert mine is not None
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_world_of_one_can_be_made_outside_the_main_thread() -> None:
    made: list[World] = []
    thread = threading.Thread(target=lambda: made.append(AloneWorld()))
    thread.start()
    thread.join()
    board = made[0].board
    board.set("key", b"value")
    assert board.get("key") == board.wait("key", 0) == b"value"
    with pytest.raises(TimeoutError, match="nobody else could"):
        board.wait("other", 10)
    made[0].close()


def test_threads_are_ranks_with_worlds_of_their_own() -> None:
    def work() -> tuple[int, int, int, int, str | None, str]:
        world = current_world()
        assert world is not None
        told = world.kind, world.plan
        return world.rank, world.size, world.local_rank, world.local_size, told[1], told[0]

    assert launch_threads(work, 3, plan="data(3)") == [
        (rank, 3, rank, 3, "data(3)", "thread") for rank in range(3)
    ]
    assert current_world() is None


def test_what_each_thread_raised_is_in_its_place() -> None:
    def work() -> int:
        world = current_world()
        assert world is not None
        if world.rank:
            raise ValueError(world.rank)
        return 7

    results = launch_threads(work, 3)
    assert results[0] == 7
    assert [type(result) for result in results[1:]] == [ValueError] * 2
    assert first_failure(results) is results[1]
    assert first_failure([LOST, results[2]]) is results[2]
    assert first_failure([1, LOST]) is LOST
    assert first_failure([1, 2]) is None


def test_the_environment_of_torchrun_is_read_with_care(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert not started_by_torchrun()
    monkeypatch.setenv("RANK", "two")
    assert not started_by_torchrun()
    with pytest.raises(UserError, match="RANK: received 'two'; allowed: a whole number"):
        environment_number("RANK", 0)
    assert environment_number("LOCAL_RANK_THAT_IS_NOT_SET", 5) == 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_signals_at_once_ask_once(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    asked: list[None] = []
    give_back = catch_signals(lambda: asked.append(None))
    try:
        for _ in range(2):
            os.kill(os.getpid(), number)
        assert len(asked) == 1
        monkeypatch.setattr("allfuse.launcher.signals.ONCE_S", -1.0)
        os.kill(os.getpid(), number)
        assert len(asked) == 2
    finally:
        give_back()


def test_threads_are_those_that_the_environment_says_or_a_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr("allfuse.launcher.local.count_cores", lambda: 8)
    for said, threads in (("3", 3), ("0", 4), ("many", 4), ("", 4)):
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert threads_each(2) == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert threads_each(2) == 4
