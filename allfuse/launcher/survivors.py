"""Looks after a launch whose workers go on when one of them is lost."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from allfuse.launcher.channel import Channel
from allfuse.launcher.generation import Generation, LossPolicy, Roll
from allfuse.launcher.outcome import Outcome, how_it_ended, is_nothing, judge
from allfuse.launcher.regroup import key_of, place_of
from allfuse.launcher.watch import Watch
from allfuse.launcher.zygotes import Zygote

if TYPE_CHECKING:
    from allfuse.link.base import Board


class SurvivorsWatch(Watch):
    """A killed worker ends its replica; the others are told of the generation that goes on.

    Args:
        board_of: that of a generation; the first one's also tells of those after it.
    """

    def __init__(
        self,
        zygote: Zygote,
        signals: socket.socket,
        workers: int,
        policy: LossPolicy,
        board_of: Callable[[int], Board],
    ) -> None:
        super().__init__(zygote, signals, self._tell_members)
        self.roll, self._board_of, self._root = Roll(workers, policy), board_of, board_of(0)

    def _tell_members(self, worker: int, how: str) -> None:
        """Those who wait for it hear that it is lost, by the rank that it has by now."""
        here = self.roll.generation
        if worker in here.members:
            rank = here.members.index(worker)
            self._board_of(here.number).set(f"lost/{rank}", how.encode())

    def _take(self, channel: Channel, outcome: Outcome) -> None:
        super()._take(channel, outcome)
        if outcome.result is None:
            return
        self.roll.end(outcome.rank)

        def has_met(number: int) -> bool:
            return self._board_of(number).get(place_of(outcome.rank)) is not None

        generation = self.roll.excuse(outcome.rank, has_met)
        if generation is not None:
            self._publish(generation)

    def _note_failure(self, outcome: Outcome) -> None:
        was_killed = outcome.failure is None
        if was_killed and not self._killed and self._go_on_without(outcome):
            outcome.is_lost = True
            return
        if not outcome.is_lost:
            self._end_all()
            super()._note_failure(outcome)

    def _go_on_without(self, outcome: Outcome) -> bool:
        """Tell the others of the generation without this worker; whether there is one, or nobody
        is left who would need it."""
        if outcome.is_lost or outcome.rank not in self.roll.generation.members:
            return outcome.is_lost
        mates = self.roll.mates(outcome.rank)
        generation = self.roll.lose(outcome.rank, how_it_ended(outcome.status))
        assert generation is not None
        at_work = [o for o in self.outcomes if o.status is None and o.result is None]
        others = [o for o in at_work if o.rank not in mates]
        if not generation.members and others and not generation.is_over:
            return False
        for mate in at_work:
            if mate.rank in mates:
                mate.is_lost = mate.killed_here = True
                self._kill_worker(mate.rank)
        self._publish(generation)
        return bool(generation.members) or any(o.result is not None for o in self.outcomes)

    def _publish(self, generation: Generation) -> None:
        from allfuse.launcher.worker import LOST

        self._root.set(key_of(generation.number), generation.to_bytes())
        for worker in generation.members:
            self.channels[worker].post(LOST + str(generation.number).encode())
            self.channels[worker].push()

    def _end_all(self) -> None:
        """Nobody goes on: who waits for others to meet need not wait any longer."""
        number = self.roll.generation.number
        if self.roll.generation.members:
            number += 1
            self.roll.generation = Generation(number, ())
        self._root.set(key_of(number), self.roll.generation.to_bytes())

    def _hear_of_silence(self, generation: int, worker: int) -> None:
        """End a worker that does not answer; where it has done its work nobody can go on."""
        if generation != self.roll.generation.number:
            return
        if self.outcomes[worker].result is not None:
            self._end_all()
        else:
            self._kill_worker(worker)

    def _kill_worker(self, worker: int) -> None:
        self.zygote.kill_worker(self._pids[worker])


def judge_survivors(outcomes: Sequence[Outcome], interrupted: bool) -> Any:
    """What the first rank of those that were left returned; else raises, as `judge` does."""
    left = [outcome for outcome in outcomes if not outcome.is_lost]
    if not left or any(outcome.result is None for outcome in left):
        return judge(outcomes, interrupted)
    told = [each for each in left if each.result is not None and not is_nothing(each.result)]
    return judge(told[:1] or left, interrupted)
