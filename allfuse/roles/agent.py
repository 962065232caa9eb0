"""Carries the letters of a worker: its client at callers to the scheduler and to each server."""

from __future__ import annotations

import contextlib
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from allfuse.base.errors import PeerLost, UserError, WorkerFailed
from allfuse.launcher.crewmate import Crewmate
from allfuse.link.post import Caller, Malformed, wait_any
from allfuse.roles.blueprint import Blueprint
from allfuse.roles.client import Client
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

TICK_S = 0.25  # between two looks at what came, while the worker computes
QUICK_S = 0.01  # the same, while an update is on its way, or weights are
BEAT_S = 2.5  # between two signs of life, which the scheduler answers
LOOK_S = 0.5  # between two looks at whether the crew has ended
PATIENCE_S = 6.0  # with a silent scheduler, once it was asked to stop
SLICE_S = 0.05  # of a wait, after which others may use the callers


class Agent:
    """What a worker asks for, and waits for; a thread beside it keeps in touch while it computes:
    often while `is_awaited`, when weights come meanwhile.

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
        self.name, self.timeout_s = f"{name} ({secrets.token_hex(3)})", timeout_s
        self.step = 0
        self._crew, self._post = crew, crew.post()
        self._lock = threading.RLock()
        try:
            place = crew.scheduler(timeout_s)
        except TimeoutError:
            raise self._lost("did not say where it is", "find the scheduler", timeout_s) from None
        self._scheduler = self._post.call(place, self.name)
        crew.tell_process(self.name)
        self._servers: dict[str, Caller] = {}
        self.client: Client | None = None
        self._heard_s = time.monotonic()
        self._begin_s = self._looked_s = self._heard_s
        self._asked, self._asked_s = asked or threading.Event(), math.inf
        self.is_awaited = False
        self.waiting: Callable[[], None] = lambda: None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._trouble: BaseException | None = None

    def join(self, join: Join, blueprint: Blueprint, servers: int, device: torch.device) -> Client:
        """Be a worker from now on. The first weights come with the first lease."""
        beat_s = min(BEAT_S, self.timeout_s / 4)
        self.client = Client(join, blueprint, servers, device=device, beat_s=beat_s)
        self._begin_to_keep_in_touch()
        return self.client

    def _begin_to_keep_in_touch(self) -> None:
        self._thread = threading.Thread(
            target=self._keep_in_touch, name="allfuse-agent", daemon=True
        )
        self._thread.start()

    @property
    def _open_client(self) -> Client:
        assert self.client is not None, "join first"
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
        client = self._open_client
        self._drive(lambda: client.is_ready or client.is_over, "wait for the next lease")
        with self._lock:
            lease = check_lease(client.lease, client.refusal)
            if lease.lease < 0:
                client.replica.settle()
                return lease
            return client.begin(time.monotonic())

    def push(
        self, gradients: Mapping[str, Tensor], options: list[dict[str, Any]], scale: float = 1.0
    ) -> None:
        """Some gradients are final: send what is whole, multiplied by `scale`."""
        with self._lock:
            client = self._open_client
            client.options = options
            self._send(client.push(gradients, time.monotonic(), scale))

    def finish(
        self,
        options: list[dict[str, Any]],
        *,
        loss: float,
        count: float,
        rows: int,
        seconds: float,
    ) -> None:
        """The update of the lease is whole."""
        with self._lock:
            client = self._open_client
            client.options = options
            now_s = time.monotonic()
            self._send(client.finish(now_s, loss=loss, count=count, rows=rows, seconds=seconds))

    def stop(self, reason: str) -> None:
        """Ask that no more work is handed out."""
        self._say(Stop(reason=reason))

    def note(self, name: str, state: dict[str, Any], done: int) -> None:
        """Hand a state on to whoever needs it next."""
        self._say(Note(name=name, done=done, state=state))

    def save(self, messages: Iterable[Save]) -> None:
        """Hand in this worker's part of a checkpoint."""
        for message in messages:
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

    def _server(self, place: str) -> Caller:
        if place not in self._servers:
            self._servers[place] = self._post.call(place, self.name)
        return self._servers[place]

    def _drive(self, until: Callable[[], bool], operation: str) -> None:
        self._begin_s = time.monotonic()
        while True:
            with self._lock:
                self._work(SLICE_S)
                if until():
                    return
                if self._trouble is not None:
                    raise self._trouble
                now_s = time.monotonic()
                silent_s = now_s - max(self._heard_s, self._begin_s)
                trouble = self._scheduler.trouble
            self._hear_end(operation)
            self.waiting()
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
        for caller in (self._scheduler, *list(self._servers.values())):
            is_scheduler = caller is self._scheduler
            for letter in caller.receive(0):
                with contextlib.suppress(Malformed):  # nothing has changed then
                    message = open_letter(letter)
                    if is_scheduler:
                        self._heard_s = time.monotonic()
                    if not isinstance(message, Beat):
                        sender = SCHEDULER if is_scheduler else caller.place
                        self._send(client.handle(sender, message, time.monotonic()))
        for place in client.places:
            self._server(place)  # they can only write to whom they know

    def _keep_in_touch(self) -> None:
        while not self._over.wait(QUICK_S if self.is_awaited else TICK_S):
            with self._lock:
                if self._over.is_set():
                    return
                try:
                    self._work(0.0)
                except BaseException as error:  # the worker hears of it when it waits next
                    self._trouble = error
                    return

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
            for caller in (self._scheduler, *self._servers.values()):
                caller.close()
        if self._thread is not None:
            self._thread.join()


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
