"""Workers as processes of this machine, forked from a zygote that has torch loaded."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from allfuse.base.errors import Interrupted, UserError, WorkerFailed
from allfuse.launcher.worker import receive_message, send_message

GRACE_S = 5.0  # how long the others may take to end after the first failure
START_S = 120.0


@dataclass
class Child:
    """A worker as its launcher sees it: alive until `status` is known."""

    index: int
    channel: socket.socket
    pid: int | None = None
    status: int | None = None
    result: Any = None
    done: bool = False
    failure: dict[str, Any] | None = None
    closed: bool = field(default=False)


class Zygote:
    """The launcher's end of a zygote process; starts it, and ends it with its children."""

    def __init__(self, preload: Sequence[str] = ()) -> None:
        self.control, theirs = socket.socketpair()
        module = "allfuse.launcher.zygote"
        command = [sys.executable, "-m", module, str(theirs.fileno()), *preload]
        self.process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=_with_path()
        )
        theirs.close()
        self.buffer = b""

    def fork(self, request: dict[str, Any]) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self.control, [json.dumps(request).encode()], [theirs.fileno()])
            except BrokenPipeError:
                raise WorkerFailed("the process that starts workers has died", -1) from None
        return ours

    def answers(self) -> Iterator[dict[str, Any]]:
        """What the zygote said since the last call; a closed zygote ends with {"closed": True}."""
        piece = self.control.recv(1 << 16)
        if not piece:
            yield {"closed": True}
        self.buffer += piece
        *lines, self.buffer = self.buffer.split(b"\n")
        for line in lines:
            yield json.loads(line)

    def close(self) -> None:
        self.control.close()
        self.process.wait()


_zygote: Zygote | None = None
_zygote_lock = threading.Lock()


def warm_up(preload: Sequence[str] = ()) -> Zygote:
    """Start the zygote if it does not run yet. It then loads torch while the caller does else.

    `preload` names further modules to load once for all workers.
    """
    global _zygote
    with _zygote_lock:
        if _zygote is None or _zygote.process.poll() is not None:
            if _zygote is None:
                atexit.register(_end_zygote)
            _zygote = Zygote(preload)
        return _zygote


def _end_zygote() -> None:
    global _zygote
    if _zygote is not None:
        _zygote.close()
        _zygote = None


