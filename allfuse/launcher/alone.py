"""A world of one, in the process that asks."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any

from allfuse.launcher.base import World

if TYPE_CHECKING:
    import torch

    from allfuse.link.base import Link


class LocalBoard:
    """A board that one process keeps to itself."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:
        self._values[key] = value

    def get(self, key: str) -> bytes | None:
        return self._values.get(key)

    def wait(self, key: str, timeout_s: float) -> bytes:
        if key not in self._values:
            raise TimeoutError(f"nothing was written under {key!r}, and nobody else could")
        return self._values[key]


class AloneWorld(World):
    """One worker in this process. The first Ctrl-C asks to stop, the second one interrupts."""

    kind = "alone"

    def __init__(self) -> None:
        super().__init__()
        self.board = LocalBoard()
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._ask_to_stop)

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        if self.stop_requested.is_set():
            raise KeyboardInterrupt
        self.stop_requested.set()

    def link(self, name: str, members: tuple[int, ...], device: torch.device) -> Link:
        from allfuse.link.lone import LoneLink

        return LoneLink(members[0])

    def form_replica(self, replica: tuple[int, ...], backend: str) -> None:
        return  # a script that runs alone keeps its own default group, or none

    def close(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
