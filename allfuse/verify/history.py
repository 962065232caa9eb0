"""What a scheduler's book says happened: who made which update of which weights, in which order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from allfuse.base.errors import AllfuseError
from allfuse.roles.book import Book
from allfuse.roles.diary import Entry
from allfuse.roles.leases import is_last_turn
from allfuse.roles.ledger import Ledger, Unit
from allfuse.roles.records import Commit, Rebirth, State, Work
from allfuse.roles.rotation import Rotation, Turn
from allfuse.roles.terms import Terms
from allfuse.verify.layout import Layout

ROOM = 1 << 62  # more clocks than there are


@dataclass(frozen=True)
class Update:
    """An update that was ordered.

    number: of its worker, in the order of joining. first_step, steps, part: what it was made of.
    read: the version of the weights that it was made from. weight: what it counted. loss, count:
    the sum of losses that the worker told, and what their mean is over. options: of the optimizer.
    fragment: of the weights, that it is of, or `ALL`. behind: what losses were over of all that is
    in it; that of its own lease, where it is of all.
    """

    lease: int
    worker: str
    number: int
    clock: int
    first_step: int
    steps: int
    part: int
    read: int
    weight: float
    loss: float
    count: float
    options: list[dict[str, Any]]
    fragment: int
    behind: float


@dataclass(frozen=True)
class Event:
    """An order: updates in the order in which they are summed, then who got the weights.

    factor: by which their sum was shortened. of: the fragment that some of those readers got; the
    others got all.
    """

    sequence: int
    updates: list[Update]
    readers: list[str]
    factor: float = 1.0
    of: Mapping[str, int] = field(default_factory=dict)

    @property
    def moves(self) -> bool:
        """Whether anything in it counts: weights change."""
        return any(update.weight for update in self.updates)


class Share(NamedTuple):
    """A part of some steps' batches."""

    first_step: int
    steps: int
    part: int


@dataclass(frozen=True)
class Gossip:
    """What workers that gossip did.

    logs: of each, in its order. shares: what each lease was for, whether it counted or not.
    collector: who averaged all weights at the end.
    """

    logs: dict[str, list[Entry]]
    shares: dict[int, Share]
    collector: str

    @classmethod
    def read(cls, book: Book, ledger: Ledger) -> Gossip:
        logs = {worker: [Entry(*each) for each in log] for worker, log in book.logs().items()}
        shares = {
            lease: Share(ledger.first_step(unit), ledger.steps(unit), unit.part)
            for lease, unit in book.units().items()
        }
        return cls(logs, shares, next(iter(book.get("final_due") or {}), ""))


@dataclass
class History:
    """A run's order of events.

    limit: steps that were to be done. taken_back: leases that were handed out and never counted.
    rebirths: servers that had to be started again. restarts: after which orders the job was started
    again. stopped: why before its limit, if it was.
    begin: the step of the checkpoint that it went on from; what was before is not told.
    gossip: where no servers held the weights. layout: how servers held them.
    """

    events: list[Event]
    limit: int | None
    taken_back: int
    rebirths: list[Rebirth] = field(default_factory=list)
    restarts: list[int] = field(default_factory=list)
    stopped: str = ""
    gossip: Gossip | None = None
    begin: int = 0
    layout: Layout = field(default_factory=lambda: Layout.of({}))

    @classmethod
    def read(cls, path: Path, terms: Terms) -> History:
        """From a book whose scheduler has ended.

        Raises:
            RunError: it cannot be read.
        """
        book = Book(path)
        try:
            task = book.get("task") or {}
            numbers = {worker.name: worker.number for worker, _ in book.workers()}
            orders = book.orders(0, book.newest()[0])
            ledger = _ledger_of(terms, limit_of(task))
            made = _updates(book, terms, ledger, numbers)
            tally = book.tally()
            return cls(
                [
                    Event(
                        order.sequence,
                        made.get(order.sequence, []),
                        order.to,
                        order.factor,
                        order.of,
                    )
                    for order in orders
                ],
                ledger.limit,
                sum(count for state, count in tally.items() if state is not State.COMMITTED),
                book.rebirths(),
                book.restarts(),
                book.get("stop") or "",
                Gossip.read(book, ledger) if terms.gossips else None,
                begin=book.get("begin", 0),
                layout=Layout.of(task),
            )
        finally:
            book.close()

    @property
    def updates(self) -> list[Update]:
        return [update for event in self.events for update in event.updates]

    @property
    def untold(self) -> str:
        """Which servers came again with weights that the book does not tell of; empty for none."""
        return ", ".join(
            f"server {each.shard} after order {each.born}"
            for each in self.rebirths
            if each.sequence < 0
        )

    def check(self, terms: Terms) -> None:
        """That the events can be those of the plan.

        Raises:
            AllfuseError: samples were learned from twice or never, an update was made of weights
                that its worker had not been sent, or it counted what it should not, or a worker was
                further ahead than the plan allows.
        """
        self._check_samples(terms)
        sent: dict[str, set[int]] = {}
        before = [0]  # updates ordered until each sequence
        for event in self.events:
            weights = _weights(event, before, terms)
            for update, weight in zip(event.updates, weights, strict=True):
                if update.read not in sent.get(update.worker, ()):
                    raise _wrong(
                        update, f"was made of version {update.read}, which it was not sent"
                    )
                if abs(update.weight - weight) > 1e-12 * weight:
                    raise _wrong(update, f"counted {update.weight}, and should have {weight}")
            for worker in event.readers:
                sent.setdefault(worker, set()).add(event.sequence)
            before.append(before[-1] + event.moves)
        _check_bound(self.events, terms)

    def _check_samples(self, terms: Terms) -> None:
        units = Counter((update.first_step, update.part) for update in self.updates)
        twice = sorted(unit for unit, count in units.items() if count > 1)
        if twice:
            step, part = twice[0]
            raise AllfuseError(f"the record says that part {part} of step {step} was learned twice")
        if self.limit is None or self.stopped:
            return
        ledger, wanted = _ledger_of(terms, self.limit), set()
        while (unit := ledger.take()) is not None:
            wanted.add((ledger.first_step(unit), unit.part))
        never = sorted(wanted - units.keys())
        if never:
            step, part = never[0]
            raise AllfuseError(
                f"the record says that {len(never)} of {len(wanted)} shares of work were never "
                f"learned from, part {part} of step {step} first"
            )


