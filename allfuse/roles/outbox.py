"""What a state machine has to say, kept until what it rests on is written down."""

from __future__ import annotations

from collections import Counter
from typing import Any, Protocol

from allfuse.roles.messages import Message


class Emit(Protocol):
    """Takes an event: its name and its data."""

    def __call__(self, name: str, /, **data: Any) -> object: ...


class Outbox:
    """Messages by receiver, and events.

    Attributes:
        now_s: the time of what is being handled.
        refused: what came and was not taken, by reason.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self.refused: Counter[str] = Counter()
        self._messages: list[tuple[str, Message]] = []
        self._events: list[tuple[str, dict[str, Any]]] = []

    def send(self, to: str, message: Message) -> None:
        self._messages.append((to, message))

    def tell(self, name: str, /, **data: Any) -> None:
        self._events.append((name, data))

    def empty(self) -> tuple[list[tuple[str, Message]], list[tuple[str, dict[str, Any]]]]:
        """All messages and events, which are then gone from here."""
        both = self._messages, self._events
        self._messages, self._events = [], []
        return both
