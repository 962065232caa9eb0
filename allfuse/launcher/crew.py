"""A crew: groups of workers that may come and go, servers, and a scheduler, on this machine."""

from __future__ import annotations

import functools
import os
import pickle
import secrets
import socket
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from allfuse.base.errors import Interrupted, WorkerFailed
from allfuse.launcher.channel import Channel
from allfuse.launcher.crewmate import SCHEDULER, SERVER, WORKER, CrewRequest
from allfuse.launcher.generation import RESTARTS, OnLoss
from allfuse.launcher.local import (
    current_folder,
    flush_output,
    open_store,
    pack_function,
    rank_facts,
    threads_each,
)
from allfuse.launcher.outcome import Outcome, is_nothing, judge
from allfuse.launcher.signals import asked_to_stop
from allfuse.launcher.store import LOOPBACK
from allfuse.launcher.watch import Watch
from allfuse.launcher.zygotes import Zygote, borrowed, warm_up

if TYPE_CHECKING:
    from allfuse.base.torch_private import Store


@dataclass(frozen=True, kw_only=True)
class Crew:
    """What is started.

    worker: what every rank of every group runs; the result of the first group that has one counts.
    None where workers are started otherwise.
    scheduler, server: what the roles run; None where they are elsewhere. A server is told its
    index.
    plan, inner: of the whole job, and of one group. groups, ranks: how many groups of how many.
    on_loss: what a killed worker means to the others.
    place: of a scheduler elsewhere. listen: "ADDRESS:PORT" for workers of other hosts to join.
    address: of this host, where the crew spans several.
    """

    worker: Callable[[], Any] | None
    scheduler: Callable[[], Any] | None
    server: Callable[[int], Any] | None
    servers: int
    plan: str
    inner: str
    groups: int
    ranks: int
    on_loss: OnLoss = "continue"
    token: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    place: str | None = None
    listen: str | None = None
    address: str | None = None


@dataclass(frozen=True)
class Part:
    """One process of a crew: its request and function, packed. run: where it meets its group."""

    role: str
    index: int
    rank: int
    run: str
    request: bytes
    function: bytes


def launch_crew(crew: Crew, *, threads: int | None = None, timeout_s: float = 300.0) -> Any:
    """Run a crew; what rank 0 of its first group returned that returned anything.

    A worker that is killed takes its group with it; the others go on, or not, as `on_loss` says,
    and a group that is started again is a new one. A server or the scheduler is started again, and
    goes on from what it saved.

    Raises:
        UserError: a function or result cannot be pickled, or a worker raised one.
        WorkerFailed: a worker raised another error, or all were lost, or a role failed.
        Interrupted: Ctrl-C; see `launch_local`.
    """
    with asked_to_stop() as signals:
        warm_up()
        assert crew.worker is not None
        packed = {WORKER: pack_function(crew.worker)}
        if crew.scheduler is not None:
            packed[SCHEDULER] = pack_function(crew.scheduler)
        from allfuse.base.torch_private import PrefixStore

        store, run = open_store(), uuid.uuid4().hex
        threads = threads or threads_each(crew.groups * crew.ranks)
        make = functools.partial(
            make_part,
            crew,
            store=(LOOPBACK, store.port),
            run=run,
            threads=threads,
            timeout_s=timeout_s,
        )
        parts = []
        if crew.scheduler is not None:
            parts.append(make(SCHEDULER, 0, 0, packed[SCHEDULER]))
        for index in range(crew.servers if crew.server is not None else 0):
            assert crew.server is not None
            packed_server = pack_function(functools.partial(crew.server, index))
            parts.append(make(SERVER, index, 0, packed_server))

        def make_group(index: int, attempt: int) -> list[Part]:
            ranks = range(crew.ranks)
            return [make(WORKER, index, rank, packed[WORKER], attempt) for rank in ranks]

        for group in range(crew.groups):
            parts += make_group(group, 0)
        flush_output()
        with borrowed() as zygote:
            watch = CrewWatch(
                zygote, signals, crew, lambda run: PrefixStore(run, store), make_group
            )
            try:
                for part in parts:
                    watch.start_part(part)
                watch.until_all_ended()
            finally:
                watch.close()
    return judge_crew(watch.workers, watch.roles, interrupted=watch.stops > 0)


def make_part(
    crew: Crew,
    role: str,
    index: int,
    rank: int,
    function: bytes,
    attempt: int = 0,
    *,
    store: tuple[str, int],
    run: str,
    threads: int,
    timeout_s: float,
) -> Part:
    """A process of a crew that meets the others at a store, under the name of the run."""
    from allfuse.launcher.worker import Request

    is_worker = role == WORKER
    size = crew.ranks if is_worker else 1
    meeting = f"{run}/{role}{index}/{attempt}"
    request = Request(
        rank=rank,
        size=size,
        run=meeting,
        store=store,
        plan=crew.inner,
        threads=threads if is_worker else 1,
        timeout_s=timeout_s,
        folder=current_folder(),
        environment={**os.environ, **(rank_facts(rank, size, store[1]) if is_worker else {})},
        path=list(sys.path),
        command=list(sys.argv),
        crew=CrewRequest(
            role=role,
            index=index,
            run=run,
            plan=crew.plan,
            token=crew.token,
            place=crew.place,
            listen=crew.listen,
            address=crew.address,
            local_rank=index * crew.ranks + rank if is_worker else 0,
            local_size=crew.groups * crew.ranks if is_worker else 1,
        ),
    )
    return Part(role, index, rank, meeting, pickle.dumps(request), function)


