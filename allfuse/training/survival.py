"""Takes a session through the loss of replicas: those that are left do again what was under way.

What ranks do together comes in *sections*, in the same order on all: the fusions of a step (with
the optimizer's step), a round of the sites, an evaluation. A section needs all of its ranks, so
that of two survivors one is at most one section ahead. After a loss those that are behind take
what the section came to from one that is ahead; the section that none has ended all do again,
among themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from allfuse.base.errors import DataError, PeerLost
from allfuse.base.events import Bus
from allfuse.base.tensors import map_nest
from allfuse.launcher.generation import Lost
from allfuse.split.data import Stream
from allfuse.training.exchange import Figures
from allfuse.training.loading import refuse_unequal
from allfuse.training.recovery import Among, Ended, Handed, Recovery, describe, entries

if TYPE_CHECKING:
    from allfuse.split.data import Portion, Source
    from allfuse.training.learner import Learner
    from allfuse.training.session import Session

T = TypeVar("T")


class Survive(Protocol):
    """Carries a round through losses: see `Survival.round`."""

    def __call__(
        self,
        work: Callable[[], T],
        *,
        tell: Callable[[T], Any],
        hear: Callable[[Handed], T],
        mixes: bool,
    ) -> T | None: ...


class Survival:
    """Runs the sections of a session, through losses where its world goes on.

    Each must wait for all of its ranks, or the count of who is behind would be wrong.
    """

    def __init__(self, session: Session) -> None:
        self.session, self.place = session, session.place
        self.active = self.place.world.goes_on and session.apart is None
        self.recovery = Recovery(session)
        self.losses: list[dict[str, Any]] = []

    def take_part(self) -> None:
        """Have what ranks do together go through losses."""
        course, rounds = self.session.course, self.session.rounds
        agree, fetch = course.agree, course.next_portion
        course.agree = lambda wish: self.together("all", lambda: agree(wish))
        course.fetched = lambda: self.fetch(fetch)
        rounds.survive = self.round

    def together(
        self,
        among: Among,
        work: Callable[[], T],
        *,
        again: Callable[[], None] = lambda: None,
        tell: Callable[[T], Any] = lambda result: result,
        hear: Callable[[Handed], T] = lambda handed: handed.result,
        give: Callable[[], Any] = lambda: None,
    ) -> T:
        """Do something with the others; after a loss do it again with those that are left.

        Args:
            again: prepares to do it again, after what was begun is undone.
            tell, hear: make of the result plain values for a rank that has missed the end, and of
                those the result again.
            give: the state that goes with them.
        """
        if not self.active:
            return work()
        is_again = False
        while True:
            undo = self._mark(among)
            try:
                if is_again:
                    again()
                result = work()
            except PeerLost as error:
                handed = self.recovery.run(error, among, undo)
                if handed is None:
                    is_again = True
                    continue
                result = hear(handed)
            last = self.recovery.ended[among]
            self.recovery.ended[among] = Ended(last.count + 1, tell(result), give)
            return result

    def leave_together(self, last: Callable[[], None]) -> None:
        """Do what is done last. Nobody leaves while another may need what the last step came to."""

        def work() -> None:
            last()
            if self.active:
                nothing = torch.zeros(1, device=self.place.device)
                self.place.everyone.all_reduce(nothing, "end together").wait()

        self.together("all", work)

    def compare(self, fingerprint: str, message: str) -> None:
        """Refuse what differs from rank to rank. Raises DataError, on all alike."""
        self.together("all", lambda: refuse_unequal(fingerprint, self.place, message))

    def agree(self, find: Callable[[], int]) -> int:
        """A number that the first rank finds for all."""

        def work() -> int:
            link = self.place.everyone
            found = torch.zeros(1, dtype=torch.int64, device=self.place.device)
            if self.place.rank == 0:
                found.fill_(find())
            link.broadcast(found, "agree on the checkpoint").wait()
            return int(found)

        return self.together("all", work)

    def step(
        self, learner: Learner, work: Callable[[], Figures | None], again: Callable[[], None]
    ) -> Figures | None:
        """The section of one optimizer's step, where others have a part of its batch."""
        if self.place.data.size == 1:
            return work()

        def hear(handed: Handed) -> Figures | None:
            figures = None if handed.result is None else Figures(**handed.result)
            self.session.stepper.hear_of(learner, figures)
            return figures

        return self.together(
            "data",
            work,
            again=again,
            tell=lambda figures: None if figures is None else asdict(figures),
            hear=hear,
            give=self.recovery.capture_learned,
        )

    def round(
        self,
        work: Callable[[], T],
        *,
        tell: Callable[[T], Any],
        hear: Callable[[Handed], T],
        mixes: bool,
    ) -> T | None:
        """The section of a round. One that only mixes is left out after a loss: None."""
        if not mixes:
            outcome = self.session.rounds.outcome
            return self.together("all", work, tell=tell, hear=hear, give=outcome)
        try:
            return work()
        except PeerLost as error:
            self.recovery.run(error, None, self.recovery.capture_fusions)
            return None

    def fetch(self, work: Callable[[], Portion | None]) -> Portion | None:
        """The next portion, which a stream's replicas agree on. Looks for losses first."""
        if self.place.world.told_of_loss:
            self.recovery.run(None, None, self.recovery.capture_fusions)
        while True:
            try:
                return work()
            except PeerLost as error:
                self.recovery.run(error, None, self.recovery.capture_fusions)

    def refuse_streams(self, source: Source | Stream) -> None:
        """Refuse streams where sites are at different steps when one is lost.

        Raises:
            DataError: says what can be.
        """
        if self.active and self.session.rounds.active and isinstance(source, Stream):
            raise DataError(
                f"--on-loss continue: under {self.place.whole} the data is a stream, whose samples "
                "sites take in turns, step by step; allowed: data with a length, or a plan of data "
                "alone; next: --on-loss restart"
            )

    def refuse_own_loops(self, error: PeerLost) -> None:
        """A loop that computes its loss itself cannot be had to do so again.

        Raises:
            PeerLost: says what can, where others go on.
        """
        if not self.active:
            return
        why = "a loop over s.backward cannot do its step again; next: s.step, or --on-loss restart"
        raise PeerLost(
            f"{error.reason}; {why}",
            rank=error.rank,
            peer=error.peer,
            operation=error.operation,
            step=error.step,
            seconds=error.seconds,
        ) from None

    def _mark(self, among: Among) -> Callable[[], list[Any]]:
        """What takes back what a section changes halfway; it gives what codecs kept before."""
        if among == "all":
            return self.recovery.capture_fusions
        models = self.session.models.values()
        buffers = [(buffer, buffer.clone()) for module in models for buffer in module.buffers()]
        kept = map_nest(_copied, self.recovery.capture_fusions())

        def undo() -> list[Any]:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            return list(kept)

        return undo

    # What is told.

    def tell(self, lost: list[Lost], before: int, among: Among | None, seconds: float) -> None:
        """Tell of a loss that was survived: an event, and an entry in the run's record.

        Args:
            before: how many there were. among: whose section is done again, if one is.
        """
        session, place = self.session, self.place
        left, rows = place.world.size, self._count_rows(among)
        more = {"step": session.steps, "left": left, "before": before, "rows_again": rows}
        added = entries(lost, policy="continue", **more)
        self.losses += added
        session.keeper.record(losses=self.losses)
        self._promote()
        again = f"the step under way is done again with all its {rows} samples" if rows else ""
        if session.rounds.active:
            again = "what it had learned since the last round is lost"
        told = [describe(lost), f"{left} of {before} workers go on under {place.whole}", again]
        text = "; ".join(part for part in told if part)
        session.bus.emit("lost", text=text, losses=added, seconds=seconds)

    def tell_of_restarts(self) -> None:
        """Tell of the losses after which all workers were started again."""
        again, session = list(self.place.world.again), self.session
        folder = session.keeper.folder
        if folder is not None:
            self.losses = list(folder.record.get("losses", []))
        if again:
            added = entries(again[-1:], policy="restart", step=session.steps)
            self.losses += added
            session.keeper.record(losses=self.losses)
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

    def _count_rows(self, among: Among | None) -> int:
        """Samples of the batch that is learned from again."""
        step = self.session.stepper.current
        if among != "data" or step is None or step.portion is None:
            return 0
        return sum(step.portion.shares)


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
