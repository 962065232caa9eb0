"""The scheduler: knows who is alive, hands out work, and puts updates in order.

A state machine without input or output, over a book from which it goes on where it is made again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from allfuse.base.errors import RunError
from allfuse.roles import messages as say
from allfuse.roles.book import Book
from allfuse.roles.clocks import Clocks
from allfuse.roles.course import Course, Outcome
from allfuse.roles.encounters import Log
from allfuse.roles.leases import Leases
from allfuse.roles.members import Members, Task
from allfuse.roles.ordering import Ordering
from allfuse.roles.outbox import Emit, Outbox
from allfuse.roles.records import Presence, Result, Server, State, Work, Worker
from allfuse.roles.terms import Terms

Messages = list[tuple[str, say.Message]]
ROWS = 1 << 53  # of a lease at most


class Scheduler:
    """Takes messages and the time, gives messages to send.

    All that a call decides is in the book before the call returns. Where a call raises, nothing of
    it is in the book, and another scheduler is to be made from that.

    Events, by `emit`: join, loss, leave (worker, number, ...), group (workers: all that are here),
    silent and expelled (worker: that is lost, whose process may still be there),
    commit (for each lease that is ordered), server_lost, server_restored (shard, lost: updates that
    its shard is without), snapshot (sequence that all servers have on disk), told (worker, event,
    data: from a worker), staleness (missed, lag: histograms) and done (reason, failed).

    Args:
        terms: what the job is held to.
        book: an empty one, or that of a scheduler that was.
        emit: takes events.

    Raises:
        RunError: the book is of a job with other terms.

    Example:
        scheduler = Scheduler(Terms(parts=4, sync=Ssp(3)), Book("runs/x/book.sqlite"))
        for to, message in scheduler.handle("w0", message, now_s=time.monotonic()):
            ...
    """

    def __init__(self, terms: Terms, book: Book, emit: Emit | None = None) -> None:
        self._terms, self._book, self._emit = terms, book, emit
        self._outbox = Outbox()
        self._write_terms()
        clocks = Clocks(terms.sync.bound, book.next_clock())
        self._members = Members(book, terms, self._outbox, clocks)
        self._ordering = Ordering(book, terms, self._outbox)
        self._course = Course(book, terms, self._outbox, clocks, self._members, self._ordering)
        self._is_new = True  # nobody was heard yet
        self._is_stirred = True  # something happened that may let the job go on
        self._gave_up = False
        self._expelled: dict[str, str] = {}  # workers that may not come again, and why

    @property
    def outcome(self) -> Outcome | None:
        """How the job ended, None until then."""
        return self._course.outcome

    @property
    def refused(self) -> dict[str, int]:
        """What came and was not taken, by reason."""
        return dict(self._outbox.refused)

    @property
    def done(self) -> int:
        """Batches that all parts have learned."""
        leases = self._course.leases
        return 0 if leases is None else leases.ledger.done

    @property
    def unsaved(self) -> list[int]:
        """After how many batches checkpoints were asked for that have not come about."""
        return self._course.saves.waiting

    @property
    def unwritten(self) -> str:
        """What servers could not write to disk in the end, and why; empty where they could."""
        if self._ordering.unwritten is None:
            return ""
        saved = self._ordering.saved
        updates = self._ordering.updates - self._book.updates_until(saved)
        return (
            f"of its weights {updates} updates are in no snapshot of the servers: "
            f"{self._ordering.unwritten[1]}"
        )

    @property
    def is_over(self) -> bool:
        """The job has ended, no worker is here any more, and the servers are through."""
        if self.outcome is None or self._members.alive:
            return False
        return self.outcome.failed or self._gave_up or self._ordering.is_settled

    def handle(self, sender: str, message: say.Message, now_s: float) -> Messages:
        """Take a message; what is to be sent, to whom."""
        return self._act(now_s, self._take, sender, message)

    def lost(self, name: str, now_s: float) -> Messages:
        """The connection of a worker or server has ended, or its process."""
        return self._act(now_s, self._lose, name)

    def tick(self, now_s: float) -> Messages:
        """Time has passed; call it a few times in `lease_s`, and in `resend_s`."""
        return self._act(now_s, self._tick)

    def _act(self, now_s: float, act: Callable[..., None], *args: Any) -> Messages:
        self._outbox.now_s = now_s
        if self._is_new:
            self._is_new = False
            self._members.hear_all()  # the time in which there was no scheduler does not count
        with self._book.transaction():
            act(*args)
            if self._is_stirred:
                self._is_stirred = False
                self._course.go_on()
        messages, events = self._outbox.empty()
        if self._emit is not None:
            for name, data in events:
                self._emit(name, **data)
        return messages

    def _write_terms(self) -> None:
        with self._book.transaction():
            written, own = self._book.get("terms"), self._terms.plain
            if written is None:
                self._book.put("terms", own)
            elif written != own:
                raise RunError(
                    f"the scheduler's book is of a job with {written}, and this one has {own}; "
                    "start the job with the plan that it had"
                )

    def _take(self, sender: str, message: say.Message) -> None:
        match message:
            case say.Join():
                self._join(sender, message)
            case say.Serve():
                self._serve(sender, message)
            case say.Applied():
                self._ordering.applied(sender, message)
                self._course.saves.written(self._ordering.saved)
            case say.Measured():
                self._measured(sender, message)
            case say.Stop():
                self._stop(message.reason)
            case (
                say.Finished()
                | say.Again()
                | say.Beat()
                | say.Leave()
                | say.Note()
                | say.Save()
                | say.Tell()
                | Log()
            ):
                worker, leases = self._speaker(sender), self._course.leases
                if worker is not None and leases is not None:
                    self._hear(leases, worker, message)
            case _:
                self._outbox.refused[f"a message of kind {message.kind}"] += 1

    def _hear(self, leases: Leases, worker: Worker, message: say.Message) -> None:
        match message:
            case say.Finished():
                self._brought(leases, worker, message)
            case Log() if self._course.circle is not None:
                self._course.circle.log(worker, message.logs)
            case say.Again():
                self._again(leases, worker, message)
            case say.Leave():
                self._dismiss(leases, worker, Presence.GONE, "it left")
            case say.Note():
                leases.note(message)
            case say.Save():
                ended, saved = self.outcome is not None, self._ordering.saved
                self._course.saves.take(worker.name, message, saved, ended=ended)
                self._is_stirred = True
            case say.Tell():
                self._outbox.tell(
                    "told", worker=worker.name, event=message.event, data=message.data
                )

    # Workers come and go.

    def _speaker(self, sender: str) -> Worker | None:
        """The worker that writes; one that was lost is here again."""
        worker = self._members.get(sender)
        if worker is None or worker.presence is Presence.GONE:
            self._outbox.refused["a worker that has not joined"] += 1
            return None
        if worker.presence is Presence.LOST:
            if sender in self._expelled:
                self._refuse(sender, self._expelled[sender])
                return None
            if not self._members.has_room:
                self._refuse(sender, "it was lost, and others have taken its place")
                return None
            self._admit(sender, worker.host)
        worker.heard_s = self._outbox.now_s
        return worker

    def _join(self, sender: str, message: say.Join) -> None:
        reason = self._expelled.get(sender, "") or self._members.objection(sender, message)
        known = self._members.get(sender)
        is_here = known is not None and known.is_alive
        if not reason and self.outcome is not None and not is_here:
            reason = f"the job has ended: {self.outcome.reason}"
        if reason:
            self._refuse(sender, reason)
            return
        if self._members.task is None:
            self._members.task = Task.of(message)
            self._book.put("task", self._members.task.plain)
            self._course.begin(self._members.task)
            for server in self._ordering.servers.values():
                self._ordering.welcome(server)
        if self._course.circle is not None:
            self._course.circle.come(sender, message.place)
        if known is not None and is_here:
            known.heard_s = self._outbox.now_s
            self._greet([known])
            self._course.remind(known)
        else:
            self._admit(sender, message.host)

    def _admit(self, name: str, host: str) -> None:
        if self._course.leases is not None:
            self._course.leases.rotation.forget(name)  # it may have been away for long
        self._greet([self._members.admit(name, host)])

    def _greet(self, workers: list[Worker]) -> None:
        self._course.greet(workers)
        self._is_stirred = True

    def _refuse(self, sender: str, reason: str) -> None:
        self._outbox.refused["a worker that does not fit"] += 1
        self._outbox.send(sender, say.Refused(reason=reason))

    def _dismiss(self, leases: Leases, worker: Worker, presence: Presence, why: str) -> None:
        """A worker went: what it has out may be handed to others, what it brought counts."""
        finishes = self._course.finishes(worker)
        told = worker.presence is Presence.FINAL  # so that its silence is no loss
        gone = told and not finishes
        self._members.dismiss(worker, Presence.GONE if gone else presence, why)
        if finishes:
            self._course.gone(worker)
        for work in list(leases.open.values()):
            if work.worker == worker.name and work.state is State.OUT:
                self._course.revoke(leases, work)
        self._is_stirred = True

    # Workers bring what they made.

    def _brought(self, leases: Leases, worker: Worker, message: say.Finished) -> None:
        circle = self._course.circle
        if circle is not None:
            circle.write(message.logs)
        if message.lease >= 0:
            self._finished(leases, worker, message)
        elif circle is None:
            self._given(worker, message)
        else:
            circle.give(worker)
            self._course.remind(worker)
            self._is_stirred = True

    def _finished(self, leases: Leases, worker: Worker, message: say.Finished) -> None:
        work = leases.open.get(message.lease)
        is_out = work is not None and work.worker == worker.name and work.state is State.OUT
        read = work.offered(message.sequence) if work is not None else None
        if work is None or not is_out or read is None:
            self._course.remind(worker)
        elif not (0 <= message.count < math.inf and 0 <= message.rows < ROWS):
            self._refuse(worker.name, f"it counted {message.count} in {message.rows} rows")
        elif not self._ordering.is_whole:
            pass  # it will be said again, when it is known what the servers have
        elif message.births != self._ordering.births:
            self._course.repush(work)
        else:
            names = Result.__dataclass_fields__
            leases.finish(work, Result(**{name: getattr(message, name) for name in names}))
            worker.base = read
            if worker.lease == work.lease:
                worker.lease = None
            self._course.repush_others(worker)
            self._is_stirred = True

    def _given(self, worker: Worker, message: say.Finished) -> None:
        if not self._ordering.lacking:
            self._course.remind(worker)
        elif self._ordering.is_whole and message.births == self._ordering.births:
            self._course.given()
            self._is_stirred = True
        else:
            self._greet([worker])

    def _again(self, leases: Leases, worker: Worker, message: say.Again) -> None:
        work = leases.of(worker)
        lease = work.lease if work is not None else -1
        if message.sequence is None:
            self._greet([worker])
            self._course.remind(worker)
            if self._course.circle is not None:
                self._course.circle.tell_one(worker)
        elif message.lease == lease and message.sequence == worker.held >= 0:
            if self._ordering.is_whole and not self._ordering.lacking:  # else it would be in vain
                self._course.unread.append(worker)
                self._is_stirred = True
        else:
            self._course.remind(worker)

    # Servers come and go.

    def _serve(self, sender: str, message: say.Serve) -> None:
        before = self._ordering.servers.get(message.index)
        was_up = before is not None and before.is_up
        arrival = self._ordering.serve(sender, message)
        self._is_stirred = True
        if arrival is None:
            return
        server = arrival.server
        if before is not None and was_up:
            self._tell_lost(before, "another one has come for its shard")
        if not arrival.is_here:
            self._ordering.lose(server)
            return
        if before is not None or arrival.lost:
            self._outbox.tell(
                "server_restored",
                shard=server.shard,
                place=server.place,
                sequence=server.found,
                lost=arrival.lost,
            )
        self._greet(self._members.alive)
        leases = self._course.leases
        if leases is not None:
            for work in list(leases.open.values()):
                self._bring_again(leases, work)

    def _measured(self, sender: str, message: say.Measured) -> None:
        server = self._ordering.by_name(sender)
        if server is not None:
            self._ordering.norms.hear(server, message)
            self._is_stirred = True

    def _bring_again(self, leases: Leases, work: Work) -> None:
        """A server has lost what it held of an update that is not ordered."""
        worker = self._members.get(work.worker)
        if worker is None or not worker.is_alive:
            self._course.revoke(leases, work)
            return
        if work.state is State.STAGED:
            leases.unstage(work)
        self._course.repush(work)

    def _tell_lost(self, server: Server, why: str) -> None:
        self._outbox.tell("server_lost", shard=server.shard, place=server.place, reason=why)

    # Time passes, the end.

    def _lose(self, name: str) -> None:
        worker, server = self._members.get(name), self._ordering.by_name(name)
        why, leases = "its connection ended", self._course.leases
        if server is not None and server.is_up:
            self._ordering.lose(server)
            if self.outcome is None:  # else it went, since it is not needed any more
                self._tell_lost(server, why)
        if worker is not None and worker.is_alive and leases is not None:
            self._dismiss(leases, worker, Presence.LOST, why)

    def _tick(self) -> None:
        leases, now_s = self._course.leases, self._outbox.now_s
        if leases is None:
            return
        for worker in self._members.silent():
            why = f"it said nothing for {now_s - worker.heard_s:.1f} s"
            self._dismiss(leases, worker, Presence.LOST, why)
            self._outbox.tell("silent", worker=worker.name)
        self._ordering.tick()
        late = self._ordering.overdue()
        if self.outcome is not None:
            self._gave_up = self._gave_up or bool(late)
        elif reason := self._members.overdue() or late or self._course.overdue():
            self._course.end(leases, Outcome(reason, failed=True))
            self._is_stirred = True
        else:
            may_work = self._ordering.is_whole and not self._ordering.lacking
            for work, why in leases.late(now_s, may_work=may_work):
                self._expel(leases, work, why)

    def _expel(self, leases: Leases, work: Work, why: str) -> None:
        """A worker gives signs of life, and does not get done: others are to have its work."""
        worker = self._members.get(work.worker)
        if worker is None or not worker.is_alive:
            return
        self._expelled[worker.name] = why
        self._refuse(worker.name, why)
        self._dismiss(leases, worker, Presence.LOST, why)
        self._outbox.tell("expelled", worker=worker.name)

    def _stop(self, reason: str) -> None:
        if self.outcome is None and not self._course.stop:
            self._course.stop = reason or "stopped"
            self._book.put("stop", self._course.stop)
            self._is_stirred = True
