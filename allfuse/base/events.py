"""What happened, told once. Code that does work emits events; only `observe/` renders them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Sink = Callable[["Event"], None]


@dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that happened.

    `name` is one word ("step", "evaluated", "saved", "note", "warning", ...), `time` seconds since
    the epoch, `rank` who tells it, `step` the optimizer steps done so far, `data` plain values.
    """

    name: str
    time: float
    rank: int
    step: int
    data: Mapping[str, Any] = field(default_factory=dict)


class Bus:
    """Hands each event to every sink that asked for its name, in the order of subscription."""

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.step = 0
        self._sinks: list[tuple[Sink, frozenset[str] | None]] = []

    def subscribe(self, sink: Sink, names: Iterable[str] | None = None) -> None:
        """Call `sink(event)` for the events of these names; None means all of them."""
        self._sinks.append((sink, None if names is None else frozenset(names)))

    def wants(self, name: str) -> bool:
        """Whether anyone listens, for events that are costly to make."""
        return any(names is None or name in names for _, names in self._sinks)

    def emit(self, name: str, **data: Any) -> None:
        if not self.wants(name):
            return
        event = Event(name=name, time=time.time(), rank=self.rank, step=self.step, data=data)
        self.forward(event)

    def forward(self, event: Event) -> None:
        """Hand on an event, which may come from another bus."""
        for sink, names in tuple(self._sinks):  # who subscribes meanwhile hears the next one
            if names is None or event.name in names:
                sink(event)
