"""What a process of a crew knows: its role, and where the others are found."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from allfuse.base.errors import AllfuseError, UserError, WorkerFailed

if TYPE_CHECKING:
    from allfuse.base.torch_private import Store
    from allfuse.link.base import Board
    from allfuse.link.post import Post

WORKER, SERVER, SCHEDULER = "worker", "server", "scheduler"


@dataclass(frozen=True, kw_only=True)
class CrewRequest:
    """What a launcher tells a process of a crew.

    role: "worker", "server" or "scheduler". index: of its role; of a worker: its group. run: names
    the crew at the store. token: the secret of the job. place: of the scheduler, where it is known
    beforehand (a worker that joins). listen: where others may join, and its desks listen. address:
    of this host, where the crew spans several. plan: of the whole job.
    """

    role: str
    index: int
    run: str
    plan: str
    token: bytes = field(repr=False)
    place: str | None = None
    listen: str | None = None
    address: str | None = None
    local_rank: int = 0
    local_size: int = 1


class Crewmate:
    """A process of a crew.

    Attributes:
        board: of the whole crew, or those of it that one launcher started.
    """

    def __init__(self, request: CrewRequest, board: Board, post: Post | None = None) -> None:
        self.role, self.index, self.plan = request.role, request.index, request.plan
        self.token, self.board = request.token, board
        self._place, self._listen, self._post = request.place, request.listen, post
        self._address = request.address

    @classmethod
    def of(cls, request: CrewRequest, store: Store) -> Crewmate:
        from allfuse.base.torch_private import PrefixStore
        from allfuse.link.group import StoreBoard

        return cls(request, StoreBoard(PrefixStore(request.run, store)))

    def post(self) -> Post:
        """What carries letters between the processes of the crew."""
        from allfuse.link.endpoint import Endpoint
        from allfuse.link.wire import Wire

        if self._post is not None:
            return self._post
        address = self._address
        if self._listen is not None:
            address = self._listen.rpartition(":")[0].removeprefix("[").removesuffix("]")
        if address is None:
            joins = self._place is not None
            return Wire(Endpoint(loopback=True, encrypt=joins, token=self.token))
        return Wire(Endpoint(address=address, encrypt=True, token=self.token))

    @property
    def listens_beyond(self) -> bool:
        """Whether others may join."""
        return self._listen is not None

    @property
    def listens_at(self) -> str:
        """Where the scheduler is to listen: where it was before, or was told to, or anywhere."""
        before = self.board.get("scheduler")
        return (self._listen or "") if before is None else before.decode()

    def scheduler(self, timeout_s: float) -> str:
        """Where the scheduler is.

        Raises:
            TimeoutError: it did not say so in time.
        """
        return self._place or self.board.wait("scheduler", timeout_s).decode()

    def tell_scheduler(self, place: str) -> None:
        """Let the crew know where the scheduler is, also one that comes again."""
        self.board.set("scheduler", place.encode())

    def tell_run(self, run: dict[str, Any]) -> None:
        """Let the crew know of the run, in plain values: `folder` is its path, or None."""
        self.board.set("run", json.dumps(run).encode())

    def run(self, timeout_s: float = 0.0) -> dict[str, Any] | None:
        """What was told of the run; None where nothing was, in this time."""
        try:
            found = self.board.wait("run", timeout_s) if timeout_s else self.board.get("run")
        except TimeoutError:
            return None
        return None if found is None else dict(json.loads(found))

    def tell_process(self, name: str) -> None:
        """Let the crew know which process a worker is that has this name."""
        told = {"host": socket.gethostname(), "pid": os.getpid()}
        self.board.set(f"process/{name}", json.dumps(told).encode())

    def end_process(self, name: str) -> None:
        """Kill the process of a worker on this host, whatever it is doing; else nobody would know
        that it will not come to an end. Others, and a thread of this process, are left alone."""
        found = self.board.get(f"process/{name}")
        told = {} if found is None else json.loads(found)
        if told.get("host") == socket.gethostname() and told["pid"] != os.getpid():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(told["pid"], signal.SIGKILL)

    def tell_end(self, failure: AllfuseError | None) -> None:
        """Let the crew know that the scheduler has ended, or why it or a server failed."""
        told = {} if failure is None else {"text": str(failure), "code": failure.exit_code}
        self.board.set("end", json.dumps(told).encode())

    def end(self) -> AllfuseError | Literal[True] | None:
        """How it has ended, as `tell_end` said; None where it goes on."""
        try:
            found = self.board.get("end")
        except RuntimeError as error:
            gone = f"the launcher's store is gone ({type(error).__name__})"
            return WorkerFailed(gone, rank=-1)
        if found is None:
            return None
        told = json.loads(found)
        if not told:
            return True
        if told["code"] == UserError.exit_code:
            return UserError(told["text"])
        return WorkerFailed(told["text"], rank=-1, exit_code=told["code"])
