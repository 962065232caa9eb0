"""The thread that reads the sockets of a socket link."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from typing import Protocol

import zmq


class Attended(Protocol):
    """What the carrier looks after, under the lock.

    `attend` takes one message in and says whether there may be more; when `over`, it is closed.
    """

    socket: zmq.Socket[bytes]
    over: bool

    def attend(self) -> bool: ...

    def close(self) -> None: ...


class Carrier:
    """Waits for sockets without the lock, and attends to them with it.

    ZeroMQ's sockets may be used by any thread, but by one at a time: so whoever sends does so
    itself, under the lock, and is spared a change of threads. What this thread waits for are the
    sockets' file descriptors, which any thread may. They tell of a change once; who uses up that
    signal with a call of its own says so by `nudge`.

    Args:
        failed: told of an error that was not foreseen; then nothing is attended to any more.
    """

    def __init__(self, name: str, lock: threading.Condition, failed: Callable[[str], None]) -> None:
        self.lock, self._failed = lock, failed
        self._attended: dict[int, Attended] = {}
        self._ready: dict[Attended, None] = {}  # in the order in which they got ready
        self._sleeper, self._waker = os.pipe()
        self._stopping = False
        self._poll = select.poll()
        self._poll.register(self._sleeper, select.POLLIN)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, attended: Attended) -> None:
        """Before the start."""
        handle = int(attended.socket.get(zmq.FD))
        self._attended[handle] = attended
        self._ready[attended] = None
        self._poll.register(handle, select.POLLIN)

    def nudge(self, attended: Attended) -> None:
        """Look at it, even if its descriptor says nothing. Under the lock."""
        if attended not in self._ready and not self._stopping:
            self._ready[attended] = None
            if threading.current_thread() is not self._thread:
                os.write(self._waker, b"n")

    def stop(self) -> None:
        """Close all that is attended to, and end. Returns when it has."""
        with self.lock:
            if self._stopping:
                return
            self._stopping = True
            os.write(self._waker, b"s")
        if self._thread.ident is not None:
            self._thread.join()
        for attended in self._attended.values():
            attended.close()
        self._attended.clear()
        self._ready.clear()
        os.close(self._sleeper)
        os.close(self._waker)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        except Exception as error:  # else all who wait would wait until the deadline
            with self.lock:
                self._failed(f"{type(error).__name__}: {error}")

    def _turn(self) -> None:
        """Wait for something, and take one message from each that has some."""
        events = self._poll.poll(0 if self._ready else None)
        with self.lock:
            for handle, _ in events:
                if handle == self._sleeper:
                    os.read(handle, 4096)
                else:
                    self._ready[self._attended[handle]] = None
            ready = list(self._ready)
        for attended in ready:
            with self.lock:
                if self._stopping:
                    return
                del self._ready[attended]
                if attended.attend():
                    self._ready[attended] = None
                if attended.over:
                    self._forget(attended)

    def _forget(self, attended: Attended) -> None:
        handle = next(h for h, held in self._attended.items() if held is attended)
        del self._attended[handle]
        self._ready.pop(attended, None)
        self._poll.unregister(handle)
        attended.close()
