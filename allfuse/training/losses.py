"""What a session tells of the losses that it was taken through."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from allfuse.base.events import Bus
from allfuse.launcher.generation import Lost
from allfuse.plan.loss import group_size

if TYPE_CHECKING:
    from allfuse.training.session import Session


class Losses:
    """Tells of losses: an event, and an entry in the run's record.

    Attributes:
        told: the entries of all by now.
    """

    def __init__(self, session: Session) -> None:
        self.session, self._group = session, group_size(session.place.plan)
        self.told: list[dict[str, Any]] = []

    def tell(self, lost: list[Lost], before: int, redone: bool, seconds: float) -> None:
        """Tell of a loss that was survived.

        Args:
            before: how many there were. redone: the step under way is done again.
        """
        session, place = self.session, self.session.place
        left, rows = place.world.size, self._count_rows() if redone else 0
        more = {"step": session.steps, "left": left, "before": before, "rows_again": rows}
        added = entries(lost, policy="continue", group=self._group, **more)
        self.told += added
        session.keeper.record(losses=self.told)
        self._promote()
        again = f"the step under way is done again with all its {rows} samples" if rows else ""
        if session.rounds.active:
            again = "what it had learned since the last round is lost"
        who = describe(lost, self._group)
        told = [who, f"{left} of {before} workers go on under {place.whole}", again]
        text = "; ".join(part for part in told if part)
        session.bus.emit("lost", text=text, losses=added, seconds=seconds)

    def tell_of_restarts(self) -> None:
        """Tell of the losses after which all workers were started again."""
        again, session = list(self.session.place.world.again), self.session
        folder = session.keeper.folder
        if folder is not None:
            self.told = list(folder.record.get("losses", []))
        if again:
            added = entries(again[-1:], policy="restart", step=session.steps)
            self.told += added
            session.keeper.record(losses=self.told)
            text = f"{again[-1]}; all workers were started again, after step {session.steps}"
            session.bus.emit("lost", text=text, losses=added)

    def _promote(self) -> None:
        """Take over the displays and files of the run, where this is the first rank by now."""
        session = self.session
        if not (session.is_main and session.when_main):
            return
        has_begun = session.teller.began is not None
        shown = Bus(0) if has_begun else session.bus
        for subscribe in session.when_main:
            subscribe(shown)
        session.when_main.clear()
        if has_begun:
            shown.step = session.steps
            shown.emit("start", **{**session.teller.about, "resumed_step": session.steps})
            session.bus.subscribe(shown.forward)

    def _count_rows(self) -> int:
        """Samples of the batch that is learned from again."""
        step = self.session.stepper.current
        if step is None or step.portion is None or step.counted:
            return 0
        return sum(step.portion.shares)


def describe(lost: list[Lost], group: int = 1) -> str:
    """Who was lost, in words; so many ranks in a row leave together.

    >>> describe([Lost(3, "was killed", 0.0)], group=2)
    'rank 3 was killed, and ranks 2 to 3 leave together'
    """
    told = []
    for each in lost:
        ranks = _group_of(each, group)
        more = f", and ranks {ranks[0]} to {ranks[-1]} leave together" if group > 1 else ""
        told.append(f"{each}{more}")
    return ", ".join(told) or "a worker is lost"


def entries(lost: list[Lost], *, group: int = 1, **more: Any) -> list[dict[str, Any]]:
    """What a run's record keeps of losses: one for all ranks that left together."""
    return [{**asdict(each), "ranks": _group_of(each, group), **more} for each in lost]


def _group_of(lost: Lost, group: int) -> list[int]:
    first = lost.worker - lost.worker % group
    return list(range(first, first + group))
