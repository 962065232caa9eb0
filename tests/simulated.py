"""A network in virtual time for state machines, with simple workers and servers to put on it.

A machine has a name, `handle(sender, message, now_s)`, `lost(name, now_s)` and `tick(now_s)`, which
all give messages by receiver. A server's place is its name.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from allfuse.roles import messages as say
from allfuse.roles.messages import SCHEDULER

Mail = list[tuple[str, say.Message]]


class Machine(Protocol):
    def handle(self, sender: str, message: say.Message, now_s: float) -> Mail: ...
    def lost(self, name: str, now_s: float) -> Mail: ...
    def tick(self, now_s: float) -> Mail: ...


@dataclass(frozen=True)
class Faults:
    """How unreliable the network is: shares of messages, and seconds."""

    drop: float = 0.0
    double: float = 0.0
    delay_s: float = 0.01  # at most, and so the order of messages is random


class Network:
    """Delivers messages between machines in random order; everything follows from the seed.

    Machines are ticked every `tick_s`; one with a `wake_s` that is not None also then. `watch` sees
    everything that is sent, before it is lost or delayed.
    """

    def __init__(
        self,
        seed: int,
        faults: Faults | None = None,
        *,
        tick_s: float = 0.5,
        watch: Callable[[str, str, say.Message], None] | None = None,
    ) -> None:
        self.random, self.faults, self.tick_s = random.Random(seed), faults or Faults(), tick_s
        self.now_s, self.delivered = 0.0, 0
        self.machines: dict[str, Machine] = {}
        self._watch = watch
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()

    def at(self, when_s: float, act: Callable[[], None]) -> None:
        """Do something at a time."""
        heapq.heappush(self._queue, (when_s, next(self._number), act))

    def add(self, name: str, machine: Machine) -> None:
        """A machine comes, or takes the place of one of that name."""
        self.machines[name] = machine
        self.at(self.now_s, lambda: self._tick(name, machine))

    def remove(self, name: str, *, tells: bool = True) -> None:
        """A machine is gone; others hear of it unless `tells` is false."""
        del self.machines[name]
        for other in list(self.machines) if tells else ():
            self.at(self.now_s + self._delay(), lambda other=other: self._lost(other, name))

    def run(self, until: Callable[[], bool], limit_s: float = 1000.0) -> None:
        """Go on until something is so; AssertionError where it never is."""
        while not until():
            assert self._queue, "nothing is left to happen"
            self.now_s, _, act = heapq.heappop(self._queue)
            assert self.now_s < limit_s, f"not done after {limit_s} s"
            act()

    def send(self, sender: str, mail: Mail) -> None:
        for to, message in mail:
            if self._watch is not None:
                self._watch(sender, to, message)
            copies = 1 if self.random.random() >= self.faults.drop else 0
            copies += self.random.random() < self.faults.double
            for _ in range(copies):
                self.at(
                    self.now_s + self._delay(),
                    lambda to=to, message=message: self._deliver(sender, to, message),
                )

    def _delay(self) -> float:
        return self.random.random() * self.faults.delay_s

    def _deliver(self, sender: str, to: str, message: say.Message) -> None:
        machine = self.machines.get(to)
        if machine is not None:
            self.delivered += 1
            self._then(to, machine, machine.handle(sender, message, self.now_s))

    def _lost(self, to: str, name: str) -> None:
        machine = self.machines.get(to)
        if machine is not None and name not in self.machines:
            self._then(to, machine, machine.lost(name, self.now_s))

    def _tick(self, name: str, machine: Machine) -> None:
        if self.machines.get(name) is machine:
            self._then(name, machine, machine.tick(self.now_s))
            self.at(self.now_s + self.tick_s, lambda: self._tick(name, machine))

    def _wake(self, name: str, machine: Machine) -> None:
        if self.machines.get(name) is machine:
            self._then(name, machine, machine.tick(self.now_s))

    def _then(self, name: str, machine: Machine, mail: Mail) -> None:
        self.send(name, mail)
        wake_s = getattr(machine, "wake_s", None)
        if wake_s is not None:
            machine.wake_s = None  # type: ignore[attr-defined]
            self.at(wake_s, lambda: self._wake(name, machine))


def join(name: str, **changed: Any) -> say.Join:
    """A worker's first message."""
    job: dict[str, Any] = {
        "host": "here",
        "fingerprint": "f",
        "steps_per_epoch": 4,
        "steps": None,
        "epochs": 2,
        "blueprint": {},
    }
    return say.Join(name=name, **{**job, **changed})


