"""What a rank does after a loss: meets those that are left, agrees where all are, and goes on.

Nothing here is done by one rank alone: all that are left come, whatever they were in the midst of.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from allfuse.base.errors import PeerLost, WorkerFailed
from allfuse.launcher.generation import Lost
from allfuse.training.handover import hand_over

if TYPE_CHECKING:
    from allfuse.link import Link
    from allfuse.training.session import Session

Among = Literal["data", "mixed", "all"]
"""Whose a section is, and which count it has: of the ranks that step together (steps, and rounds of
a topology that only mixes, which other sites may leave out), or of all."""


@dataclass
class Handed:
    """What a section came to, from a rank that has ended it: plain values, and a state.

    is_own: nothing was handed over, as this rank had what it took to end it by itself.
    """

    among: Among
    result: Any = None
    state: Any = None
    is_own: bool = False


@dataclass
class Ended:
    """The last section of its kind that this rank has ended: how many there were, what it came to,
    and what gives the state that goes with it."""

    count: int = 0
    result: Any = None
    give: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Where:
    """How far a rank is: sections ended, steps done, the step of its last save."""

    data: int
    mixed: int
    all: int
    steps: int
    asked: int


class Recovery:
    """Takes a session from the ranks that were to those that are left.

    Phases: (1) links are closed, the world is formed anew and links are made; (2) each tells how
    far it is, one sum of (n, 5) numbers; (3) those that have missed the end of a section get what
    it came to from one that has not, or end it by themselves. A loss meanwhile begins all of them
    again. Then, without any transfer, all parts of the session take the new links.
    """

    def __init__(self, session: Session) -> None:
        self.session, self.place = session, session.place
        self.ended: dict[Among, Ended] = {"data": Ended(), "mixed": Ended(), "all": Ended()}

    def run(
        self,
        error: PeerLost | None,
        among: Among | None,
        undo: Callable[[], list[Any]],
        ready: Callable[[], None] | None = None,
    ) -> Handed | None:
        """Go on with those that are left.

        Args:
            error: what was noticed, None where the launcher has told of a loss.
            among: the section that was under way. undo: takes back what it changed, and gives what
                codecs kept before.
            ready: ends it, where this rank has what that takes.

        Returns:
            What the section came to, where this rank has missed its end; None: it is to be done
            again.

        Raises:
            PeerLost: the others do not go on.
        """
        begin, before = time.monotonic(), self.place.world.ids
        old_sharers = self._sharers()
        lost: list[Lost] = []
        while True:
            lost += self.place.regroup(error)
            try:
                self.place.meet_again()
                told = self._tell_where()
                handed = self._settle(told, among, ready is not None)
                break
            except PeerLost as failure:
                error = failure
        if handed is not None and handed.is_own:
            assert ready is not None
            ready()
            kept = self.capture_fusions()
        else:
            kept = undo()
            if handed is not None:  # what this rank has sent is in what it came to
                kept = self.capture_fusions()
                self.session.rounds.keep_sent()
        first = max(where.steps for where in told)
        self._link_up(kept, [old_sharers.index(each) for each in self._sharers()], first)
        self._take(handed, first, max(where.asked for where in told))
        redone = among == "data" and handed is None
        self.session.survival.losses.tell(lost, len(before), redone, time.monotonic() - begin)
        return handed

    def capture_fusions(self) -> list[Any]:
        """What codecs keep of the gradients of each optimizer."""
        return [learner.fusion.capture() for learner in self.session.learners]

    def capture_learned(self) -> dict[str, Any]:
        """What steps change. Rates and the like are each rank's own: schedulers step them between
        sections."""
        session, scaler = self.session, self.session.precision.scaler
        return {
            "models": {name: module.state_dict() for name, module in session.models.items()},
            "optimizers": [each.optimizer.state_dict()["state"] for each in session.learners],
            "rounds": [each.fusion.rounds for each in session.learners],
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def _sharers(self) -> list[int]:
        ids = self.place.world.ids
        return [ids[member] for member in self.place.sharers.members]

    def _tell_where(self) -> list[Where]:
        link, session = self.place.everyone, self.session
        counts = [each.count for each in self.ended.values()]
        own = [*counts, session.steps, session.keeper.asked]
        rows = torch.zeros(link.size, len(own), dtype=torch.int64, device=self.place.device)
        rows[link.rank] = torch.tensor(own)
        link.all_reduce(rows, "agree where all are").wait()
        return [Where(*row) for row in rows.tolist()]

    def _settle(self, told: list[Where], among: Among | None, is_ready: bool) -> Handed | None:
        """Find out whether this rank has missed the end of a section; hand over what those have
        missed that are behind and cannot end it by themselves."""
        team, everybody = self.place.team, self.place.everyone
        in_team = [told[everybody.members.index(member)] for member in team.members]
        ways: list[tuple[Among, Link, list[int]]] = [
            ("data", team, [where.data for where in in_team]),
            ("mixed", team, [where.mixed for where in in_team]),
            ("all", everybody, [where.all for where in told]),
        ]
        found = None
        for name, link, counts in ways:
            most, own = max(counts), counts[link.rank]
            if min(counts) == most:
                continue
            ends_itself = name == "mixed" or self.place.mates.size > 1
            made = None if ends_itself else self._hand_over(name, link, counts.index(most))
            if own == most:
                continue
            if own < most - 1 or name != among or (ends_itself and not is_ready):
                raise WorkerFailed(
                    f"rank {self.place.world.ids[self.place.rank]} is more than one fusion behind "
                    "the others after a loss, so that it cannot go on",
                    rank=self.place.world.ids[self.place.rank],
                )
            found = made or Handed(name, is_own=True)
        return found

    def _hand_over(self, name: Among, link: Link, root: int) -> Handed:
        """What the last section of its kind came to on a rank, for all of a link."""
        last = self.ended[name]
        mine = [json.dumps(last.result), last.give()] if link.rank == root else None
        result, state = hand_over(link, root, mine, self.place.device)
        return Handed(name, json.loads(result), state)

    def _link_up(self, kept: list[Any], same: list[int], first_step: int) -> None:
        """Have all parts of the session use the links to those that are left.

        Args:
            same: the places that those who share a batch had among those who did before.
            first_step: that no rank has done yet.
        """
        session, place = self.session, self.place
        session.bus.rank = place.rank
        session.precision.renew()
        mates = {"tensor": place.tensor, "pipe": place.pipe, "shard": place.shard}
        session.split.meet_mates(place.plan, place.rank, place.mates, **mates)
        for learner, own in zip(session.learners, kept, strict=True):
            learner.meet_peers(place.data_fuser, own)
        for norm in session.stepper.norms:
            norm.link = place.statistics
        session.stepper.keep_peers(same)
        session.rounds.meet_peers(first_step)
        session.keeper.meet_peers()

    def _take(self, handed: Handed | None, first_step: int, asked: int) -> None:
        """Go on from what was handed over, on batches that are cut for those that are left."""
        session = self.session
        session.keeper.asked = asked
        if handed is not None and handed.among == "data" and not handed.is_own:
            self._take_learned(handed.state)
        self._cut_anew(first_step)
        session.course.tell_step_number()

    def _cut_anew(self, step: int) -> None:
        """From a step on batches are cut for those that are left, at first evenly."""
        session, before = self.session, self.session.balance
        session.balance = session._make_balance()
        if session.balance is not None and before is not None:
            session.balance.ahead = before.ahead
            cursor = session.course.cursor
            here = (cursor.epoch, cursor.step_in_epoch)
            session.balance.go_on(session.keeper.path, here)
        if session.make_loader is None:
            session.stepper.meet_peers()
        else:
            session.course.cut_anew(session.make_loader(False), step)

    def _take_learned(self, state: dict[str, Any]) -> None:
        session, scaler = self.session, self.session.precision.scaler
        for name, module in session.models.items():
            module.load_state_dict(state["models"][name])
        for number, learner in enumerate(session.learners):
            learner.take_step(state["optimizers"][number])
            learner.fusion.rounds = state["rounds"][number]
        if scaler is not None and state["scaler"] is not None:
            scaler.load_state_dict(state["scaler"])
