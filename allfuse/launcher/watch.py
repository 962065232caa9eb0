"""Looks after the workers of one launch."""

from __future__ import annotations

import json
import pickle
import selectors
import socket
import time
from collections.abc import Callable

from allfuse.launcher.channel import Channel
from allfuse.launcher.outcome import Outcome, how_it_ended
from allfuse.launcher.zygotes import Zygote

GRACE_S = 4.0  # how long the others may take to end by themselves after the first failure
LAST_S = 1.0  # how long only those may take that others have waited for in vain
LINGER_S = 30.0  # how long threads that user code has started may go on after all work is done


class Watch:
    """Looks after the workers of one launch until all have ended. Nothing here waits for one."""

    def __init__(
        self, zygote: Zygote, signals: socket.socket, tell_lost: Callable[[int, str], None]
    ) -> None:
        self.zygote, self.signals, self.tell_lost = zygote, signals, tell_lost
        self.outcomes: list[Outcome] = []
        self.channels: list[Channel] = []
        self.stops = 0
        self.deadline: float | None = None
        self._pids: list[int] = []  # in the order of the forks, which is that of the ranks
        self._failures = 0
        self._killed = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(zygote.control, selectors.EVENT_READ, self._hear_zygote)
        self._selector.register(signals, selectors.EVENT_READ, self._stop)

    def start(self, request: bytes, function: bytes) -> None:
        """Fork the next worker and put its work in line."""
        channel, outcome = Channel(self.zygote.fork()), Outcome(len(self.outcomes))
        self.channels.append(channel)
        self.outcomes.append(outcome)
        channel.post(request)
        channel.post(function)
        self._selector.register(
            channel.end,
            selectors.EVENT_READ | selectors.EVENT_WRITE,
            lambda: self._exchange(channel, outcome),
        )

    def until_all_ended(self) -> None:
        while any(outcome.status is None for outcome in self.outcomes):
            left = None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
            for key, _ in self._selector.select(left):
                key.data()
            if self.deadline is None and self._all_reported:
                self.deadline = time.monotonic() + LINGER_S
            if self.deadline is not None and time.monotonic() >= self.deadline:
                if self._killed:
                    self._give_up()
                self._kill()

    @property
    def _all_reported(self) -> bool:
        return all(
            outcome.result is not None or outcome.failure or outcome.is_lost
            for outcome in self.outcomes
        )

    def _give_up(self) -> None:
        """The zygote does not do what it is told: end it, which ends its workers."""
        self.zygote.process.kill()
        self.zygote.process.wait()
        if not self._all_reported:
            raise self.zygote.died()
        for outcome in self.outcomes:
            outcome.status = 0 if outcome.status is None else outcome.status

    def close(self) -> None:
        for channel in self.channels:
            channel.close()
        self._selector.close()

    def _exchange(self, channel: Channel, outcome: Outcome) -> None:
        channel.push()
        self._take(channel, outcome)
        if channel.closed:
            self._selector.unregister(channel.end)
        elif not channel.has_outgoing:
            self._selector.modify(
                channel.end, selectors.EVENT_READ, lambda: self._exchange(channel, outcome)
            )

    def _take(self, channel: Channel, outcome: Outcome) -> None:
        from allfuse.launcher.worker import DONE, MISSES

        for report in channel.pull():
            if report[:1] == DONE:
                outcome.result = report[1:]
            elif report[:1] == MISSES:
                self._hear_of_silence(*json.loads(report[1:]))
            else:
                outcome.failure = pickle.loads(report[1:])  # noqa: S301  our own worker
                self._note_failure(outcome)

    def _hear_of_silence(self, generation: int, worker: int) -> None:
        """A worker names one that does not answer, in a launch that can go on without it."""

    def _hear_zygote(self) -> None:
        answers = self.zygote.hear()
        if answers is None:
            raise self.zygote.died()
        for answer in answers:
            if "forked" in answer:
                self._pids.append(answer["forked"])
            else:
                rank = self._pids.index(answer["exited"])
                self._has_ended(self.channels[rank], self.outcomes[rank], answer["status"])

    def _has_ended(self, channel: Channel, outcome: Outcome, status: int) -> None:
        outcome.status = status
        self._take(channel, outcome)  # what it had still sent
        if outcome.result is None and outcome.failure is None:
            self.tell_lost(outcome.rank, how_it_ended(status))
            self._note_failure(outcome)

    def _note_failure(self, outcome: Outcome) -> None:
        """Of the first one: the others notice by themselves, and have a short time for it.

        Not where training ends as it was asked to: one rank may still write the checkpoint.
        """
        outcome.order = self._failures
        self._failures += 1
        failure = outcome.failure
        orderly = failure is not None and failure.expected and failure.was_stopped
        if self.deadline is None and not (orderly and self.stops):
            self.deadline = time.monotonic() + GRACE_S
        if self.deadline is not None and self._only_missed_ones_left:
            self.deadline = min(self.deadline, time.monotonic() + LAST_S)

    @property
    def _only_missed_ones_left(self) -> bool:
        """Whether all have reported but those that others have waited for in vain."""
        missed = {o.failure.peer for o in self.outcomes if o.failure is not None}
        left = {o.rank for o in self.outcomes if o.result is None and o.failure is None}
        return bool(left) and left <= missed

    def _stop(self) -> None:
        """Pass on that a person or a supervisor asks to stop; the second time, kill."""
        from allfuse.launcher.worker import STOP

        self.stops += len(self.signals.recv(16))
        if self.stops > 1:
            self._kill()
            return
        for channel in self.channels:
            channel.post(STOP)
            channel.push()

    def _kill(self) -> None:
        for outcome in self.outcomes:
            outcome.killed_here |= outcome.status is None
        self._killed, self.deadline = True, time.monotonic() + GRACE_S
        self.zygote.kill_workers()
