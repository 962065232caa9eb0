"""The launcher's end of zygotes: one serves one launch at a time, and an idle one is kept warm."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from allfuse.base.errors import WorkerFailed
from allfuse.launcher.zygote import FORK, KILL, KILL_ONE, PID

END_S = 5.0  # how long a zygote may take to kill its workers before it is killed itself

# The same allfuse as here; what lies beside it must not hide the standard library.
BOOT = """
import sys
sys.path.insert(0, sys.argv[1])
import allfuse
sys.path.append(sys.path.pop(0))
from allfuse.launcher.zygote import main
main(int(sys.argv[2]), sys.argv[3:])
"""


class Zygote:
    """A zygote process as its launcher sees it."""

    def __init__(self, preload: Sequence[str] = ()) -> None:
        import allfuse

        root = os.path.dirname(os.path.dirname(os.path.abspath(allfuse.__file__)))
        flags: list[str] = vars(subprocess)["_args_from_interpreter_flags"]()  # -W, -O and the like
        self.control, theirs = socket.socketpair()
        self.has_forked = False
        self._heard = b""
        handle = str(theirs.fileno())
        with theirs:  # -P: modules in the current folder must not hide those that it loads
            self.process = subprocess.Popen(
                [sys.executable, *flags, "-P", "-c", BOOT, root, handle, *preload],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                process_group=0,  # what is sent to the launcher's group is for it to handle
            )
        self.control.setblocking(False)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def fork(self) -> socket.socket:
        """Order a worker, which writes where this process writes; the socket that reaches it."""
        ours, theirs = socket.socketpair()
        with theirs, _outputs() as outputs:
            try:
                socket.send_fds(self.control, [FORK], [theirs.fileno(), *outputs])
            except OSError:
                ours.close()
                raise self.died() from None
        self.has_forked = True
        return ours

    def kill_workers(self) -> None:
        """Order the end of all workers and of what they started. They are heard of as usual."""
        with contextlib.suppress(OSError):
            self.control.send(KILL)

    def kill_worker(self, pid: int) -> None:
        """Order the end of one worker and of what it started."""
        with contextlib.suppress(OSError):
            self.control.send(KILL_ONE + PID.pack(pid))

    def hear(self) -> list[dict[str, Any]] | None:
        """What it said since the last call; None when it has died."""
        try:
            piece = self.control.recv(1 << 16)
        except BlockingIOError:
            return []
        except ConnectionResetError:
            return None
        if not piece:
            return None
        *lines, self._heard = (self._heard + piece).split(b"\n")
        return [json.loads(line) for line in lines]

    def died(self) -> WorkerFailed:
        """The error that says so. Waits for its exit status."""
        from allfuse.launcher.outcome import how_it_ended

        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_S)
        return WorkerFailed(
            f"the process that starts workers {how_it_ended(self.process.poll())}; its workers "
            "ended with it",
            rank=-1,
        )

    def close(self) -> None:
        """End it, with its workers and all that they started."""
        if self.has_forked:
            self.control.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END_S)
        self.process.kill()
        self.process.wait()
        self.control.close()


@contextlib.contextmanager
def _outputs() -> Iterator[list[int]]:
    """Where this process writes now, standard output and error; nowhere where those are closed."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        yield [handle if _is_open(handle) else nowhere for handle in (1, 2)]
    finally:
        os.close(nowhere)


def _is_open(handle: int) -> bool:
    try:
        os.fstat(handle)
    except OSError:
        return False
    return True


_lock = threading.Lock()
_idle: list[Zygote] = []
_busy: list[Zygote] = []


def warm_up(preload: Sequence[str] = ()) -> None:
    """Have a zygote ready. It loads torch while the caller does something else.

    `preload` names further modules to load once for all workers.
    """
    with _lock:
        if not _idle:
            _idle.append(Zygote(preload))


@contextlib.contextmanager
def borrowed() -> Iterator[Zygote]:
    """A zygote for one launch. It is ended, with all workers, when the launch did not end well."""
    with _lock:
        while _idle and not _idle[-1].alive:
            _idle.pop().close()
        zygote = _idle.pop() if _idle else Zygote()
        _busy.append(zygote)
    try:
        yield zygote
    except BaseException:
        _give_back(zygote, keep=False)
        raise
    _give_back(zygote, keep=True)


def _give_back(zygote: Zygote, keep: bool) -> None:
    with _lock:
        _busy.remove(zygote)
        if keep and not _idle and zygote.alive:
            _idle.append(zygote)
            return
    zygote.close()


def _end_all() -> None:
    with _lock:
        while _idle:
            zygote = _idle.pop()
            zygote.has_forked = False  # it has no workers now, so there is nothing to wait for
            zygote.close()


def _forget_all() -> None:
    """In a fork of this process: the zygotes are its parent's, and so are their sockets."""
    global _lock
    _lock = threading.Lock()
    for zygote in (*_idle, *_busy):
        zygote.control.close()
        zygote.process.returncode = 0  # not a child of this process: nothing to wait for
    _idle.clear()
    _busy.clear()


atexit.register(_end_all)
os.register_at_fork(after_in_child=_forget_all)
