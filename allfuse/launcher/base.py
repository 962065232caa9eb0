"""What a process knows of the world it was started in. Knows nothing of training."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from allfuse.link.base import Board, Link


class World(ABC):
    """The ranks that were started together, as one of them sees it.

    Attributes:
        kind: who started it: "alone", "local", "torchrun" or "thread".
        rank, size: this process among all workers.
        local_rank, local_size: this process among the workers of its host.
        plan: the plan's text that the launcher was given, or None when the script says it.
        stop_requested: set when a person or the launcher asks to stop; the session agrees on the
            step at which all ranks do.
        step: where this rank is, told by the session, for reports of failures.
        has_process_groups: whether a default process group can be made (threads share one process).
    """

    kind: str = "alone"
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    plan: str | None = None
    step: int | None = None
    timeout_s: float = 300.0
    has_process_groups: bool = True
    board: Board

    def __init__(self) -> None:
        self.stop_requested = threading.Event()

    @abstractmethod
    def link(self, name: str, members: tuple[int, ...], device: torch.device) -> Link:
        """A link to these ranks; all of them must ask for it, in the same order."""

    @abstractmethod
    def form_replica(self, replica: tuple[int, ...], backend: str) -> None:
        """Make the default process group over the ranks of one replica."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the world holds. Waits for nobody."""


_current: contextvars.ContextVar[World | None] = contextvars.ContextVar("world", default=None)


def current_world() -> World | None:
    """The world that the launcher of this process (or thread) set, else None."""
    return _current.get()


@contextlib.contextmanager
def entered(world: World) -> Iterator[World]:
    """Make this the current world of the running thread, and close it at the end."""
    token = _current.set(world)
    try:
        yield world
    finally:
        _current.reset(token)
        world.close()
