"""How several ranks make one merge: who fuses which tensors, and how the first knows of the others.

    1. rank 0 makes the files and the journal, and says so; the others wait for it
    2. each rank fuses its tensors, checks them, and brings them to the disk; meanwhile it says how
       far it is
    3. rank 0 waits until all have said that they are done, and gives the result its name

What they say to each other are a few bytes at the board; what is fused goes through the file system
that all of them see.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from allfuse.base.errors import PeerLost
from allfuse.merge.outline import Task

if TYPE_CHECKING:
    from allfuse.launcher import World

SAY_S = 0.5
POLL_S = 0.02
READY, DONE = "ready", "done"


def share(tasks: Iterable[Task], ranks: int) -> list[list[Task]]:
    """The tensors of each rank, whole, so that all have nearly as many bytes to read: the largest
    first, each to whom has least."""
    shares: list[list[Task]] = [[] for _ in range(ranks)]
    loads = [0] * ranks

    def size(task: Task) -> int:
        return task.target.bytes + sum(entry.bytes for entry in task.sources)

    for task in sorted(tasks, key=lambda task: (-size(task), task.number)):
        rank = loads.index(min(loads))
        shares[rank].append(task)
        loads[rank] += size(task)
    return [sorted(own, key=lambda task: task.number) for own in shares]


class Together:
    """The ranks of a merge, as one of them sees it.

    Args:
        world: None: there is only this one.
        tell: of rank 0 is told ("merged", bytes=...) of all ranks.
    """

    def __init__(self, world: World | None, tell: Callable[..., Any]) -> None:
        self.rank, self.size = (0, 1) if world is None else (world.rank, world.size)
        self._world, self._tell = world, tell
        self._key = "" if world is None else world.new_key("merge")
        self._bytes, self._blocks, self._next = 0, 0, 0.0
        now = time.monotonic()
        self._heard = dict.fromkeys(range(1, self.size), ("", now))
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Say that the files are there, or wait for that.

        Raises:
            PeerLost: rank 0 did not say so in time.
        """
        if self._world is None:
            return
        if self.rank == 0:
            self._world.board.set(f"{self._key}/0", READY.encode())
            return
        from allfuse.launcher.base import await_word

        await_word(
            self._world.board,
            f"{self._key}/0",
            rank=self.rank,
            peer=0,
            operation="begin the merge",
            reason="did not make the files",
            timeout_s=self._world.timeout_s,
        )

    def told(self, nbytes: int) -> None:
        """A block was written, or, with 0, checked; from any thread."""
        with self._lock:
            self._bytes += nbytes
            self._blocks += 1
            if self.rank == 0 and nbytes:
                self._tell("merged", bytes=nbytes)
            if self.size > 1 and time.monotonic() >= self._next:
                self._next = time.monotonic() + SAY_S
                if self.rank == 0:
                    self._hear()
                else:
                    self._say("at work")

    def end(self) -> None:
        """Say that this rank's tensors are on the disk; rank 0 waits for all others.

        Raises:
            PeerLost: one of them said nothing new for too long.
        """
        if self.rank > 0:
            self._say(DONE)
            return
        while waiting := [r for r, (said, _) in self._heard.items() if not said.endswith(DONE)]:
            with self._lock:
                self._hear()
            self._refuse_silent(waiting)
            time.sleep(POLL_S)

    def _say(self, what: str) -> None:
        assert self._world is not None
        said = f"{self._bytes} {self._blocks} {what}"
        self._world.board.set(f"{self._key}/{self.rank}", said.encode())

    def _hear(self) -> None:
        assert self._world is not None
        for rank, (before, _) in self._heard.items():
            said = (self._world.board.get(f"{self._key}/{rank}") or b"").decode()
            if said != before:
                self._heard[rank] = said, time.monotonic()
                self._tell("merged", bytes=_bytes_of(said) - _bytes_of(before))

    def _refuse_silent(self, ranks: Iterable[int]) -> None:
        assert self._world is not None
        for rank in ranks:
            seconds = time.monotonic() - self._heard[rank][1]
            if seconds > self._world.timeout_s:
                raise PeerLost(
                    "said nothing new; next: the same command goes on where it was",
                    rank=0,
                    peer=rank,
                    operation="wait for its tensors",
                    step=None,
                    seconds=seconds,
                )


def _bytes_of(said: str) -> int:
    return int(said.split()[0]) if said else 0