class FakeServer:
    """Carries out orders in their sequence, each once, and keeps them.

    Its weights are the leases that went into them.
    """

    def __init__(self, index: int, name: str, birth: int, applied: int = -1) -> None:
        self.index, self.name, self.birth, self.applied = index, name, birth, applied
        self.has_weights = applied >= 0
        self.is_found = False
        self.orders: list[tuple[int, list[Any]]] = []
        self.staged: set[int] = set()
        self.ended: set[int] = set()
        self.saved: int | None = None

    def tick(self, now_s: float) -> Mail:
        if self.is_found:
            return []
        serve = say.Serve(index=self.index, birth=self.birth, applied=self.applied, place=self.name)
        return [(SCHEDULER, serve)]

    def lost(self, name: str, now_s: float) -> Mail:
        return []

    def handle(self, sender: str, message: say.Message, now_s: float) -> Mail:
        match message:
            case say.Found() if not self.is_found:
                self.is_found, self.applied = True, message.sequence
            case say.Give() if self.is_found:
                self.has_weights = True
                return [(sender, say.Staged(lease=-1, birth=self.birth))]
            case say.Push() if self.is_found and message.lease not in self.ended:
                self.staged.add(message.lease)
                return [(sender, say.Staged(lease=message.lease, birth=self.birth))]
            case say.Orders() if self.is_found and self.has_weights:
                return self._carry_out(message)
        return []

    def _carry_out(self, message: say.Orders) -> Mail:
        mail: Mail = []
        for sequence, entry in enumerate(message.entries, message.first):
            if sequence != self.applied + 1:
                continue
            leases, to, dropped, save = entry
            for lease, _ in leases:
                assert lease in self.staged, f"lease {lease} was ordered, and is not here"
            self.ended.update(lease for lease, _ in leases)
            self.ended.update(dropped)
            self.staged -= self.ended
            self.applied = sequence
            self.orders.append((sequence, entry))
            self.saved = sequence if save else self.saved
            weights = say.Weights(sequence=sequence, piece=0, pieces=1)
            mail += [(worker, weights) for worker in to]
        return [*mail, (SCHEDULER, say.Applied(sequence=self.applied, saved=self.saved))]


class FakeWorker:
    """Takes leases, works for a random time, brings what it made; says again what is not answered.

    Attributes:
        final: the last lease, once it came. began: of each lease begun, from which version.
    """

    RETRY_S = 1.0

    def __init__(
        self, name: str, seed: int, work_s: float = 1.0, slow: float = 1.0, **job: Any
    ) -> None:
        self.name, self._random, self._job = name, random.Random(f"{seed} {name}"), job
        self._work_s = work_s * slow
        self.wake_s: float | None = None
        self.final: say.Lease | None = None
        self.refused = ""
        self.gone = False
        self.began: list[tuple[say.Lease, int]] = []
        self.heard: list[say.Message] = []
        self._places: list[str] = []
        self._gives = False
        self._lease: say.Lease | None = None
        self._phase = "joining"
        self._ready_s = 0.0
        self._spoke_s = float("-inf")
        self._read: dict[int, set[str]] = {}
        self._held = -1
        self._births: dict[int, dict[str, int]] = {}  # by lease, who said that it is there
        self._made: dict[int, int] = {}  # leases whose updates are kept, and from which version
        self._clock = -1
        self._finished: say.Finished | None = None

    def lost(self, name: str, now_s: float) -> Mail:
        return []

    def tick(self, now_s: float) -> Mail:
        mail: Mail = []
        if self.gone or self.refused:
            return mail
        if self._phase == "working" and now_s >= self._ready_s:
            assert self._lease is not None
            mail += self._push(self._lease.lease)
            self._phase, self._spoke_s = "bringing", now_s
        elif now_s - self._spoke_s >= self.RETRY_S:
            self._spoke_s = now_s
            mail += self._say_again() or [(SCHEDULER, say.Beat())]
        return mail

    def handle(self, sender: str, message: say.Message, now_s: float) -> Mail:
        self.heard.append(message)
        if self.gone or self.refused:
            return []
        match message:
            case say.Refused():
                self.refused = message.reason
            case say.Welcome():
                return self._welcome(message)
            case say.Lease():
                return self._take(message, now_s)
            case say.Weights():
                self._read.setdefault(message.sequence, set()).add(sender)
                self._begin(now_s)
                return self._leave()
            case say.Staged():
                return self._staged(sender, message, now_s)
            case say.Repush():
                self._places = message.places
                self._births.pop(message.lease, None)
                if message.lease in self._made:
                    return self._push(message.lease)
        return []

    def _say_again(self) -> Mail:
        lease = self._lease
        if self._phase == "joining":
            return [(SCHEDULER, join(self.name, **self._job))]
        mail: Mail = []
        if self._gives:
            mail += self._give()
        for made in self._made:
            if len(self._births.get(made, {})) < len(self._places):
                mail += self._push(made)
        if self._phase == "reading" and lease is not None:
            mail.append((SCHEDULER, say.Again(lease=lease.lease, sequence=lease.sequence)))
            mail.append((SCHEDULER, say.Again()))  # something else may be amiss
        elif self._phase == "waiting" and self._finished is not None:
            mail.append((SCHEDULER, self._finished))
        elif self._phase in ("waiting", "bringing"):
            mail.append((SCHEDULER, say.Again()))
        return mail

    def _welcome(self, message: say.Welcome) -> Mail:
        self._places = message.places
        if self._phase == "joining":
            self._phase = "waiting"
        if message.gives_weights:
            self._gives = True
            self._births.pop(-1, None)
            return self._give()
        return []

    def _give(self) -> Mail:
        return [(place, say.Give(piece=0, pieces=1)) for place in self._places]

    def _push(self, lease: int) -> Mail:
        push = say.Push(lease=lease, sequence=self._made[lease], piece=0, pieces=1, options=[])
        return [(place, push) for place in self._places]

    def _take(self, lease: say.Lease, now_s: float) -> Mail:
        if self.final is not None or (self._phase == "joining" and not self._places):
            return []
        own = self._lease
        if lease.lease == -1:
            if lease.sequence < 0 or lease.failed:
                self.final = lease
                return self._leave()
        elif own is not None and (own.lease == -1 or lease.lease < own.lease):
            return []  # late
        elif own is not None and lease.lease == own.lease and self._phase != "reading":
            return []
        if lease.clock > self._clock or lease.lease == -1:  # what was made before is ordered
            self._clock = lease.clock
            self._made, self._births = {}, {}
        self._lease, self._phase = lease, "reading"
        self._spoke_s = now_s
        self._begin(now_s)
        return self._leave()

    def _begin(self, now_s: float) -> None:
        lease = self._lease
        if self._phase != "reading" or lease is None:
            return
        if self._held != lease.sequence:
            if self._read.get(lease.sequence, set()) < set(self._places):
                return
            self._held, self._read = lease.sequence, {}
        if lease.lease == -1:
            self.final = lease
            return
        self._made[lease.lease] = lease.sequence
        self.began.append((lease, lease.sequence))
        self._phase = "working"
        self._ready_s = self.wake_s = now_s + self._random.random() * self._work_s

    def _staged(self, sender: str, message: say.Staged, now_s: float) -> Mail:
        if message.lease != -1 and message.lease not in self._made:
            return []
        births = self._births.setdefault(message.lease, {})
        births[sender] = message.birth
        if not set(self._places) <= births.keys():
            return []
        finished = say.Finished(
            lease=message.lease,
            sequence=self._made.get(message.lease, -1),
            births=[births[place] for place in self._places],
            loss=1.0,
            count=1.0 + message.lease % 3,
            rows=1,
            seconds=0.1,
        )
        if message.lease == -1:
            self._gives = False
        elif self._lease is not None and message.lease == self._lease.lease:
            self._phase, self._finished = "waiting", finished
        self._spoke_s = now_s
        return [(SCHEDULER, finished)]

    def _leave(self) -> Mail:
        if self.final is None:
            return []
        self.gone = True
        return [(SCHEDULER, say.Leave())]


