"""Leases: who works on which unit, from which weights, until its update is ordered."""

from __future__ import annotations

from collections.abc import Iterable

from allfuse.roles import messages as say
from allfuse.roles.book import Book
from allfuse.roles.clocks import Clocks, Staleness
from allfuse.roles.ledger import Ledger, Unit
from allfuse.roles.members import Task
from allfuse.roles.records import Commit, Offer, Result, State, Work, Worker
from allfuse.roles.rotation import ALL, Rotation, Turn
from allfuse.roles.terms import Terms
from allfuse.split.data import Stretch

KINDS = ("evaluate", "save")
LONGER = 20  # times the longest step yet, which a worker may take for one
SHORTEST = 6  # times the silence after which a worker is lost, which it may take at least


class Leases:
    """The leases that are open: out with a worker, or staged on all servers.

    A lease ends in one of two ways: its update is ordered, or it is revoked and its unit is given
    back. What is not open can neither be ordered nor revoked.

    Attributes:
        open: by number.
        forget: revoked ones that servers may still hold something of.
        due: what the next worker that gets a lease is to do.
        notes: by name, with the batches that were done when each was made.
        keeps: whether checkpoints are made from time to time.
    """

    def __init__(self, book: Book, terms: Terms, clocks: Clocks, task: Task) -> None:
        self._book, self._terms, self._clocks = book, terms, clocks
        rest = [[Stretch(*each) for each in block] for block in book.get("rest", [])]
        begin = book.get("begin", 0)
        self.ledger = Ledger(
            terms.parts, terms.every, task.limit, fragments=terms.fragments, begin=begin, rest=rest
        )
        self.rotation = Rotation(terms.fragments)
        if terms.fragments > 1:
            for work, _ in sorted(book.history(), key=lambda pair: pair[0].lease):
                self._turn(work)
        self.keeps = task.every("save_every") is not None
        self.staleness = Staleness()
        self._every = {kind: task.every(f"{kind}_every") for kind in KINDS}
        works = book.open_work()
        self.open = {work.lease: work for work in works if work.state is not State.REVOKED}
        self.forget = [work.lease for work in works if work.state is State.REVOKED]
        self._next = book.next_lease()
        self._longest_s: float | None = None  # that a step took
        self.ledger.restore(book.consumed(), (work.unit for work in self.open.values()))
        for commit in book.commits(0, book.newest()[0]):
            self.staleness.count(commit.missed, commit.lag)
        self.due: list[str] = book.get("due", [])
        done = self.ledger.done
        self.notes = {name: note for name, note in book.notes().items() if note[0] <= done}

    def of(self, worker: Worker) -> Work | None:
        """What a worker works on."""
        return None if worker.lease is None else self.open.get(worker.lease)

    def available(self) -> Unit | None:
        """A unit that may be handed out now; in step only those of one block at a time."""
        unit = self.ledger.upcoming
        if unit is None or not self._terms.in_step or not self.open:
            return unit
        block = next(iter(self.open.values())).unit.block
        return unit if unit.block == block else None

    def grant(self, worker: Worker, offer: Offer) -> Work:
        """Lease the next unit to a worker."""
        unit = self.ledger.take()
        assert unit is not None, "nothing is available"
        clock = unit.block if self._terms.in_step else self._clocks.of(worker.name)
        work = Work(self._next, worker.name, clock, unit, [offer], self.take_due())
        self._next += 1
        self.open[work.lease] = work
        worker.lease, worker.held = work.lease, offer.sequence
        self._book.put_work(work)
        return work

    def offer(self, work: Work, offer: Offer) -> None:
        """Other weights for a lease, since those before did not come."""
        work.offers.append(offer)
        self._book.put_offers(work)

    def finish(self, work: Work, result: Result) -> None:
        """The update is on all servers."""
        work.result, work.state = result, State.STAGED
        if not work.due:
            each_s = result.seconds / max(self.ledger.steps(work.unit), 1)
            self._longest_s = max(self._longest_s or 0.0, each_s)
        if self._terms.in_step:  # others are ordered before anything is said
            self._book.put_result(work)

    def unstage(self, work: Work) -> None:
        """The update is not on all servers any more."""
        work.state, work.since_s = State.OUT, None
        self._book.put_state(work)

    def revoke(self, work: Work) -> None:
        del self.open[work.lease]
        self.forget.append(work.lease)
        work.state = State.REVOKED
        self._book.put_state(work)
        self.ledger.give_back(work.unit)
        self.fall_due(work.due)

    def late(self, now_s: float, *, may_work: bool) -> list[tuple[Work, str]]:
        """Leases that are out for too long, and what to say of that.

        Too long is so by what others took for a step: nothing is before any was done, and a lease
        of many steps may rightly take longer than anything else is waited for.

        may_work: servers are there; the time without them does not count.
        """
        found, longest_s = [], self._longest_s
        for work in self.open.values():
            if work.since_s is None or not may_work or longest_s is None:
                work.since_s = now_s
                continue
            usual_s = LONGER * longest_s * self.ledger.steps(work.unit)
            limit_s = max(SHORTEST * self._terms.lease_s, usual_s)
            limit_s += self._terms.timeout_s if work.due else 0.0
            if work.state is State.OUT and now_s - work.since_s > limit_s:
                why = (
                    f"it has worked on one lease for {now_s - work.since_s:.0f} s, and may for "
                    f"{limit_s:.0f} s; no step before took longer than {longest_s:.1f} s"
                )
                found.append((work, why))
        return found

    def ready(self) -> list[Work]:
        """Leases whose updates are to be ordered now, together."""
        staged = [work for work in self.open.values() if work.state is State.STAGED]
        if not self._terms.in_step or not staged:
            return staged[:1]
        block = staged[0].unit.block
        whole = len(staged) == len(self.open) == self.ledger.parts_of(block)
        assert all(work.unit.block == block for work in self.open.values())
        return sorted(staged, key=lambda work: work.unit.part) if whole else []

    def brings(self, work: Work) -> int:
        """The fragment of the weights that an update is of, or `ALL`."""
        is_late = is_last_turn(self._terms, self.ledger, work.unit)
        return self.rotation.brings(work.clock, is_late=is_late)

    def takes(self, work: Work) -> int:
        """The fragment of the weights that a worker takes in for a lease, or `ALL`."""
        return self.rotation.takes(work.worker)

    def sends(self, worker: Worker) -> int:
        """The fragment that servers send a worker: all where something is done with all of them."""
        work = self.of(worker)
        return ALL if work is None or work.due else self.takes(work)

    def has_begun(self, worker: Worker) -> bool:
        """Whether a worker has an open lease besides."""
        return any(work.worker == worker.name for work in self.open.values())

    def weights(self, works: list[Work]) -> list[float]:
        """How much the updates of an order count; nothing where their losses are over nothing."""
        counts = [
            self.rotation.behind(work.worker, work.clock, self.brings(work), work.result.count)
            for work in works
            if work.result is not None
        ]
        total = sum(counts)
        if self._terms.in_step:
            return [count / total if total > 0 else 0.0 for count in counts]
        return [float(count > 0) for count in counts]

    def commit(self, works: list[Work], sequence: int, updates: int) -> list[Commit]:
        """Count samples as used and clocks as done. updates: ordered before these."""
        before, weights = self.ledger.done, self.weights(works)
        results = [work.result for work in works if work.result is not None]
        commits = []
        for place, (work, result) in enumerate(zip(works, results, strict=True)):
            read = work.offered(result.sequence)
            assert read is not None, "made from weights that were not offered"
            missed = updates - read.updates
            lag = 0 if self._terms.in_step else work.clock - read.low
            weight = weights[place] / (missed + 1 if self._terms.is_scaled else 1)
            commit = Commit(sequence, place, work.lease, weight, read.sequence, missed, lag)
            commits.append(commit)
            self.staleness.count(missed, lag)
            self.ledger.consume(work.unit)
            del self.open[work.lease]
            work.state = State.COMMITTED
            self._book.put_commit(work, commit)
        for work in sorted(works, key=lambda work: work.lease):
            self._turn(work)
        self._fall_due(before)
        return commits

    def _turn(self, work: Work) -> None:
        """A worker has brought what its turn was."""
        assert work.result is not None, "an update without a result was ordered"
        turn = Turn(work.lease, self.brings(work), work.result.count)
        self.rotation.add(work.worker, work.clock, turn)

    def drop(self) -> list[int]:
        """The leases that servers are to forget, once."""
        dropped, self.forget = self.forget, []
        for lease in dropped:
            self._book.put_dropped(lease)
        return dropped

    def take_due(self) -> list[str]:
        """What is due, which falls to whoever this is given to."""
        due = self.due
        if due:
            self._set_due([])
        return due

    def fall_due(self, kinds: Iterable[str]) -> None:
        """These are to be done by the next worker that something is given to."""
        self._set_due(self.due + [kind for kind in kinds if kind not in self.due])

    def note(self, message: say.Note) -> None:
        done, _ = self.notes.get(message.name, (-1, {}))
        if message.done >= done:
            self.notes[message.name] = message.done, message.state
            self._book.put_note(message.name, message.done, message.state)

    def message(self, work: Work) -> say.Lease:
        """What its worker is told."""
        stretch, last = self.ledger.stretch(work.unit), self.rotation.last(work.worker)
        return say.Lease(
            lease=work.lease,
            clock=work.clock,
            first_step=stretch.first,
            steps=stretch.steps,
            part=stretch.part,
            parts=stretch.parts,
            sequence=work.offers[-1].sequence,
            fragment=self.brings(work),
            takes=self.takes(work),
            follows=-1 if last is None else last.lease,
            done=self.ledger.done,
            due=list(work.due),
            notes=self.plain_notes() if work.due else {},
        )

    def last(self, reason: str, failed: bool, sequence: int, due: list[str]) -> say.Lease:
        """What a worker is told when there is no more work."""
        return say.Lease(
            lease=-1,
            clock=-1,
            first_step=-1,
            steps=0,
            part=0,
            parts=self._terms.parts,
            sequence=sequence,
            done=self.ledger.done,
            due=due,
            notes=self.plain_notes(),
            reason=reason,
            failed=failed,
            loss=self._book.newest_loss(),
        )

    def plain_notes(self) -> dict[str, object]:
        return {name: state for name, (_, state) in sorted(self.notes.items())}

    def _fall_due(self, before: int) -> None:
        done = self.ledger.done
        due = [
            kind
            for kind, every in self._every.items()
            if every is not None and before // every < done // every and kind not in self.due
        ]
        if due:
            self.fall_due(due)

    def _set_due(self, due: list[str]) -> None:
        if due != self.due:
            self.due = due
            self._book.put("due", due)


def is_last_turn(terms: Terms, ledger: Ledger, unit: Unit) -> bool:
    """Whether a worker may get no other unit after this one: in step of the last block, else of the
    last `every` steps."""
    if ledger.limit is None:
        return False
    end = ledger.first_step(unit) + ledger.steps(unit)
    return end >= ledger.limit if terms.in_step else end > ledger.limit - terms.every
