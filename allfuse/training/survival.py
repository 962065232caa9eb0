"""Takes a session through the loss of replicas: those that are left do again what was under way.

What ranks do together comes in *sections*, in the same order on all: the fusions of a step (with
the optimizer's step), a round of the sites, an evaluation. A section needs all of its ranks, so
that of two survivors one is at most one section ahead. The section that none has ended all do
again, among themselves. Where one has ended it, those that are behind end it too:

- where each has the whole model, they take what it came to from one that is ahead;
- where ranks share a model, what one has says nothing of the pieces of others. So nobody ends a
  section, and nothing is changed that could not be undone, before all have told each other that
  they have what it takes: one sum of 4 bytes over all of them. Who is behind then ends it from
  what it has itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from allfuse.base.errors import DataError, PeerLost
from allfuse.base.tensors import map_nest
from allfuse.split.data import Stream
from allfuse.training.exchange import Figures
from allfuse.training.loading import refuse_unequal
from allfuse.training.losses import Losses
from allfuse.training.recovery import Among, Ended, Handed, Recovery

if TYPE_CHECKING:
    from allfuse.link import Link
    from allfuse.split.data import Portion, Source
    from allfuse.training.learner import Learner
    from allfuse.training.session import Session

T = TypeVar("T")


class LeftOut(Exception):
    """A section is not done again."""


class Survive(Protocol):
    """Carries a round through losses: see `Survival.round`."""

    def __call__(
        self,
        work: Callable[[], T],
        *,
        finish: Callable[[T], None],
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
        self.recovery, self.losses = Recovery(session), Losses(session)
        self._inside = False  # a section is under way

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
        finish: Callable[[T], None] = lambda made: None,
        again: Callable[[], None] = lambda: None,
        tell: Callable[[T], Any] = lambda result: result,
        hear: Callable[[Handed], T] = lambda handed: handed.result,
        give: Callable[[], Any] = lambda: None,
    ) -> T:
        """Do something with the others; after a loss do it again with those that are left.

        Args:
            finish: makes of what the work came to what cannot be undone, without the others.
            again: prepares to do it again, after what was begun is undone.
            tell, hear: make of the result plain values for a rank that has missed the end, and of
                those the result again.
            give: the state that goes with them.
        """
        if not self.active or self._inside:  # a part of what is done again as a whole
            made = work()
            finish(made)
            return made
        is_again = False
        while True:
            undo, here = self._mark(among), list[T]()
            try:
                if is_again:
                    again()
                here.append(self._within(work))
                self._await_all(among)
            except PeerLost as error:
                ready = functools.partial(finish, here[0]) if here else None
                handed = self.recovery.run(error, among, undo, ready)
                if handed is None:
                    is_again = True
                    continue
                result = here[0] if handed.is_own else hear(handed)
            else:
                result = here[0]
                finish(result)
            last = self.recovery.ended[among]
            self.recovery.ended[among] = Ended(last.count + 1, tell(result), give)
            return result

    def _within(self, work: Callable[[], T]) -> T:
        self._inside = True
        try:
            return work()
        finally:
            self._inside = False

    def _await_all(self, among: Among) -> None:
        """Where ranks share a model: until all of a section have what it takes to end it."""
        link = self._way_of(among)
        if link is not None:
            here = torch.zeros(1, device=self.place.device)
            link.all_reduce(here, "wait until all can end what they do").wait()

    def _way_of(self, among: Among) -> Link | None:
        """To those who wait for each other; None where one can take over what another has made,
        or where nobody is left who could be lost alone."""
        place = self.place
        if among == "mixed":  # what a rank of a site has mixed with is not what another has
            return place.team if place.team.size > 1 else None
        if place.mates.size in (1, place.everyone.size):
            return None
        return place.everyone if among == "all" else place.team

    def leave_together(self, last: Callable[[], None]) -> None:
        """Do what is done last. Nobody leaves while another may need what the last step came to."""

        is_done = False

        def work() -> None:
            nonlocal is_done
            is_done = False
            last()
            is_done = True
            if self.active and self._way_of("all") is None:
                nothing = torch.zeros(1, device=self.place.device)
                self.place.everyone.all_reduce(nothing, "end together").wait()

        try:
            self.together("all", work)
        except PeerLost:
            if not (is_done and self.place.world.is_over):
                raise

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
        """The section of one optimizer's step, where others have a part of its batch or model.

        Args:
            work: computes and fuses the gradients; None where nothing is learned.
        """

        def attempt() -> Figures | None:
            figures = work()
            if figures is not None:
                learner.unscale()  # which ranks that share a model do together
            return figures

        def finish(figures: Figures | None) -> None:
            if figures is not None:
                learner.step()

        if self.place.team.size == 1:
            figures = attempt()
            finish(figures)
            return figures

        def hear(handed: Handed) -> Figures | None:
            figures = None if handed.result is None else Figures(**handed.result)
            self.session.stepper.hear_of(learner, figures)
            return figures

        return self.together(
            "data",
            attempt,
            finish=finish,
            again=again,
            tell=lambda figures: None if figures is None else asdict(figures),
            hear=hear,
            give=self.recovery.capture_learned,
        )

    def round(
        self,
        work: Callable[[], T],
        *,
        finish: Callable[[T], None],
        tell: Callable[[T], Any],
        hear: Callable[[Handed], T],
        mixes: bool,
    ) -> T | None:
        """The section of a round. One that only mixes is left out after a loss: None."""
        if not mixes:
            outcome = self.session.rounds.outcome
            return self.together("all", work, finish=finish, tell=tell, hear=hear, give=outcome)

        def leave_out() -> None:
            raise LeftOut

        try:
            return self.together("mixed", work, finish=finish, again=leave_out)
        except LeftOut:
            return None

    def level(self, model: nn.Module) -> None:
        """Make parameters equal that several stages use, after weights were fused."""
        split = self.session.split
        if split.pipeline is not None and split.pipeline.shared:
            self.together("data", lambda: split.level(model))

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
        if among != "data":
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


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
