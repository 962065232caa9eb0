"""Carries the letters of a worker that gossips: a desk of its own, callers at those of others."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable
from typing import Any, cast

from allfuse.launcher.crewmate import Crewmate
from allfuse.link.post import Malformed, wait_any
from allfuse.roles.agent import BEAT_S, Agent, check_lease
from allfuse.roles.blueprint import Blueprint
from allfuse.roles.encounters import is_of_host
from allfuse.roles.gossiper import Gossiper, Partner
from allfuse.roles.messages import SCHEDULER, Beat, Join, Lease, Mail, Message, open_letter
from allfuse.roles.parcels import Flats


class GossipAgent(Agent):
    """What a worker that gossips asks for, and waits for.

    While it computes, a thread takes in what comes, and answers what needs no weights.

    Attributes:
        place: of its desk, where others find it.
    """

    def __init__(
        self, crew: Crewmate, name: str, timeout_s: float, asked: threading.Event | None = None
    ) -> None:
        super().__init__(crew, name, timeout_s, asked)
        self._desk = self._post.desk()
        self.place = self._desk.place

    def gossip(self, join: Join, blueprint: Blueprint, flats: Flats, partner: Partner) -> Gossiper:
        """Be a worker from now on. Its first weights come before the first lease."""
        beat_s = min(BEAT_S, self.timeout_s / 4)
        gossiper = Gossiper(join, blueprint, flats, partner, beat_s=beat_s)
        self.client = cast(Any, gossiper)  # what it does of a client's is called by the same names
        self._begin_to_keep_in_touch()
        return gossiper

    @property
    def _gossiper(self) -> Gossiper:
        return cast(Gossiper, self._open_client)

    def look(self) -> bool:
        """Take in what has come; whether there is anybody to meet. If not, a step is done."""
        with self._lock:
            gossiper = self._gossiper
            self._work(0.0)
            is_to_meet = gossiper.is_to_meet
            if not is_to_meet:
                gossiper.pass_by()
            return is_to_meet

    def meet(self) -> int:
        """A step is done: mix with those who wait. How often its weights were changed by now."""
        with self._lock:
            gossiper = self._gossiper
            self._send(gossiper.meet(time.monotonic()))
            return gossiper.changes

    @property
    def exchanged(self) -> dict[str, int]:
        """How many of its offers were answered, and how many were not."""
        gossiper = self._gossiper
        return {"answered": gossiper.exchanges, "declined": gossiper.declined}

    def next_lease(self) -> Lease:
        """Wait for the next lease, and begin to work on it; -1 at the end, when the weights are the
        mean of those of all.

        Raises:
            UserError, WorkerFailed, PeerLost: as `Agent.next_lease` says.
        """
        gossiper = self._gossiper
        self._drive(lambda: gossiper.is_ready or gossiper.is_over, "wait for the next lease")
        with self._lock:
            lease = check_lease(gossiper.lease, gossiper.refusal)
            return lease if lease.lease < 0 else gossiper.begin(time.monotonic())

    def _send(self, mail: Iterable[Mail]) -> None:
        for to, message in mail:
            if to != SCHEDULER and is_of_host(message):
                self._desk.send(to, message.letter())
            else:
                super()._send([(to, message)])

    def _work(self, timeout_s: float) -> None:
        """Take in what came within a time, and say what is due."""
        gossiper = self._gossiper
        self._send(gossiper.tick(time.monotonic()))
        callers = [self._scheduler, *self._servers.values()]
        wait_any([*callers, self._desk], timeout_s)
        for caller in callers:
            is_scheduler = caller is self._scheduler
            for letter in caller.receive(0):
                with contextlib.suppress(Malformed):  # nothing has changed then
                    message = open_letter(letter)
                    if is_scheduler:
                        self._heard_s = time.monotonic()
                    self._take_in(SCHEDULER if is_scheduler else caller.place, message)
        for name, letter in self._desk.receive(0):
            with contextlib.suppress(Malformed):
                self._take_in(name, open_letter(letter))
        self._desk.lost()  # the scheduler says who is
        self._hang_up()

    def _take_in(self, sender: str, message: Message) -> None:
        if not isinstance(message, Beat):
            self._send(self._gossiper.handle(sender, message, time.monotonic()))

    def _hang_up(self) -> None:
        """Close callers of whom nothing is expected any more."""
        gossiper = self._gossiper
        for place in [place for place in self._servers if not gossiper.expects(place)]:
            self._servers.pop(place).close()

    def close(self) -> None:
        super().close()
        self._desk.close()
