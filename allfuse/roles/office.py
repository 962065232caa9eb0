"""The processes of the roles: a state machine at its desk, until the job is over."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from allfuse.base.errors import UserError, WorkerFailed
from allfuse.launcher import World, current_world
from allfuse.launcher.crewmate import Crewmate
from allfuse.link.post import Desk, Malformed
from allfuse.plan import as_plan
from allfuse.roles.book import Book
from allfuse.roles.lines import Lines
from allfuse.roles.messages import About, Beat, Hello, Join, Message, open_letter
from allfuse.roles.scheduler import Scheduler
from allfuse.roles.server import Server
from allfuse.roles.snapshots import Snapshots
from allfuse.roles.terms import terms_of

TICK_S = 0.2  # between two looks at the clock
BOOK = "scheduler.sqlite"
SNAPSHOTS = "servers"
NICENESS = 10  # of the thread that writes snapshots


class Audience(Protocol):
    """Those who watch a job; the scheduler tells them.

    `opens` comes with what the first worker said of the run, or `goes_on` where the scheduler takes
    over from one that was lost; both give the run's folder. `begins` tells what is done already:
    what the scheduler emits before that, by `event`, comes after it.
    """

    def opens(self, facts: dict[str, Any]) -> Path | None: ...

    def goes_on(self, run: dict[str, Any]) -> Path | None: ...

    def begins(self, done: int) -> None: ...

    def event(self, name: str, /, **data: Any) -> None: ...

    def close(self, error: BaseException | None) -> None: ...


def run_scheduler(make_audience: Callable[[Crewmate], Audience]) -> None:
    """What the scheduler's process does, until the job is over.

    Raises:
        WorkerFailed: the job cannot go on. RunError: the run folder cannot be used.
    """
    world, crew = _this_role()
    desk = crew.post().desk(crew.listens_at)
    crew.tell_scheduler(desk.place)
    audience = make_audience(crew)
    error: BaseException | None = None
    try:
        _schedule(world, crew, desk, audience)
    except BaseException as raised:
        error = raised
        raise
    finally:
        audience.close(error)
        desk.close()


def _schedule(world: World, crew: Crewmate, desk: Desk, audience: Audience) -> None:
    letters = _Letters(desk)
    terms = terms_of(as_plan(crew.plan), world.timeout_s)
    folder, early = _open_run(world, crew, letters, audience)
    if crew.run() is None:
        return  # it was stopped before anybody came
    book = Book(folder / BOOK if folder is not None else ":memory:")
    try:
        if folder is not None and early:
            _go_back(book, folder / SNAPSHOTS, terms.servers)
        scheduler = Scheduler(terms, book, emit=audience.event)
        for sender, message in early:
            letters.send(scheduler.handle(sender, message, time.monotonic()))
        audience.begins(scheduler.done)
        ticked_s = time.monotonic()
        while not scheduler.is_over and not (world.stop_requested.is_set() and _is_idle(scheduler)):
            for sender, message in letters.receive(TICK_S):
                if isinstance(message, Hello):
                    letters.send([(sender, _about(crew))])
                    continue
                if isinstance(message, Beat):
                    letters.send([(sender, message)])
                letters.send(scheduler.handle(sender, message, time.monotonic()))
            for name in desk.lost():
                letters.send(scheduler.lost(name, time.monotonic()))
            if time.monotonic() - ticked_s >= TICK_S:
                ticked_s = time.monotonic()
                letters.send(scheduler.tick(ticked_s))
        why = scheduler.unwritten
        for done in scheduler.unsaved or [scheduler.done] * bool(why):
            reason = why or "the servers did not write its weights"
            audience.event("not_saved", step=done, reason=reason)
        if scheduler.outcome is not None and scheduler.outcome.failed:
            raise WorkerFailed(scheduler.outcome.reason, rank=-1)
    finally:
        book.close()


def _is_idle(scheduler: Scheduler) -> bool:
    """Whether nothing is left to do when all workers have ended: servers may still write what the
    job came to, for which the scheduler waits as long as for all else."""
    return scheduler.outcome is None or scheduler.outcome.failed


def _go_back(book: Book, snapshots: Path, servers: int) -> None:
    """Where a run goes on: at the last version that all its servers have on disk."""
    if book.newest()[0] < 0 or not servers:
        return
    kept = [set(Snapshots(snapshots, index, servers).all()) for index in range(servers)]
    common = set.intersection(*kept)
    with book.transaction():
        book.strike(max(common, default=-1))


def _about(crew: Crewmate) -> About:
    run = crew.run()
    return About(plan=crew.plan, about={} if run is None else run["about"])


def _open_run(
    world: World, crew: Crewmate, letters: _Letters, audience: Audience
) -> tuple[Path | None, list[tuple[str, Message]]]:
    """The run's folder, once the first worker has said which, and what came until then."""
    early: list[tuple[str, Message]] = []
    run = crew.run()
    if run is not None:
        folder = audience.goes_on(run)
        if folder is None:
            raise UserError(
                "the scheduler was lost, and with it the order of updates, since the run has no "
                "folder; next: give the job a run folder (--out), from which it goes on"
            )
        return folder, early
    deadline = time.monotonic() + world.timeout_s
    while not world.stop_requested.is_set():
        came = letters.receive(TICK_S)
        early += [each for each in came if not isinstance(each[1], Hello)]
        for _, message in early:
            if isinstance(message, Join):
                return audience.opens(_facts_of(message)), early
        if time.monotonic() > deadline:
            raise WorkerFailed(f"no worker joined within {world.timeout_s:g} s", rank=-1)
    return None, early


