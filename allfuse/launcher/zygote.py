"""A process that has torch loaded and forks workers: `python -m allfuse.launcher.zygote`.

Why not multiprocessing's forkserver: it leaves a folder in /tmp when its owner is killed, and its
children run the caller's `__main__` again. This one owns nothing but one inherited socket; when the
launcher's end closes, for whatever reason, it kills its children and ends.

Requests are JSON lines with the worker's own socket attached as a file descriptor; answers are JSON
lines {"forked": index, "pid": pid} and {"exited": index, "status": status}.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import sys
from typing import Any

PR_SET_PDEATHSIG = 1
PRELOAD = ("torch", "numpy", "safetensors.torch")


def serve(control: socket.socket) -> tuple[socket.socket, dict[str, Any]] | None:
    """Fork on request until the launcher's end closes.

    Returns in each forked worker, with its socket and its request; returns None in the zygote.
    """
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the launcher's to handle
    children: dict[int, int] = {}
    watched: list[Any] = [control, wake_read]
    try:
        while True:
            readable, _, _ = select.select(watched, [], [])
            if wake_read in readable:
                os.read(wake_read, 512)
                _tell_exits(control, children)
            if control not in readable:
                continue
            message, handles, _, _ = socket.recv_fds(control, 1 << 20, 1)
            if not message:
                return None
            request = json.loads(message)
            zygote = os.getpid()
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                os.close(wake_read)
                os.close(wake_write)
                control.close()
                children.clear()
                _die_with(zygote)
                return socket.socket(fileno=handles[0]), request
            os.close(handles[0])
            children[pid] = request["index"]
            control.sendall(json.dumps({"forked": request["index"], "pid": pid}).encode() + b"\n")
    except (BrokenPipeError, ConnectionResetError):
        return None
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)


def _tell_exits(control: socket.socket, children: dict[int, int]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        index = children.pop(pid, None)
        if index is not None:
            answer = {"exited": index, "status": os.waitstatus_to_exitcode(status)}
            control.sendall(json.dumps(answer).encode() + b"\n")


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when the zygote dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    for name in (*PRELOAD, *sys.argv[2:]):
        __import__(name)
    found = serve(control)
    if found is not None:
        from allfuse.launcher.worker import work

        work(*found)


if __name__ == "__main__":
    main()
