"""Workers as processes of this machine, forked from a zygote that has torch loaded."""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from allfuse.base.errors import Interrupted, UserError
from allfuse.launcher.channel import Channel
from allfuse.launcher.outcome import Failure, Outcome, how_it_ended, judge
from allfuse.launcher.zygotes import Zygote, borrowed, warm_up

__all__ = ["count_cores", "launch_local", "warm_up"]

GRACE_S = 4.0  # how long the others may take to end by themselves after the first failure


def launch_local(
    function: Callable[[], Any],
    workers: int,
    *,
    plan: str | None = None,
    threads: int | None = None,
    timeout_s: float = 300.0,
) -> Any:
    """Run `function()` in `workers` fresh processes of this machine; what rank 0 returned.

    The function travels by cloudpickle, so functions of `__main__`, closures and notebooks work.
    Each worker computes with `threads` threads (cores / workers unless set). Workers lead process
    groups of their own; whatever they started and left ends with them.

    Raises:
        UserError: the function or its result cannot be pickled, or a worker raised one.
        WorkerFailed: a worker failed or was killed; the others have ended, within 5 s.
        Interrupted: Ctrl-C. Training ends after its step; what does not train is interrupted at
            once; a second Ctrl-C kills.
    """
    if workers < 1:
        raise UserError(f"workers: received {workers}; allowed: 1 or more")
    folder = _current_folder()
    warm_up()
    packed = _pack_function(function)
    from allfuse.base.torch_private import PrefixStore
    from allfuse.launcher.worker import Request

    store, run = _open_store(), uuid.uuid4().hex
    bodies = [
        pickle.dumps(
            Request(
                rank=rank,
                size=workers,
                run=run,
                port=store.port,
                plan=plan,
                threads=threads or max(1, count_cores() // workers),
                timeout_s=timeout_s,
                folder=folder,
                environment={**os.environ, **_facts(rank, workers, store.port)},
                path=list(sys.path),
                command=list(sys.argv),
            )
        )
        for rank in range(workers)
    ]
    _flush_output()
    board = PrefixStore(run, store)
    with _asked_to_stop() as signals, borrowed() as zygote:
        watch = Watch(zygote, signals, lambda rank, how: board.set(f"lost/{rank}", how))
        try:
            for body in bodies:
                watch.start(body, packed)
            watch.until_all_ended()
        finally:
            watch.close()
    return judge(watch.outcomes, interrupted=watch.stops > 0)


def count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _facts(rank: int, workers: int, port: int) -> dict[str, str]:
    """What torchrun tells a process, for scripts that call init_process_group() themselves."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(workers),
        "LOCAL_WORLD_SIZE": str(workers),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _current_folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        raise UserError(
            "the current folder is gone, so workers cannot start in it; next: cd to one that exists"
        ) from None


def _pack_function(function: Callable[[], Any]) -> bytes:
    import cloudpickle

    try:
        return bytes(cloudpickle.dumps(function))
    except Exception as error:
        raise UserError(
            f"the function cannot be sent to worker processes: {type(error).__name__}: {error}; "
            "allowed: functions whose captured values can be pickled; next: create locks, files "
            "and generators inside the function"
        ) from None


def _open_store() -> Any:
    """A store that only this host can reach; by itself torch's would listen on all its networks."""
    from allfuse.base.torch_private import TCPStore

    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    handle = listener.detach()  # the store closes it
    return TCPStore("127.0.0.1", port, None, True, wait_for_workers=False, master_listen_fd=handle)


def _flush_output() -> None:
    """What was printed before the launch comes before what the workers print."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[socket.socket]:
    """A socket that becomes readable, a byte for each time, when Ctrl-C or SIGTERM asks to stop.

    Signals reach the main thread only; a launch from another one goes on. What the caller ignores
    stays ignored (nohup, background jobs).
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    previous: dict[int, Any] = {}

    def asked(number: int, frame: Any) -> None:
        with contextlib.suppress(BlockingIOError):
            theirs.send(b"!")

    with ours, theirs:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    previous[number] = signal.signal(number, asked)
        try:
            yield ours
        finally:
            while previous:
                signal.signal(*previous.popitem())


class Watch:
    """Looks after the workers of one launch until all have ended. Nothing here waits for one."""

    def __init__(
        self, zygote: Zygote, signals: socket.socket, tell_lost: Callable[[int, str], None]
    ) -> None:
        self.zygote, self.signals, self.tell_lost = zygote, signals, tell_lost
        self.outcomes: list[Outcome] = []
        self.channels: list[Channel] = []
        self.stops = 0
        self.deadline: float | None = None
        self._pids: list[int] = []  # in the order of the forks, which is that of the ranks
        self._failures = 0
        self._selector = selectors.DefaultSelector()
        self._selector.register(zygote.control, selectors.EVENT_READ, self._hear_zygote)
        self._selector.register(signals, selectors.EVENT_READ, self._stop)

    def start(self, request: bytes, function: bytes) -> None:
        """Fork the next worker and put its work in line."""
        channel, outcome = Channel(self.zygote.fork()), Outcome(len(self.outcomes))
        self.channels.append(channel)
        self.outcomes.append(outcome)
        channel.post(request)
        channel.post(function)
        self._selector.register(
            channel.end,
            selectors.EVENT_READ | selectors.EVENT_WRITE,
            lambda: self._exchange(channel, outcome),
        )

    def until_all_ended(self) -> None:
        while any(outcome.status is None for outcome in self.outcomes):
            left = None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
            for key, _ in self._selector.select(left):
                key.data()
            if self.deadline is not None and time.monotonic() >= self.deadline:
                self._kill()

    def close(self) -> None:
        for channel in self.channels:
            channel.close()
        self._selector.close()

    def _exchange(self, channel: Channel, outcome: Outcome) -> None:
        channel.push()
        self._take(channel, outcome)
        if channel.closed:
            self._selector.unregister(channel.end)
        elif not channel.has_outgoing:
            self._selector.modify(
                channel.end, selectors.EVENT_READ, lambda: self._exchange(channel, outcome)
            )

    def _take(self, channel: Channel, outcome: Outcome) -> None:
        from allfuse.launcher.worker import DONE

        for report in channel.pull():
            if report[:1] == DONE:
                outcome.result = report[1:]
            else:
                outcome.failure = pickle.loads(report[1:])  # noqa: S301  our own worker
                self._note_failure(outcome)

    def _hear_zygote(self) -> None:
        answers = self.zygote.hear()
        if answers is None:
            raise self.zygote.died()
        for answer in answers:
            if "forked" in answer:
                self._pids.append(answer["forked"])
            else:
                rank = self._pids.index(answer["exited"])
                self._has_ended(self.channels[rank], self.outcomes[rank], answer["status"])

    def _has_ended(self, channel: Channel, outcome: Outcome, status: int) -> None:
        outcome.status = status
        self._take(channel, outcome)  # what it had still sent
        if outcome.result is None and outcome.failure is None:
            self.tell_lost(outcome.rank, how_it_ended(status))
            self._note_failure(outcome)

    def _note_failure(self, outcome: Outcome) -> None:
        """Of the first one: the others notice by themselves, and have a short time for it."""
        outcome.order = self._failures
        self._failures += 1
        failure: Failure | None = outcome.failure
        as_asked = failure is not None and failure.exit_code == Interrupted.exit_code
        if self.deadline is None and not (as_asked and self.stops):
            self.deadline = time.monotonic() + GRACE_S

    def _stop(self) -> None:
        """Pass on that a person or a supervisor asks to stop; the second time, kill."""
        from allfuse.launcher.worker import STOP

        self.stops += len(self.signals.recv(16))
        if self.stops > 1:
            self._kill()
            return
        for channel in self.channels:
            channel.post(STOP)
            channel.push()

    def _kill(self) -> None:
        for outcome in self.outcomes:
            outcome.killed_here |= outcome.status is None
        self.deadline = None
        self.zygote.kill_workers()