class Auditor:
    """Reads what the scheduler says, and knows nothing else: it must add up.

    Every order is said the same each time; a lease is ordered once, and never after servers were
    told to forget it; no unit is ordered twice; nobody's update comes more than `bound` clocks
    after a lease of another was handed out.

    Attributes:
        leases: as first said, with their worker. orders: by sequence.
    """

    def __init__(self, bound: int | None = None) -> None:
        self.bound = bound
        self.leases: dict[int, tuple[str, say.Lease]] = {}
        self.orders: dict[int, list[Any]] = {}
        self.committed: dict[int, int] = {}
        self.units: dict[tuple[int, int], int] = {}
        self.dropped: set[int] = set()
        self.due: list[tuple[str, int]] = []
        self.highest = 0

    def watch(self, sender: str, to: str, message: say.Message) -> None:
        if isinstance(message, say.Lease):
            self._lease(to, message)
        elif isinstance(message, say.Orders):
            for sequence, entry in enumerate(message.entries, message.first):
                known = self.orders.get(sequence)
                assert known in (None, entry), f"order {sequence} was {known}, and is {entry}"
                if known is None:
                    self.orders[sequence] = entry
                    self._order(sequence, entry)

    def check(self, steps: int, parts: int) -> None:
        """Every part of every step was ordered, once."""
        wanted = {(step, part) for step in range(steps) for part in range(parts)}
        assert self.units.keys() == wanted
        assert sorted(self.orders) == list(range(len(self.orders)))

    def _lease(self, to: str, message: say.Lease) -> None:
        if message.lease < 0:
            return
        worker, first = self.leases.setdefault(message.lease, (to, message))
        assert worker == to, f"lease {message.lease} is of {worker}, and was sent to {to}"
        assert message.sequence in self.orders
        if first is message:
            self.highest = max(self.highest, message.clock)
            self.due += [(kind, message.done) for kind in message.due]

    def _order(self, sequence: int, entry: list[Any]) -> None:
        leases, _, dropped, *_ = entry
        for lease, _ in leases:
            assert lease not in self.committed, f"lease {lease} is ordered twice"
            assert lease not in self.dropped, f"lease {lease} was revoked, and is ordered"
            self.committed[lease] = sequence
            _, said = self.leases[lease]
            for step in range(said.first_step, said.first_step + said.steps):
                unit = (step, said.part)
                assert unit not in self.units, f"{unit} by {self.units[unit]} and {lease}"
                self.units[unit] = lease
            if self.bound is not None:
                lag = self.highest - said.clock
                assert lag <= self.bound, f"{lag} clocks apart; allowed: {self.bound}"
        for lease in dropped:
            assert lease not in self.committed
        self.dropped.update(dropped)