def _with_path() -> dict[str, str]:
    """This environment, in which `import allfuse` finds the same package."""
    import allfuse

    root = os.path.dirname(os.path.dirname(os.path.abspath(allfuse.__file__)))
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(
        part for part in (root, environment.get("PYTHONPATH")) if part
    )
    return environment


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
    Each worker computes with `threads` threads (cores / workers unless set).

    Raises:
        UserError: the function cannot be pickled, or a worker raised one.
        WorkerFailed: a worker failed or was killed; the others have ended, within 5 s.
        Interrupted: Ctrl-C; the workers saved what they could.
    """
    if workers < 1:
        raise UserError(f"workers: received {workers}; allowed: 1 or more")
    zygote = warm_up()
    import cloudpickle

    try:
        cloudpickle.dumps(function)
    except Exception as error:
        raise UserError(
            f"the function cannot be sent to worker processes: {type(error).__name__}: {error}; "
            "allowed: functions whose captured values can be pickled; next: create locks, files "
            "and generators inside the function"
        ) from None
    from allfuse.base.torch_private import PrefixStore, TCPStore

    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    run = uuid.uuid4().hex
    children = []
    for index in range(workers):
        request = {
            "index": index,
            "workers": workers,
            "port": store.port,
            "run": run,
            "plan": plan,
            "threads": threads or max(1, count_cores() // workers),
            "timeout_s": timeout_s,
            "folder": os.getcwd(),
            "environment": dict(os.environ),
            "path": sys.path,
            "command": sys.argv,
        }
        children.append(Child(index, zygote.fork(request)))
    for child in children:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            send_message(child.channel, function)
    watch = Watch(zygote, children, PrefixStore(run, store))
    return watch.until_all_ended()


def count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Watch:
    """Waits for the children of one launch, passes on requests to stop, and judges how it ended."""

    def __init__(self, zygote: Zygote, children: list[Child], store: Any) -> None:
        self.zygote, self.children, self.store = zygote, children, store
        self.selector = selectors.DefaultSelector()
        self.selector.register(zygote.control, selectors.EVENT_READ, None)
        for child in children:
            self.selector.register(child.channel, selectors.EVENT_READ, child)
        self.deadline: float | None = None
        self.interrupts = 0

    def until_all_ended(self) -> Any:
        previous = self._catch_signals()
        try:
            while any(child.status is None for child in self.children):
                self._step()
                if self.deadline is not None and time.monotonic() > self.deadline:
                    self._kill()
        finally:
            self._kill()
            for number, handler in previous.items():
                signal.signal(number, handler)
            for child in self.children:
                child.channel.close()
            self.selector.close()
        return self._judge()

    def _catch_signals(self) -> dict[int, Any]:
        if threading.current_thread() is not threading.main_thread():
            return {}

        def ask(number: int, frame: Any) -> None:
            self.interrupts += 1
            if self.interrupts == 1:
                for child in self.children:
                    with contextlib.suppress(OSError):
                        send_message(child.channel, "stop")
            else:
                self.deadline = time.monotonic()

        return {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def _step(self) -> None:
        for key, _ in self.selector.select(timeout=0.5):
            child = key.data
            if child is None:
                for answer in self.zygote.answers():
                    self._hear(answer)
                continue
            message = receive_message(child.channel)
            if message is None:
                self.selector.unregister(child.channel)
            elif message[0] == "done":
                child.done, child.result = True, message[1]
            else:
                child.failure = message[1]
                self._begin_ending()

    def _hear(self, answer: dict[str, Any]) -> None:
        if "closed" in answer:
            self.selector.unregister(self.zygote.control)
            for child in self.children:
                child.status = -signal.SIGKILL if child.status is None else child.status
        elif "pid" in answer:
            self._child(answer["forked"]).pid = answer["pid"]
        else:
            child = self._child(answer["exited"])
            child.status = answer["status"]
            if not child.done:
                self._drain(child)
            if not child.done and child.failure is None:
                self.store.set(f"lost/{child.index}", how_it_ended(child.status))
                self._begin_ending()

    def _drain(self, child: Child) -> None:
        """Take what the child had still sent before it ended."""
        child.channel.setblocking(True)
        child.channel.settimeout(1.0)
        with contextlib.suppress(OSError):
            message = receive_message(child.channel)
            if message is not None and message[0] == "failed":
                child.failure = message[1]
            elif message is not None:
                child.done, child.result = True, message[1]

    def _child(self, index: int) -> Child:
        return self.children[index]

    def _begin_ending(self) -> None:
        """The first failure: the others notice by themselves, and have a short time for it."""
        if self.deadline is None and not self.interrupts:
            self.deadline = time.monotonic() + GRACE_S

    def _kill(self) -> None:
        for child in self.children:
            if child.status is None and child.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL)

    def _judge(self) -> Any:
        failed = [child for child in self.children if not child.done]
        if not failed:
            import pickle

            return pickle.loads(self.children[0].result)  # noqa: S301  our own child
        told = [child for child in failed if child.failure is not None]
        causes = [c for c in told if c.failure is not None and not c.failure["peer_lost"]]
        killed = [child for child in failed if child.failure is None]
        if self.interrupts and not any(_unexpected(child) for child in causes):
            text = causes[0].failure["text"] if causes and causes[0].failure else "interrupted"
            raise Interrupted(text)
        if causes:
            raise _cause(causes[0])
        lines = [f"rank {child.index} {how_it_ended(child.status or 0)}" for child in killed]
        lines += [child.failure["text"] for child in told if child.failure is not None]
        first = killed[0].index if killed else told[0].index
        raise WorkerFailed("\n".join(lines), first)


def _unexpected(child: Child) -> bool:
    return child.failure is not None and child.failure["exit_code"] != Interrupted.exit_code


def _cause(child: Child) -> Exception:
    """The error to raise here for what a worker raised there."""
    failure = child.failure or {}
    if failure["exit_code"] == UserError.exit_code and failure["expected"]:
        return UserError(failure["text"])
    if failure["exit_code"] == Interrupted.exit_code and failure["expected"]:
        return Interrupted(failure["text"])
    where = "before the first step" if failure["step"] is None else f"at step {failure['step']}"
    name = "" if failure["expected"] else f"{failure['type']}: "
    message = f"rank {child.index} failed {where}: {name}{failure['text']}"
    trace = "" if failure["expected"] else failure["trace"]
    return WorkerFailed(message, child.index, trace, failure["exit_code"])


def how_it_ended(status: int) -> str:
    """An exit status as people say it.

    >>> how_it_ended(-9)
    'was killed by SIGKILL'
    """
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with exit code {status} and no word why"