def _facts_of(join: Join) -> dict[str, Any]:
    """What the first worker said of the run, and of the job."""
    unsaved = dict(zip(join.facts.get("unsaved", ()), join.tensors, strict=False))
    about = {"blueprint": join.blueprint, "steps_per_epoch": join.steps_per_epoch}
    return {**join.facts, **about, "unsaved": unsaved}


class _Letters:
    """Opens what comes to a desk; what is no message is counted and left."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def receive(self, timeout_s: float) -> list[tuple[str, Message]]:
        found = []
        for sender, letter in self.desk.receive(timeout_s):
            try:
                found.append((sender, open_letter(letter)))
            except Malformed:
                self.desk.refused["malformed"] += 1
        return found

    def send(self, mail: Iterable[tuple[str, Message]]) -> None:
        for name, message in mail:
            self.desk.send(name, message.letter())


def run_server(index: int) -> None:
    """What the process of a server does, until the launcher says that all is done.

    Raises:
        AllfuseError: it was ordered what it cannot do.
    """
    world, crew = _this_role()
    terms = terms_of(as_plan(crew.plan), world.timeout_s)
    post = crew.post()
    desk = post.desk()
    name = f"server {index}"
    scheduler = post.call(crew.scheduler(world.timeout_s), name)
    lines = Lines(post, desk, scheduler, name)
    birth = secrets.randbits(48)
    try:
        run = _await_run(world, crew)
        if run is None:
            return
        folder = run["folder"] and Path(run["folder"])
        with ThreadPoolExecutor(1, "allfuse-snapshots", _give_way) as executor:
            server = Server(
                index,
                terms.servers,
                birth=birth,
                place=desk.place,
                replicas=terms.replicas,
                folder=folder / SNAPSHOTS if folder else None,
                executor=executor,
            )
            _serve(world, server, lines)
    finally:
        lines.close()
        scheduler.close()
        desk.close()


def _give_way() -> None:
    """Lower this thread's priority, so that the server keeps the core."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def _await_run(world: World, crew: Crewmate) -> dict[str, Any] | None:
    """What the scheduler tells of the run once it has begun; None where all is over before."""
    deadline = time.monotonic() + world.timeout_s
    while not world.stop_requested.is_set():
        run = crew.run(TICK_S)
        if run is not None:
            return run
        if time.monotonic() > deadline:
            raise WorkerFailed(f"no run began within {world.timeout_s:g} s", rank=-1)
    return None


def _serve(world: World, server: Server, lines: Lines) -> None:
    ticked_s = float("-inf")

    def send(mail: Iterable[tuple[str, Message]]) -> None:
        lines.send(mail, server.ring.places)

    while not world.stop_requested.is_set() or server.is_writing:
        now_s = time.monotonic()
        if now_s - ticked_s >= TICK_S:
            ticked_s = now_s
            lines.leave(server.ring.places)
            send(server.tick(now_s))
        for sender, message in lines.receive(TICK_S):
            try:
                send(server.answer(sender, message))
            except Malformed:
                lines.desk.refused["malformed"] += 1
        for name in lines.desk.lost():
            send(server.lost(name, now_s))
    send(server.tick(time.monotonic()))


def _this_role() -> tuple[World, Crewmate]:
    world = current_world()
    assert world is not None
    assert world.crew is not None, "started by the launcher of a crew"
    world.step = 0  # so that a request to stop is heeded, and interrupts nothing
    return world, world.crew
