"""How those who are left meet again after a loss."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from allfuse.base.errors import PeerLost
from allfuse.launcher.generation import Generation

if TYPE_CHECKING:
    from allfuse.link.base import Board

SOON_S = 3.0  # within which the launcher tells of a death that it sees itself
POLL_S = 0.005


def key_of(number: int) -> str:
    """Where a launcher tells of a generation."""
    return f"generation/{number}"


def place_of(worker: int) -> str:
    """Where a worker tells that it has come to its generation."""
    return f"met/{worker}"


def prefix_of(run: str, number: int) -> str:
    """Under which the ranks of a generation meet at a launcher's store; of the first: the run's,
    where the launcher tells of the others."""
    return run if number == 0 else f"{run}/{number}"


class Meeting:
    """One worker's way from its generation into the next in which all have come.

    Phases, over the boards alone:
      1. wait until the launcher tells of the next generation. If it does not, nobody has died: the
         one who did not answer is named to the launcher, which ends it.
      2. tell the others of that generation that this one has come, and wait for them. Who does not
         come in time is named, too. Whenever there is a newer generation, begin again there.

    Args:
        worker: this one, by the rank that it was started with.
        root: where the launcher tells of generations.
        board_of: that of a generation.
        accuse: names to the launcher (the number of the generation, a worker that is silent).
        timeout_s: how long each phase waits for somebody who lives.
    """

    def __init__(
        self,
        worker: int,
        root: Board,
        board_of: Callable[[int], Board],
        accuse: Callable[[int, int], None],
        timeout_s: float,
    ) -> None:
        self.worker, self.root, self.board_of = worker, root, board_of
        self.accuse, self.timeout_s = accuse, timeout_s

    def attend(self, number: int, error: PeerLost | None) -> list[Generation]:
        """The generations after `number`, up to the one that has met.

        Raises:
            PeerLost: `error`, or one like it: none has, in time. The last generation has no member
                where the launcher lets nobody go on; nobody waits there.
        """
        passed = self._after(number, error)
        while passed[-1].members and self.worker in passed[-1].members:
            silent = self._wait_for_all(passed[-1])
            if silent is None:
                break
            if silent >= 0:
                self.accuse(passed[-1].number, silent)
                lost = self.lost(silent, "did not come", self.timeout_s)
                passed += self._wait_after(passed[-1].number, self.timeout_s, lost)
            passed += self._newer(passed[-1].number)
        return passed

    def _after(self, number: int, error: PeerLost | None) -> list[Generation]:
        if error is None or error.peer is None:
            return self._wait_after(number, SOON_S, error)
        try:
            return self._wait_after(number, SOON_S, error)
        except PeerLost:
            self.accuse(number, error.peer)
        return self._wait_after(number, self.timeout_s, error)

    def _newer(self, number: int) -> list[Generation]:
        """What the launcher has told beyond a generation."""
        found: list[Generation] = []
        while (content := self.root.get(key_of(number + len(found) + 1))) is not None:
            found.append(Generation.of(content))
        return found

    def _wait_after(self, number: int, seconds: float, error: PeerLost | None) -> list[Generation]:
        deadline = time.monotonic() + seconds
        while not (found := self._newer(number)):
            if time.monotonic() > deadline:
                raise error or self.lost(None, "nobody told of one", seconds)
            time.sleep(POLL_S)
        return found

    def _wait_for_all(self, generation: Generation) -> int | None:
        """None once all have come; -1 if there is a newer generation; else who did not come."""
        board = self.board_of(generation.number)
        board.set(place_of(self.worker), b"")
        missing = [member for member in generation.members if member != self.worker]
        deadline = time.monotonic() + self.timeout_s
        while True:
            missing = [member for member in missing if board.get(place_of(member)) is None]
            if not missing:
                return None
            if self.root.get(key_of(generation.number + 1)) is not None:
                return -1
            if time.monotonic() > deadline:
                return missing[0]
            time.sleep(POLL_S)

    def lost(self, peer: int | None, reason: str, seconds: float = 0.0) -> PeerLost:
        """The error that says so."""
        return PeerLost(
            reason,
            rank=self.worker,
            peer=peer,
            operation="meeting again after a loss",
            step=None,
            seconds=seconds,
        )
