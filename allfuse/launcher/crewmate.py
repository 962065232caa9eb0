"""What a process of a crew knows: its role, and where the others are found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from allfuse.base.torch_private import Store
    from allfuse.link.base import Board

WORKER, SERVER, SCHEDULER = "worker", "server", "scheduler"


@dataclass(frozen=True, kw_only=True)
class CrewRequest:
    """What a launcher tells a process of a crew.

    role: "worker", "server" or "scheduler". index: of its role; of a worker: its group. run: names
    the crew at the store. token: the secret of the job. place: of the scheduler, where it is known
    beforehand (a worker that joins). plan: of the whole job.
    """

    role: str
    index: int
    run: str
    plan: str
    token: bytes = field(repr=False)
    place: str | None = None
    local_rank: int = 0
    local_size: int = 1


class Crewmate:
    """A process of a crew.

    Attributes:
        board: of the whole crew on this host.
    """

    def __init__(self, request: CrewRequest, board: Board) -> None:
        self.role, self.index, self.plan = request.role, request.index, request.plan
        self.token, self.board = request.token, board
        self._place = request.place

    @classmethod
    def of(cls, request: CrewRequest, store: Store) -> Crewmate:
        from allfuse.base.torch_private import PrefixStore
        from allfuse.link.group import StoreBoard

        return cls(request, StoreBoard(PrefixStore(request.run, store)))

    def scheduler(self, timeout_s: float) -> str:
        """Where the scheduler is.

        Raises:
            TimeoutError: it did not say so in time.
        """
        return self._place or self.board.wait("scheduler", timeout_s).decode()

    def tell_scheduler(self, place: str) -> None:
        """Let the crew know where the scheduler is, also one that comes again."""
        self.board.set("scheduler", place.encode())

    @property
    def last_scheduler(self) -> str | None:
        """Where a scheduler before this one was."""
        found = self.board.get("scheduler")
        return None if found is None else found.decode()
