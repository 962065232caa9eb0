"""A world of one, in the process that asks."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from allfuse.launcher.base import World
from allfuse.launcher.signals import catch_signals

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
    """One worker in this process, which answers to Ctrl-C and SIGTERM while it is open."""

    kind = "alone"

    def __init__(self) -> None:
        super().__init__()
        self.board = LocalBoard()
        self._give_back_signals = catch_signals(self.ask_to_stop)

    def link(
        self,
        name: str,
        members: tuple[int, ...],
        device: torch.device,
        groups: Collection[tuple[int, ...]] = (),
    ) -> Link:
        from allfuse.link.lone import LoneLink

        return LoneLink(members[0])

    def form_replica(self, replica: tuple[int, ...], backend: str) -> None:
        return  # a script that runs alone keeps its own default group, or none

    def close(self, error: BaseException | None = None) -> None:
        self._give_back_signals()