def limit_of(task: dict[str, Any]) -> int | None:
    """Steps of the whole run, as its first worker told them."""
    epochs, each = task.get("epochs"), task.get("steps_per_epoch")
    limits = [task.get("steps"), epochs * each if epochs is not None and each else None]
    return min((limit for limit in limits if limit is not None), default=None)


def _ledger_of(terms: Terms, limit: int | None) -> Ledger:
    return Ledger(terms.parts, terms.every, limit, fragments=terms.fragments)


def _updates(
    book: Book, terms: Terms, ledger: Ledger, numbers: dict[str, int]
) -> dict[int, list[Update]]:
    """Those of each sequence."""
    rotation = Rotation(terms.fragments)
    made: dict[int, list[tuple[Work, Commit]]] = {}
    for work, commit in book.history():
        made.setdefault(commit.sequence, []).append((work, commit))
    found: dict[int, list[Update]] = {}
    for sequence, pairs in made.items():
        found[sequence] = [
            _as_update(work, commit, terms, ledger, numbers, rotation) for work, commit in pairs
        ]
        for update in sorted(found[sequence], key=lambda update: update.lease):
            turn = Turn(update.lease, update.fragment, update.count)
            rotation.add(update.worker, update.clock, turn)
    return found


def _as_update(
    work: Work,
    commit: Commit,
    terms: Terms,
    ledger: Ledger,
    numbers: dict[str, int],
    rotation: Rotation,
) -> Update:
    result, unit = work.result, Unit(*work.unit)
    assert result is not None, "an update without a result was ordered"
    fragment = rotation.brings(work.clock, is_late=is_last_turn(terms, ledger, unit))
    return Update(
        lease=work.lease,
        worker=work.worker,
        number=numbers[work.worker],
        clock=work.clock,
        first_step=ledger.first_step(unit),
        steps=ledger.steps(unit),
        part=unit.part,
        read=commit.read,
        weight=commit.weight,
        loss=result.loss,
        count=result.count,
        options=result.options,
        fragment=fragment,
        behind=rotation.behind(work.worker, work.clock, fragment, result.count),
    )


def _weights(event: Event, before: list[int], terms: Terms) -> list[float]:
    """What the updates of an order count by the plan. before: updates until each sequence."""
    if terms.in_step:
        total = sum(update.behind for update in event.updates)
        return [update.behind / total if total > 0 else 0.0 for update in event.updates]
    weights = []
    for update in event.updates:
        missed = before[-1] - before[update.read + 1] if terms.is_scaled else 0
        weights.append((update.behind > 0) / (missed + 1))
    return weights


def _check_bound(events: list[Event], terms: Terms) -> None:
    """That no update of clock c was made while somebody who went on was before clock c - s."""
    bound = terms.sync.bound
    if bound is None or terms.in_step:
        return
    at: dict[str, int] = {}  # the clock of each worker
    last: dict[str, int] = {}  # the sequence of its last update
    for event in events:
        for update in event.updates:
            at.setdefault(update.worker, update.clock)
            last[update.worker] = event.sequence
    lows: list[int] = []  # the slowest, at each sequence
    for event in events:
        for update in event.updates:
            ahead = update.clock - lows[update.read]
            if ahead > bound:
                raise _wrong(update, f"was {ahead} clocks ahead; the plan allows {bound}")
            at[update.worker] = update.clock + 1
        lows.append(min((at[who] for who in at if last[who] > event.sequence), default=ROOM))


def _wrong(update: Update, what: str) -> AllfuseError:
    return AllfuseError(
        f"the record cannot be right: the update of {update.worker} for part {update.part} of step "
        f"{update.first_step} {what}"
    )