class CrewWatch(Watch):
    """Looks after a crew: a lost worker ends its group only, a lost role is started again."""

    def __init__(
        self, zygote: Zygote, signals: socket.socket, crew: Crew,
        board_of: Callable[[str], Store], make_group: Callable[[int, int], list[Part]],
    ) -> None:  # fmt: skip
        super().__init__(zygote, signals, self._tell_group)
        self.crew, self._board_of, self._make_group = crew, board_of, make_group
        self.parts: list[Part] = []
        self._restarts: dict[tuple[str, int], int] = {}
        self._released = False

    def start_part(self, part: Part) -> None:
        self.parts.append(part)
        self.start(part.request, part.function)
        same = sum(each.role == part.role and each.index == part.index for each in self.parts)
        again = "" if same <= self.crew.ranks or part.role != WORKER else ", started again"
        name = "the scheduler" if part.role == SCHEDULER else f"{part.role} {part.index}"
        self.outcomes[-1].name = f"{name}{again}"

    def part_of(self, outcome: Outcome) -> Part:
        return self.parts[outcome.rank]

    @property
    def workers(self) -> list[Outcome]:
        return [each for each in self.outcomes if self.part_of(each).role == WORKER]

    @property
    def roles(self) -> list[Outcome]:
        return [each for each in self.outcomes if self.part_of(each).role != WORKER]

    def _tell_group(self, rank: int, how: str) -> None:
        """The other ranks of a group hear that one of them is lost."""
        part = self.parts[rank]
        if part.role == WORKER:
            self._board_of(part.run).set(f"lost/{part.rank}", how)

    def _has_ended(self, channel: Channel, outcome: Outcome, status: int) -> None:
        super()._has_ended(channel, outcome, status)
        self._restart_group(self.part_of(outcome))
        if not self._released and self._is_done:
            self._released = True  # roles have nobody to work for any more
            self._say_stop(self.roles)

    def _restart_group(self, part: Part) -> None:
        """Start a group anew once all its ranks have ended, where one of them was killed."""
        if part.role != WORKER or self.crew.on_loss != "restart":
            return
        group = [each for each in self.workers if self.part_of(each).run == part.run]
        ended = all(each.status is not None for each in group)
        killed = any(each.is_lost and each.failure is None for each in group)
        if ended and killed and self._may_restart(part):
            for again in self._make_group(part.index, self._restarts[part.role, part.index]):
                self.start_part(again)

    @property
    def _is_done(self) -> bool:
        """Whether nobody works any more: here, or at all where others may have joined."""
        schedulers = [each for each in self.roles if self.part_of(each).role == SCHEDULER]
        if schedulers and schedulers[-1].status is not None:
            return True  # it is not started again
        ended = all(each.status is not None for each in self.workers)
        goes_on = self.crew.listen is not None and all(each.is_lost for each in self.workers)
        return ended and (not goes_on or self.stops > 0)

    def _note_failure(self, outcome: Outcome) -> None:
        part = self.part_of(outcome)
        killed = outcome.failure is None and not outcome.killed_here
        lost = killed or (outcome.failure is not None and outcome.failure.peer_lost)
        if part.role == WORKER and lost and self.crew.on_loss != "stop":
            outcome.is_lost = True
            return
        if part.role != WORKER and killed and not self._released and self._may_restart(part):
            outcome.is_lost = True
            self.start_part(part)
            return
        super()._note_failure(outcome)

    @property
    def _only_missed_ones_left(self) -> bool:
        """Those are known by their ranks in a group, which goes without them or ends."""
        return False

    def _may_restart(self, part: Part) -> bool:
        key = (part.role, part.index)
        self._restarts[key] = self._restarts.get(key, 0) + 1
        return self._restarts[key] <= RESTARTS and self.stops == 0

    def _stop(self) -> None:
        """Workers end after their step, and tell the scheduler; roles end after them."""
        self.stops += len(self.signals.recv(16))
        if self.stops > 1:
            self._kill()
            return
        self._say_stop(self.workers)

    def _say_stop(self, outcomes: Sequence[Outcome]) -> None:
        from allfuse.launcher.worker import STOP

        for outcome in outcomes:
            channel = self.channels[outcome.rank]
            if outcome.status is None:
                channel.post(STOP)
                channel.push()


def judge_crew(workers: Sequence[Outcome], roles: Sequence[Outcome], interrupted: bool) -> Any:
    """The result of the first worker that has one, None where others have it; else raises for what
    failed first."""
    failed = [each for each in (*workers, *roles) if each.result is None and not each.is_lost]
    if failed:
        return judge(failed, interrupted)
    for outcome in workers:
        if outcome.result is not None and not is_nothing(outcome.result):
            return judge([outcome], interrupted)
    if interrupted:
        raise Interrupted("interrupted; the workers were killed")
    if any(each.name == "the scheduler" and each.result is not None for each in roles):
        return None  # others have joined, and ended the job
    lost = [each for each in workers if each.is_lost]
    if lost:
        return judge(lost, interrupted)
    raise WorkerFailed("no worker returned a result", rank=-1)
