"""An update on its way from a worker to all servers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from allfuse.roles.messages import SCHEDULER, Ask, Finished, Mail, Message, Staged


@dataclass
class Delivery:
    """What was sent of an update, or of the first weights, and which servers hold all of it.

    fragment: of the weights, that it is of; -1 is all.
    pieces: those that were sent, by (server, piece). births: of the servers that hold all.
    finished: what the scheduler is told then, once all pieces were sent. is_told: it was, of these
    births. was_told: it was, of any.
    """

    lease: int
    clock: int
    sequence: int
    fragment: int = -1
    pieces: dict[tuple[int, int], Message] = field(default_factory=dict)
    births: dict[int, int] = field(default_factory=dict)
    finished: dict[str, Any] | None = None
    is_told: bool = False
    was_told: bool = False

    def restart(self, places: list[str]) -> list[Mail]:
        """It is not known any more who holds it: ask all servers what they lack."""
        self.births.clear()
        self.is_told = False
        return self.ask(places)

    def ask(self, places: list[str]) -> list[Mail]:
        """Ask those that did not say that they hold it."""
        return [
            (place, Ask(lease=self.lease))
            for server, place in enumerate(places)
            if server not in self.births
        ]

    def heard(self, server: int, message: Staged, places: list[str]) -> list[Mail]:
        """A server said what it lacks, which is sent again, or that it lacks nothing."""
        if not message.missing:
            self.births[server] = message.birth
            return [] if self.is_told else self.tell(places)
        self.births.pop(server, None)
        found = [self.pieces.get((server, piece)) for piece in message.missing]
        return [(places[server], piece) for piece in found if piece is not None]

    def tell(self, places: list[str]) -> list[Mail]:
        """Tell the scheduler, once all servers hold all."""
        if self.finished is None or len(self.births) < len(places):
            return []
        self.is_told = self.was_told = True
        births = [self.births[server] for server in range(len(places))]
        finished = Finished(
            lease=self.lease, sequence=self.sequence, births=births, **self.finished
        )
        return [(SCHEDULER, finished)]
