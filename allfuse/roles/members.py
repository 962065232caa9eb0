"""Who takes part: workers that come, speak, fall silent and go."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from allfuse.roles import messages as say
from allfuse.roles.book import Book
from allfuse.roles.clocks import Clocks
from allfuse.roles.outbox import Outbox
from allfuse.roles.records import Presence, Worker
from allfuse.roles.terms import Terms

FINGERPRINT_SHOWN = 12  # characters, in a refusal


@dataclass(frozen=True)
class Task:
    """What the first worker said the job is; all others must say the same."""

    fingerprint: str
    steps_per_epoch: int
    steps: int | None
    epochs: int | None
    blueprint: dict[str, Any]
    facts: dict[str, Any]
    clip: float | None = None

    @classmethod
    def of(cls, join: say.Join) -> Task:
        return cls(**{name: getattr(join, name) for name in cls.__dataclass_fields__})

    @property
    def plain(self) -> dict[str, Any]:
        return dict(vars(self))

    @property
    def limit(self) -> int | None:
        """Steps of the whole run; None is endless."""
        epochs = None if self.epochs is None else self.epochs * self.steps_per_epoch
        limits = [limit for limit in (self.steps, epochs) if limit is not None]
        return min(limits, default=None)

    def every(self, name: str) -> int | None:
        """After how many steps something falls due, None for never."""
        value = self.facts.get(name)
        steps = self.steps_per_epoch if value == "epoch" else value
        return steps if isinstance(steps, int) and steps > 0 else None

    def differs(self, join: say.Join) -> str:
        """What is different about a worker's job; empty for nothing."""
        if join.fingerprint != self.fingerprint:
            own, other = self.fingerprint, join.fingerprint
            return (
                f"its job, data or model has the fingerprint {other[:FINGERPRINT_SHOWN]}, and "
                f"that of this run is {own[:FINGERPRINT_SHOWN]}; start it with the same job file, "
                "arguments and data"
            )
        for name in ("steps_per_epoch", "steps", "epochs", "clip"):
            own, other = getattr(self, name), getattr(join, name)
            if own != other:
                return f"its {name} is {other}, and that of this run is {own}"
        return ""


class Members:
    """The workers, by name.

    Attributes:
        task: None until the first worker has joined.
        losses: who was lost, as (seconds, name, why).
    """

    def __init__(self, book: Book, terms: Terms, outbox: Outbox, clocks: Clocks) -> None:
        self._book, self._terms, self._outbox, self._clocks = book, terms, outbox, clocks
        self.losses: list[tuple[float, str, str]] = []
        self._workers: dict[str, Worker] = {}
        self._clock: dict[str, int] = {}  # of those who are not here
        for worker, clock in book.workers():
            self._workers[worker.name] = worker
            self._clock[worker.name] = clock
            if worker.is_alive:
                clocks.join(worker.name, clock)
        self.alive = sorted(
            (each for each in self._workers.values() if each.is_alive), key=lambda w: w.rank
        )
        task = book.get("task")
        self.task = None if task is None else Task(**task)
        self._short_since_s: float | None = None

    def get(self, name: str) -> Worker | None:
        return self._workers.get(name)

    @property
    def home(self) -> str:
        """The host of the first worker that ever came, from where the job was started."""
        return next((worker.host for worker in self._workers.values()), "")

    @property
    def is_enough(self) -> bool:
        return len(self.alive) >= self._terms.fewest

    def objection(self, sender: str, join: say.Join) -> str:
        """Why one may not take part; empty where it may."""
        known = self._workers.get(sender)
        if join.name != sender:
            return f"it calls itself {join.name} and writes as {sender}"
        if sender == say.SCHEDULER:
            return f"no worker may be called {sender}"
        limits = (join.steps_per_epoch, join.steps, join.epochs)
        if any(limit is not None and not 0 < limit < 1 << 53 for limit in limits):
            return f"steps_per_epoch, steps and epochs are {limits}; they are counted from 1"
        if join.clip is not None and not 0 < join.clip < math.inf:
            return f"clip is {join.clip}; a norm is above 0"
        if self.task is not None and (difference := self.task.differs(join)):
            return difference
        if (known is None or not known.is_alive) and not self.has_room:
            return f"{len(self.alive)} workers are here, and the job takes {self._terms.most}"
        return ""

    @property
    def has_room(self) -> bool:
        return len(self.alive) < self._terms.most

    def admit(self, name: str, host: str) -> Worker:
        """A worker that comes, or comes again: never to an earlier clock than it was at."""
        worker = self._workers.get(name)
        if worker is None:
            worker = self._workers[name] = Worker(name, len(self._workers), host)
        clock = max(self._clock.get(name, 0), self._clocks.low)
        worker.presence, worker.base, worker.lease = Presence.HERE, None, None
        worker.host = host
        worker.heard_s = self._outbox.now_s
        self._clocks.join(name, clock)
        self._changed(worker)
        self._outbox.tell("join", worker=name, number=worker.number, host=worker.host, clock=clock)
        self._tell_group()
        return worker

    def dismiss(self, worker: Worker, presence: Presence, why: str) -> None:
        """A worker went, or is lost."""
        now_s = self._outbox.now_s
        clock = self._clocks.of(worker.name)
        worker.presence = presence
        self._clocks.leave(worker.name)
        self._changed(worker, clock)
        if presence is Presence.LOST:
            self.losses.append((now_s, worker.name, why))
            self._outbox.tell(
                "loss", worker=worker.name, number=worker.number, lease=worker.lease, reason=why
            )
        else:
            self._outbox.tell("leave", worker=worker.name, number=worker.number)
        self._tell_group()

    def keep(self, worker: Worker) -> None:
        """Write down where a worker is."""
        self._book.put_worker(worker, self._clocks.of(worker.name))

    def hear_all(self) -> None:
        """Everybody has just spoken: the time before the scheduler was started does not count."""
        for worker in self.alive:
            worker.heard_s = self._outbox.now_s

    def silent(self) -> list[Worker]:
        """Those that have said nothing for longer than a lease lasts."""
        since_s = self._outbox.now_s - self._terms.lease_s
        return [worker for worker in self.alive if worker.heard_s < since_s]

    def overdue(self) -> str:
        """Why the job cannot go on with so few, where it was waited long enough; else empty."""
        now_s = self._outbox.now_s
        if self.is_enough:
            self._short_since_s = None
            return ""
        if self._short_since_s is None:
            self._short_since_s = now_s
        waited_s = now_s - self._short_since_s
        if waited_s <= self._terms.timeout_s:
            return ""
        lost = "; ".join(f"{name} was lost {now_s - at_s:.0f} s ago: {why}"
                         for at_s, name, why in self.losses[-self._terms.fewest :])  # fmt: skip
        return (
            f"{len(self.alive)} of at least {self._terms.fewest} workers are here, for "
            f"{waited_s:.0f} s" + (f"; {lost}" if lost else "")
        )

    def _changed(self, worker: Worker, clock: int | None = None) -> None:
        if clock is None:
            clock = self._clocks.of(worker.name)
        self._clock[worker.name] = clock
        self._book.put_worker(worker, clock)
        rest = [each for each in self.alive if each is not worker]
        self.alive = sorted(rest + [worker] * worker.is_alive, key=lambda each: each.rank)

    def _tell_group(self) -> None:
        self._outbox.tell("group", workers=[each.name for each in self.alive])
