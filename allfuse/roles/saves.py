"""Checkpoints: of which versions of the weights they are, and what workers told of those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from allfuse.roles.book import Book
from allfuse.roles.ledger import Ledger
from allfuse.roles.messages import Save
from allfuse.roles.outbox import Outbox
from allfuse.roles.records import Order
from allfuse.split.data import Learned

KEPT = 16
"""Of so many versions that servers wrote to disk it is known what was learned."""


@dataclass
class Asked:
    """A checkpoint that a worker asked for. target: which version it is of, once one is chosen."""

    sequence: int
    done: int
    score: float | None
    messages: list[Save]
    target: int | None = None


class Saves:
    """Matches what workers hand in with the versions that servers write to disk.

    A worker hands in a state that it made from the weights of some version. Where servers were told
    to write that one, as where a save or an evaluation was due, the checkpoint is of just these
    weights, and its score is theirs. Else it is of the next version that is ordered.

    Events: "hold" (sequence: a version that may be asked for soon) and "checkpoint" (versions: the
    one asked for first, then the newest on disk; score, done; messages: see `wrapping`). Each
    version is {sequence, updates, done, whole, learned}: all steps before `whole` were learned
    from, and of later ones the stretches in `learned`.
    """

    def __init__(self, book: Book, outbox: Outbox) -> None:
        self._book, self._outbox = book, outbox
        self._versions: dict[int, dict[str, Any]] = book.get("versions", {})
        self._earlier = Learned(book.get("learned", []))
        self._parcels: dict[str, list[Save]] = {}
        self._asked: list[Asked] = []
        self._done = -1
        self._last: dict[str, Any] | None = None

    @property
    def is_wanted(self) -> bool:
        """Whether the next order is to have servers write."""
        return any(asked.target is None for asked in self._asked)

    @property
    def waiting(self) -> list[int]:
        """After how many batches checkpoints were asked for that servers have not written yet."""
        return [asked.done for asked in self._asked]

    def placed(self, order: Order, ledger: Ledger, *, hold: bool) -> None:
        """An order by which servers write was placed. hold: somebody may ask for it later."""
        whole = ledger.whole
        learned = [*self._earlier.after(whole).plain(), *(list(each) for each in ledger.beyond)]
        self._versions[order.sequence] = {
            "sequence": order.sequence,
            "updates": order.updates,
            "done": ledger.done,
            "whole": whole,
            "learned": learned,
        }
        for sequence in sorted(self._versions)[:-KEPT]:
            del self._versions[sequence]
        self._book.put("versions", self._versions)
        for asked in self._asked:
            if asked.target is None:
                asked.target = order.sequence
        if hold:
            self._outbox.tell("hold", sequence=order.sequence)

    def take(self, worker: str, message: Save, saved: int, *, ended: bool) -> None:
        """A piece of what a worker hands in. Of one number of batches done the first one counts.

        saved: the last version on disk. ended: no other checkpoint will come.
        """
        parcel = self._parcels.setdefault(worker, [])
        if message.piece == 0:
            parcel.clear()
        if message.piece != len(parcel):
            return
        parcel.append(message)
        if len(parcel) < message.pieces:
            return
        del self._parcels[worker]
        if message.done <= self._done and not ended:
            return
        self._done = message.done
        target = message.sequence if message.sequence in self._versions else None
        self._asked.append(Asked(message.sequence, message.done, message.score, parcel, target))
        self.written(saved)

    def written(self, saved: int) -> None:
        """All servers have a version on disk."""
        for asked in list(self._asked):
            if asked.target is not None and asked.target <= saved:
                self._asked.remove(asked)
                self._tell(asked, [asked.target, saved])

    def _tell(self, asked: Asked, sequences: Sequence[int]) -> None:
        versions = [self._versions[n] for n in dict.fromkeys(sequences) if n in self._versions]
        if not versions:
            return
        kept = {**versions[0], "sequence": None}
        if kept == self._last and asked.score is None:
            return  # it is kept already, perhaps with a score
        self._last = kept
        self._outbox.tell(
            "checkpoint",
            versions=versions,
            score=asked.score if versions[0]["sequence"] == asked.target else None,
            done=asked.done,
            messages=asked.messages,
        )
