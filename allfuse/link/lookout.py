"""Who is lost: ranks that share a board watch over each other."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from allfuse.link.base import Board

GRACE_S = 2.0  # how long a roll call waits for answers
POLL_S = 0.2


class Lookout:
    """Finds out which rank is lost, and why.

    Whoever sees a transfer fail raises the alarm on the board. A thread of every rank looks there
    and answers with what its rank is doing. In this order a rank is to blame that
      - the launcher saw die (`lost/<rank>`), or ended for a reason of its own (`gone/<rank>`);
      - gives no answer within `GRACE_S`;
      - ended because it lost a peer itself (`left/<rank>`);
      - answers that it is somewhere else (`here/<rank>`).

    Args:
        host: the rank that dies with the board, if there is one.
        names: what errors call each rank; None: its number.
    """

    def __init__(
        self,
        board: Board,
        rank: int,
        size: int,
        host: int | None = None,
        names: Sequence[int] | None = None,
    ) -> None:
        self.board, self.rank, self.host = board, rank, host
        self.names = tuple(names or range(size))
        self.alarmed = threading.Event()
        self.doing: dict[str, str | int | None] = {}
        self._closed = threading.Event()
        self._has_called = False  # for somebody who is lost
        self._thread: threading.Thread | None = None
        if size > 1:
            self._thread = threading.Thread(target=self._look, name="allfuse-lookout", daemon=True)
            self._thread.start()

    def _look(self) -> None:
        try:
            while not self._closed.wait(POLL_S):
                if self.board.get("alarm") is not None:
                    self.board.set(f"here/{self.rank}", json.dumps(dict(self.doing)).encode())
                    self.alarmed.set()
                    return
        except RuntimeError:  # the store is gone, and so is the run
            self.alarmed.set()

    def close(self, how: str, lost_a_peer: bool) -> None:
        """Leave word how this rank ends, for those who will wait for it in vain.

        Who has lost a peer leaves because of that, whatever its own code makes of the error: others
        whose roll call still goes on are to name the one that was lost, not this one.
        """
        self._closed.set()
        if self._thread is None:
            return
        kind = "left" if lost_a_peer or self._has_called else "gone"
        with contextlib.suppress(RuntimeError):  # the store is gone: there is nobody to tell
            self.board.set(f"{kind}/{self.rank}", how.encode("utf-8", "replace"))
        self._thread.join(timeout=GRACE_S)

    def who_is_lost(
        self,
        members: tuple[int, ...],
        operation: str,
        step: int | None,
        awaited: int | None = None,
    ) -> tuple[int | None, str]:
        """Raise the alarm, hold the roll call; the lost member and why, (None, why) if unknown.

        `awaited` is the only one that was waited for, if there was one: it comes before others that
        may just have finished their work.
        """
        others = [member for member in members if member != self.rank]
        self._has_called = True
        try:
            self.board.set("alarm", str(self.rank).encode())
            answers = self._call_the_roll(others)
        except RuntimeError as error:
            return self.host, f"the board is gone ({first_line(error)})"
        kind, word = answers.get(awaited, ("", "")) if awaited is not None else ("", "")
        if kind in ("lost", "gone", "silent"):
            return awaited, word
        for kind in ("lost", "gone", "silent", "left"):
            for member, (answer, word) in answers.items():
                if answer == kind:
                    return member, word
        for member, (_, word) in answers.items():
            if (elsewhere := _elsewhere(json.loads(word), operation, step)) is not None:
                return member, f"is alive but did not come; it is in {elsewhere}"
        return None, "all peers are alive and wait; is the network between them cut?"

    def _call_the_roll(self, others: list[int]) -> dict[int, tuple[str, str]]:
        """What each rank answers, or others say of it: kind and word."""
        deadline = time.monotonic() + GRACE_S
        while True:
            answers = {member: self._answer(member) for member in others}
            settled = all(kind != "silent" for kind, _ in answers.values())
            if settled or time.monotonic() > deadline:
                return answers
            time.sleep(POLL_S / 4)

    def _answer(self, member: int) -> tuple[str, str]:
        for kind in ("lost", "gone", "left", "here"):
            if (value := self.board.get(f"{kind}/{member}")) is not None:
                return kind, value.decode()
        return "silent", "gave no answer to the roll call"


def _elsewhere(doing: Mapping[str, object], operation: str, step: int | None) -> str | None:
    """Where a rank is, if not in this operation of this step."""
    if doing.get("operation") is None:
        return "its own work"
    if doing["operation"] != operation:
        return str(doing["operation"])
    return None if doing.get("step") == step else f"step {doing.get('step')}"


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
