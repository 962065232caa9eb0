"""Ctrl-C and SIGTERM as requests to a world to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from allfuse.launcher.base import World


def catch_signals(world: World) -> Callable[[], None]:
    """Have them ask `world` to stop; call what is returned to give them back.

    Outside the main thread Python allows no handlers, and what the caller ignores (nohup,
    background jobs) stays ignored.
    """
    previous: dict[int, Any] = {}

    def asked(number: int, frame: FrameType | None) -> None:
        world.ask_to_stop()

    def give_back() -> None:
        while previous:
            number, handler = previous.popitem()
            if signal.getsignal(number) is asked:  # else someone has set another one since
                signal.signal(number, handler)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                previous[number] = signal.signal(number, asked)
    return give_back


@contextlib.contextmanager
def asked_to_stop() -> Iterator[socket.socket]:
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
