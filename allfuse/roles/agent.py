"""Carries the letters of a worker, or of its first rank, which talks to the scheduler for all."""

from __future__ import annotations

import contextlib
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from allfuse.base.errors import PeerLost, UserError, WorkerFailed
from allfuse.launcher.crewmate import Crewmate
from allfuse.link.post import Malformed, wait_any
from allfuse.roles.blueprint import Blueprint
from allfuse.roles.client import Client
from allfuse.roles.hand import SLICE_S, Hand
from allfuse.roles.messages import (
    INTERRUPTED,
    SCHEDULER,
    Beat,
    Join,
    Lease,
    Mail,
    Message,
    Note,
    Save,
    Stop,
    Tell,
    open_letter,
)

BEAT_S = 2.5  # between two signs of life, which the scheduler answers
LOOK_S = 0.5  # between two looks at whether the crew has ended
UNSENT_BYTES = 16_000_000  # of checkpoints, that wait to be carried
WAIT_S = 0.002  # between two looks at these
PATIENCE_S = 6.0  # with a silent scheduler, once it was asked to stop


class Agent(Hand):
    """What a worker asks for, and waits for; see `Hand`.

    Nothing of the scheduler for `timeout_s` raises PeerLost, in every wait.

    Attributes:
        waiting: called now and then while it waits.

    Args:
        crew: where the scheduler is, and what carries letters.
        name: of the worker, for people; a new one is made of it whenever a worker comes.
        asked: set when a person or the launcher asks to stop. A worker that waits passes that on,
            and does not wait long for a scheduler that is silent then.
    """

    def __init__(
        self, crew: Crewmate, name: str, timeout_s: float, asked: threading.Event | None = None
    ) -> None:
        super().__init__(crew, f"{name} ({secrets.token_hex(3)})")
        self.timeout_s, self.step, self._crew = timeout_s, 0, crew
        try:
            place = crew.scheduler(timeout_s)
        except TimeoutError:
            raise self._lost("did not say where it is", "find the scheduler", timeout_s) from None
        self._scheduler = self._post.call(place, self.name)
        crew.tell_process(self.name)
        self._heard_s = time.monotonic()
        self._begin_s = self._looked_s = self._heard_s
        self._asked, self._asked_s = asked or threading.Event(), math.inf
        self.waiting: Callable[[], None] = lambda: None

    def join(self, join: Join, blueprint: Blueprint, servers: int, device: torch.device) -> Client:
        """Be a worker from now on. The first weights come with the first lease."""
        beat_s = min(BEAT_S, self.timeout_s / 4)
        self.client = Client(join, blueprint, servers, device=device, beat_s=beat_s)
        self._begin_to_keep_in_touch()
        return self.client

    def next_work(self) -> Lease | None:
        """Wait until it is known what to work on next, whose weights may come later, and may come
        for another lease; None at the end.

        Raises:
            PeerLost: the scheduler is gone.
        """
        client = self._open_client
        self._drive(lambda: client.upcoming is not None or client.is_over, "wait for work")
        with self._lock:
            return client.upcoming

    def next_lease(self) -> Lease:
        """Wait for the next lease and its weights, and begin to work on it; -1 at the end.

        Raises:
            UserError: the scheduler does not let this worker in. WorkerFailed: the job cannot go
            on. PeerLost: the scheduler is gone.
        """
        while True:
            lease = self.next_ready()
            if self.begin(lease):
                return lease

    def next_ready(self) -> Lease:
        """Wait for the next lease and its weights, or the end; raises as `next_lease`. What comes
        meanwhile may be another one: `begin` says so."""
        client = self._open_client
        self._drive(lambda: client.is_ready or client.is_over, "wait for the next lease")
        with self._lock:
            return check_lease(client.lease, client.refusal)

    def begin(self, lease: Lease) -> bool:
        """Begin to work on a lease; whether it is still the one to work on, with its weights."""
        with self._lock:
            client, is_last = self._open_client, lease.lease < 0
            if client.lease is not lease or not (client.is_over if is_last else client.is_ready):
                return False
            if is_last:
                client.replica.settle()
            else:
                client.begin(time.monotonic())
            return True

    def take_heard(self) -> tuple[list[Message], int]:
        """What other ranks of the worker are to be handed, once; see `Client.follow`."""
        with self._lock:
            client = self._open_client
            heard, client.heard = client.heard, []
            return heard, client.kept

    def await_others(self, are_ready: bool, get_some: bool) -> None:
        """Whether other ranks of the worker have their weights too, or get some of them just now;
        else they are asked for again."""
        with self._lock:
            self._open_client.is_awaited = not are_ready
            if get_some:
                self._open_client.be_patient(time.monotonic())

    def stop(self, reason: str) -> None:
        """Ask that no more work is handed out."""
        self._say(Stop(reason=reason))

    def note(self, name: str, state: dict[str, Any], done: int) -> None:
        """Hand a state on to whoever needs it next."""
        self._say(Note(name=name, done=done, state=state))

    def save(self, message: Save) -> None:
        """Hand in a piece of this worker's part of a checkpoint, once most of what was before is on
        its way."""
        until_s = time.monotonic() + self.timeout_s
        while self._scheduler.unsent_bytes() > UNSENT_BYTES and time.monotonic() < until_s:
            time.sleep(WAIT_S)
        self._say(message)

    def tell(self, event: str, data: dict[str, Any]) -> None:
        self._say(Tell(event=event, data=data))

    def _say(self, message: Message) -> None:
        with self._lock:
            self._send([(SCHEDULER, message)])

    # Letters.

    def _send(self, mail: Iterable[Mail]) -> None:
        for to, message in mail:
            caller = self._scheduler if to == SCHEDULER else self._server(to)
            caller.send(message.letter())

    def _drive(self, until: Callable[[], bool], operation: str) -> None:
        self._begin_s = time.monotonic()
        slice_s = 0.0  # what is waited for may be here, and nothing more would come to wake us
        while True:
            with self._lock:
                self._work(slice_s)
                if until():
                    return
                if self._trouble is not None:
                    raise self._trouble
                now_s = time.monotonic()
                silent_s = now_s - max(self._heard_s, self._begin_s)
                trouble = self._scheduler.trouble
            self._hear_end(operation)
            self.waiting()
            slice_s = SLICE_S
            if trouble == "another token":
                raise UserError(
                    f"the scheduler at {self._scheduler.place} has another token; next: give this "
                    "worker the token of the job (--token-file)"
                )
            is_asked = now_s - self._asked_s > PATIENCE_S
            if silent_s > (min(self.timeout_s, PATIENCE_S) if is_asked else self.timeout_s):
                raise self._lost(
                    trouble or "said nothing", operation, time.monotonic() - self._begin_s
                )

    def _hear_end(self, operation: str) -> None:
        """
        Raises:
            AllfuseError: what the launcher tells that the crew ended with, while this worker waits.
        """
        now_s = time.monotonic()
        if self._asked.is_set() and self._asked_s == math.inf:
            self._asked_s = now_s
            self.stop(INTERRUPTED)
        if now_s - self._looked_s < LOOK_S:
            return
        self._looked_s, end = now_s, self._crew.end()
        if end is True:
            raise self._lost("has ended", operation, now_s - self._begin_s)
        if end is not None:
            raise end

    def _work(self, timeout_s: float) -> None:
        """Take in what came within a time, and say what is due."""
        client, now_s = self._open_client, time.monotonic()
        self._send(client.tick(now_s))
        wait_any([self._scheduler, *self._servers.values()], timeout_s)
        for letter in self._scheduler.receive(0):
            with contextlib.suppress(Malformed):  # nothing has changed then
                message = open_letter(letter)
                self._heard_s = time.monotonic()
                if not isinstance(message, Beat):
                    self._send(client.handle(SCHEDULER, message, time.monotonic()))
        self._hear_servers()

    def _lost(self, reason: str, operation: str, seconds: float) -> PeerLost:
        return PeerLost(
            f"the scheduler {reason}",
            rank=0,
            peer=None,
            operation=operation,
            step=self.step,
            seconds=seconds,
        )

    def close(self) -> None:
        """Go. What was begun is given to others."""
        self._over.set()
        with self._lock:
            if self.client is not None and not self.client.refusal:
                self._send(self.client.leave())
            self._scheduler.close()
        super().close()


def check_lease(lease: Lease | None, refusal: str) -> Lease:
    """The lease that a worker has waited for.

    Raises:
        UserError: the scheduler does not let this worker in. WorkerFailed: the job cannot go on.
    """
    if refusal:
        raise UserError(f"the scheduler does not let this worker in: {refusal}")
    assert lease is not None
    if lease.failed:
        raise WorkerFailed(lease.reason, rank=-1)
    return lease
