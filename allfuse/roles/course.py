"""The course of a job: what is ordered next, who gets which work, and when it ends."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from allfuse.roles import messages as say
from allfuse.roles.book import Book
from allfuse.roles.circle import Circle
from allfuse.roles.clocks import Clocks
from allfuse.roles.leases import Leases
from allfuse.roles.members import Members, Task
from allfuse.roles.norms import clip_factor
from allfuse.roles.ordering import Ordering
from allfuse.roles.outbox import Outbox
from allfuse.roles.records import Commit, Offer, Presence, State, Work, Worker
from allfuse.roles.rotation import ALL
from allfuse.roles.saves import Saves
from allfuse.roles.terms import Terms


@dataclass(frozen=True)
class Outcome:
    """How a job ended. reason: in words. failed: it is an error."""

    reason: str
    failed: bool = False


class Course:
    """Decides. What came in has changed members, servers or leases; `go_on` draws the conclusions.

    Attributes:
        stop: why no more work is handed out, empty while it is.
        outcome: None until the end.
        unread: workers whose weights did not come.
        saves: checkpoints.
        circle: of workers that gossip, None where servers hold the weights.
    """

    def __init__(
        self,
        book: Book,
        terms: Terms,
        outbox: Outbox,
        clocks: Clocks,
        members: Members,
        ordering: Ordering,
    ) -> None:
        self._book, self._terms, self._outbox, self._clocks = book, terms, outbox, clocks
        self._members, self._ordering = members, ordering
        self.saves = Saves(book, outbox)
        self.circle = Circle(book, outbox, members) if terms.gossips else None
        self.stop: str = book.get("stop", "")
        end = book.get("end")
        self.outcome = None if end is None else Outcome(**end)
        self.unread: list[Worker] = []
        self._final_due: dict[str, list[str]] = book.get("final_due", {})
        if self.circle is not None:
            self.circle.collector = next(iter(self._final_due), "")
        self._is_finished: bool = book.get("finished", False)
        self._giver: Worker | None = None
        self._unwelcomed: dict[str, Worker] = {}
        self.leases: Leases | None = None
        self._clip: float | None = None
        if members.task is not None:
            self.begin(members.task)

    def begin(self, task: Task) -> None:
        """It is known what the job is."""
        self._ordering.blueprint, self._clip = task.blueprint, task.clip
        leases = self.leases = Leases(self._book, self._terms, self._clocks, task)
        for work in leases.open.values():
            worker = self._members.get(work.worker)
            if work.state is State.OUT and worker is not None:
                worker.lease, worker.held = work.lease, work.offers[-1].sequence

    def go_on(self) -> None:
        """Order what is ready, hand out what may be handed out."""
        leases, ordering = self.leases, self._ordering
        if leases is None:
            return
        self._welcome()
        has_weights = ordering.current >= 0 or (not self._is_lacking and ordering.is_whole)
        if has_weights:
            while self._advance(leases):
                pass
        elif self.stop and self.outcome is None:
            self.end(leases, Outcome(self.stop))
        if not has_weights or (self.outcome is not None and self.outcome.failed):
            for worker in self._finals(leases, -1):
                self.remind(worker)
        if self.circle is not None:
            self.circle.tell()

    @property
    def _is_lacking(self) -> bool:
        """Servers have no weights; where workers gossip nobody has any, and nobody ever had."""
        if self.circle is None:
            return bool(self._ordering.lacking)
        return not self.circle.ready and not self._ordering.updates

    def overdue(self) -> str:
        """Why the job cannot go on, where workers gossip; empty where it can."""
        if self.circle is None:
            return ""
        return self.circle.overdue(self._ordering.updates > 0, self._terms.timeout_s)

    def end(self, leases: Leases, outcome: Outcome) -> None:
        """No more work. Leases that are still out come to nothing."""
        for work in list(leases.open.values()):
            self.revoke(leases, work)
        self.outcome = outcome
        self._book.put("end", {"reason": outcome.reason, "failed": outcome.failed})
        self._outbox.tell("staleness", **leases.staleness.plain())
        self._outbox.tell(
            "done", reason=outcome.reason, failed=outcome.failed, done=leases.ledger.done
        )

    def greet(self, workers: Iterable[Worker]) -> None:
        """These are to hear where the servers are, as soon as all of those are there."""
        self._unwelcomed.update((worker.name, worker) for worker in workers)

    def remind(self, worker: Worker) -> None:
        """Tell a worker once more what it is to do."""
        leases = self.leases
        assert leases is not None, "a worker without a job"
        work = leases.of(worker)
        if self.outcome is not None and worker.presence is Presence.FINAL:
            due = self._final_due.get(worker.name, [])
            last = leases.last(self.outcome.reason, self.outcome.failed, worker.held, due)
            self._outbox.send(worker.name, last)
        elif work is not None:
            self._outbox.send(worker.name, leases.message(work))
        self.repush_others(worker)

    def repush(self, work: Work) -> None:
        message = say.Repush(lease=work.lease, places=self._ordering.places)
        self._outbox.send(work.worker, message)

    def repush_others(self, worker: Worker) -> None:
        """What a worker brought before its present lease, and a server has lost since."""
        if self.leases is not None and self._terms.in_step:
            for work in self.leases.open.values():
                is_other = work.worker == worker.name and work.lease != worker.lease
                if is_other and work.state is State.OUT:
                    self.repush(work)

    def revoke(self, leases: Leases, work: Work) -> None:
        """A lease comes to nothing."""
        leases.revoke(work)
        worker = self._members.get(work.worker)
        if worker is not None and worker.lease == work.lease:
            worker.lease = None

    def given(self) -> None:
        """All servers have weights."""
        self._ordering.give()
        self._giver = None

    def _welcome(self) -> None:
        """Say where the servers are, and to one worker that it is to bring them weights."""
        ordering, members = self._ordering, self._members
        if not ordering.is_whole:
            return
        if self._giver is not None and not self._giver.is_alive:
            self._giver = None
        lacking = self._is_lacking
        if lacking and self._giver is None and members.alive:
            self._giver = max(members.alive, key=lambda worker: (worker.held, -worker.number))
            self.greet([self._giver])
        for worker in self._unwelcomed.values():
            if worker.is_alive:
                gives = lacking and worker is self._giver
                message = say.Welcome(
                    number=worker.number, places=ordering.places, gives_weights=gives
                )
                self._outbox.send(worker.name, message)
        self._unwelcomed.clear()

    def _advance(self, leases: Leases) -> bool:
        """One order at most; whether there may be another."""
        ordering, sequence = self._ordering, self._ordering.current + 1
        works, factor = self._ready(leases)
        before = leases.ledger.done
        commits = leases.commit(works, sequence, ordering.updates)
        self._count(works)
        moves = any(commit.weight for commit in commits)
        offer = Offer(sequence, ordering.updates + moves, self._clocks.low)
        told = self._grant(leases, offer) + self._offer_again(leases, offer)
        is_last = self._is_at_end(leases)
        if is_last:
            self.end(leases, Outcome(self.stop or "all work is done"))
        told += self._finals(leases, sequence)
        to = [worker.name for worker in told if worker.held == sequence]
        sent = {worker.name: leases.sends(worker) for worker in told}
        of = {name: fragment for name, fragment in sent.items() if fragment != ALL}
        hold = leases.keeps and any((work := leases.of(each)) and work.due for each in told)
        save = hold or self.saves.is_wanted
        if commits or to or is_last or save:
            order = ordering.place(
                commits, to, leases.drop(), of=of, factor=factor, save=save, is_last=is_last
            )
            if order.save:
                self.saves.placed(order, leases.ledger, hold=hold)
                if self.circle is not None:
                    self.saves.written(order.sequence)
        for work, commit in zip(works, commits, strict=True):
            is_whole = work is works[-1]  # a step is done with the last of its parts
            self._tell_commit(work, commit, leases.ledger.done if is_whole else before)
        for worker in told:
            self.remind(worker)
        return bool(self._ready(leases)[0])

    def _ready(self, leases: Leases) -> tuple[list[Work], float]:
        """Leases whose updates are to be ordered now, together, and by what they are shortened.

        None while servers measure them; a norm that is no number ends the job.
        """
        works, ordering = leases.ready(), self._ordering
        weights = leases.weights(works)
        pairs = [[w.lease, weight] for w, weight in zip(works, weights, strict=True) if weight]
        if self._clip is None or not pairs or self.outcome is not None:
            return works, 1.0
        norm = ordering.norms.ask(pairs, ordering.servers.values())
        if norm is None:
            return [], 1.0
        if not math.isfinite(norm):
            step = leases.ledger.first_step(works[0].unit)
            why = (
                f"the norm of the gradient is {norm} at step {step}; the weights were not changed; "
                "next: a smaller learning rate, or look at the samples of this step"
            )
            self.end(leases, Outcome(why, failed=True))
            return [], 1.0
        return works, clip_factor(norm, self._clip)

    def _count(self, works: list[Work]) -> None:
        """Clocks whose updates are ordered."""
        if self._terms.in_step and works:
            for worker in self._members.alive:
                self._clocks.advance(worker.name, works[0].clock + 1)
        elif works:
            (work,) = works
            self._clocks.advance(work.worker, work.clock + 1)  # who has just brought it is here

    def _grant(self, leases: Leases, offer: Offer) -> list[Worker]:
        """Leases for those who wait, as far as there is work that they may begin."""
        goes_on = not self.stop or (self._terms.in_step and bool(leases.open))
        if self.outcome is not None or not goes_on or not self._members.is_enough:
            return []
        able = self._members.alive if self.circle is None else self.circle.ready
        if len(able) < self._terms.fewest:
            return []
        waiting = [worker for worker in able if worker.lease is None]
        if not self._terms.in_step:
            waiting.sort(key=lambda worker: self._clocks.of(worker.name))
        granted = []
        for worker in waiting:
            if leases.available() is None:
                break
            if self._terms.in_step or self._clocks.may_begin(worker.name):
                base = worker.base
                is_fresh = base is not None and base.updates == offer.updates
                if self._terms.fragments > 1 and not leases.has_begun(worker):
                    is_fresh = False  # what it takes in is older than its base
                if leases.keeps and leases.due:
                    is_fresh = False  # a checkpoint may be of these weights
                leases.grant(worker, base if base is not None and is_fresh else offer)
                granted.append(worker)
        return granted

    def _offer_again(self, leases: Leases, offer: Offer) -> list[Worker]:
        """Weights of the next version for those who did not get their last ones."""
        again, self.unread = [worker for worker in self.unread if worker.is_alive], []
        for worker in again:
            work = leases.of(worker)
            if work is not None:
                leases.offer(work, offer)
            worker.held = offer.sequence
            if work is None:
                self._members.keep(worker)
        return again

    def _is_at_end(self, leases: Leases) -> bool:
        over = leases.ledger.is_complete or bool(self.stop)
        works = leases.open.values()
        stuck = not self._members.is_enough and all(w.state is not State.OUT for w in works)
        return self.outcome is None and over and (not works or stuck)

    def _finals(self, leases: Leases, sequence: int) -> list[Worker]:
        """Those who are to hear of the end now: of one that did not fail first the one who is to
        measure and export the model, and the others once that has left."""
        if self.outcome is None:
            return []
        told = [each for each in self._members.alive if each.presence is not Presence.FINAL]
        if self.circle is not None and not self.outcome.failed:
            told = self._gather(self.circle, told)
        elif not self.outcome.failed and not self._is_finished:
            told.sort(key=lambda each: each.host != self._members.home)  # the run folder is there
            told = [] if self._final_due else told[:1]
        for worker in told:
            worker.presence = Presence.FINAL
            worker.held = -1 if self.outcome.failed else sequence
            if not (self.outcome.failed or self._is_finished or self._final_due):
                self._set_final_due({worker.name: [*leases.take_due(), "finish"]})
            self._members.keep(worker)
        return told

    def _gather(self, circle: Circle, told: list[Worker]) -> list[Worker]:
        """All hear of the end at once, since one needs the weights of the others: the first."""
        if self._final_due or self._is_finished or not circle.ready:
            return told
        first = circle.ready[0]
        circle.collector = first.name
        return [first, *(each for each in told if each is not first)]

    def finishes(self, worker: Worker) -> bool:
        """Whether a worker was told to measure and export the model, and has not left yet."""
        return worker.name in self._final_due and not self._is_finished

    def gone(self, worker: Worker) -> None:
        """One who finishes the job has left, so it is done; or is lost, and another one is to."""
        if worker.presence is Presence.GONE:
            self._is_finished = True
            self._book.put("finished", True)
            return
        due = [kind for kind in self._final_due[worker.name] if kind != "finish"]
        if self.leases is not None:
            self.leases.fall_due(due)
        self._set_final_due({})

    def _set_final_due(self, due: dict[str, list[str]]) -> None:
        self._final_due = due
        self._book.put("final_due", due)

    def _tell_commit(self, work: Work, commit: Commit, done: int) -> None:
        result = work.result
        assert result is not None
        self._outbox.tell(
            "commit",
            **commit._asdict(),
            worker=work.worker,
            clock=work.clock,
            block=work.unit.block,
            part=work.unit.part,
            loss=result.loss,
            count=result.count,
            rows=result.rows,
            seconds=result.seconds,
            done=done,
        )
