"""A process that has torch loaded and forks workers.

Why not multiprocessing's forkserver: it leaves a folder in /tmp when its owner is killed, and its
children run the caller's `__main__` again. This one owns nothing but one inherited socket; when the
launcher's end closes, for whatever reason, it kills its workers with all that they started, and
ends.

An order is one byte. FORK carries three file descriptors: the worker's own socket, which brings it
everything else, and what it writes its output to. KILL_ONE is followed by the worker's process id,
4 bytes. Answers are JSON lines, in the order of the forks
{"forked": pid}, and {"exited": pid, "status": status}.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import struct
import sys
import warnings
from typing import Any

from allfuse.launcher.scratch import become_owner, remove_scratch, scratch_of

FORK, KILL, KILL_ONE = b"f", b"k", b"o"
PID = struct.Struct("<i")
PR_SET_PDEATHSIG = 1
PRELOAD = ("torch", "numpy", "safetensors.torch", "allfuse.launcher.worker", "allfuse.link.group")


class Nursery:
    """The zygote's own side: takes orders, and looks after the workers that it forked."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.workers: set[int] = set()
        self._wake, self._waker = os.pipe()
        os.set_blocking(self._waker, False)
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        # Whoever signals every process of a job means the launcher: it decides how the job ends.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)

    def serve(self) -> socket.socket | None:
        """Obey until the launcher's end closes.

        Returns in each forked worker, with its socket; returns None in the zygote itself.
        """
        watched: list[Any] = [self.control, self._wake]
        while True:
            readable, _, _ = select.select(watched, [], [])
            if self._wake in readable:
                os.read(self._wake, 512)
                self._tell_exits()
            if self.control not in readable:
                continue
            order, handles, _, _ = socket.recv_fds(self.control, 1, 3)
            if order == FORK:
                channel = self._fork(handles)
                if channel is not None:
                    return channel
            elif order == KILL:
                self._kill()
            elif order == KILL_ONE:
                self._kill_one()
            else:
                return None

    def _fork(self, handles: list[int]) -> socket.socket | None:
        zygote = os.getpid()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of idle threads that NumPy's BLAS keeps
            pid = os.fork()
        if pid == 0:
            self._become_worker(zygote)
            become_owner(scratch_of(zygote, os.getpid()))
            channel, out, err = handles
            os.dup2(out, 1)
            os.dup2(err, 2)
            os.close(out)
            os.close(err)
            os.set_inheritable(channel, False)
            return socket.socket(fileno=channel)
        for handle in handles:
            os.close(handle)
        _lead_group(pid)
        self.workers.add(pid)
        self._answer({"forked": pid})
        return None

    def _become_worker(self, zygote: int) -> None:
        _lead_group(0)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.close(self._wake)
        os.close(self._waker)
        self.control.close()
        self.workers.clear()
        _die_with(zygote)

    def _answer(self, answer: dict[str, int]) -> None:
        self.control.sendall(json.dumps(answer).encode() + b"\n")

    def _tell_exits(self) -> None:
        while self.workers:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                return
            pid = ended.si_pid
            _kill_group(pid)  # what the worker started and left; its id is not free before waitpid
            remove_scratch(scratch_of(os.getpid(), pid))
            _, status = os.waitpid(pid, 0)
            self.workers.discard(pid)
            self._answer({"exited": pid, "status": os.waitstatus_to_exitcode(status)})

    def _kill(self) -> None:
        for pid in self.workers:
            _kill_group(pid)

    def _kill_one(self) -> None:
        content = self.control.recv(PID.size, socket.MSG_WAITALL)
        if len(content) == PID.size and (pid := PID.unpack(content)[0]) in self.workers:
            _kill_group(pid)

    def end(self) -> None:
        """Kill the workers with all that they started, and wait until they are gone."""
        self._kill()
        for pid in self.workers:
            os.waitpid(pid, 0)
            remove_scratch(scratch_of(os.getpid(), pid))
        self.control.close()


def _lead_group(pid: int) -> None:
    """Put a worker at the head of a process group, to be killed with all that it starts.

    Both sides do it, so that it is done whoever comes first.
    """
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when the zygote dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def main(control: int, preload: list[str]) -> None:
    """Run as the zygote; `control` is the file descriptor of its end of the socket pair."""
    nursery = Nursery(socket.socket(fileno=control))
    for name in (*PRELOAD, *preload):
        __import__(name)
    try:
        channel = nursery.serve()
    except (BrokenPipeError, ConnectionResetError):
        channel = None
    if channel is None:
        nursery.end()
        return
    from allfuse.launcher.worker import work

    work(channel)
