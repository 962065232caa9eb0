"""Ctrl-C, SIGTERM and SIGHUP (a terminal that closes) as requests to stop."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

ONCE_S = 0.2
"""Two signals of one kind so close together are one: `timeout` sends one to the process, one to its
group. That a terminal closes, both the kernel and the shell say, and is once however far apart."""


def catch_signals(stop: Callable[[], None]) -> Callable[[], None]:
    """Have them call `stop()`; call what is returned to give them back.

    Outside the main thread Python allows no handlers, and what the caller ignores (nohup,
    background jobs) stays ignored.
    """
    previous: dict[int, Any] = {}
    heard_s: dict[int, float] = {}

    def asked(number: int, frame: FrameType | None) -> None:
        now_s, before_s = time.monotonic(), heard_s.get(number)
        heard_s[number] = now_s
        if before_s is None or (number != signal.SIGHUP and now_s - before_s > ONCE_S):
            stop()

    def give_back() -> None:
        while previous:
            number, handler = previous.popitem()
            if signal.getsignal(number) is asked:  # else someone has set another one since
                signal.signal(number, handler)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                previous[number] = signal.signal(number, asked)
    return give_back


@contextlib.contextmanager
def asked_to_stop() -> Iterator[socket.socket]:
    """A socket that becomes readable, a byte for each time that they ask to stop.

    Unlike a KeyboardInterrupt this cannot be lost in the middle of an import.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    def note() -> None:
        with contextlib.suppress(BlockingIOError):
            theirs.send(b"!")

    with ours, theirs:
        give_back = catch_signals(note)
        try:
            yield ours
        finally:
            give_back()
