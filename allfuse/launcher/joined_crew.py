"""A crew whose workers torchrun started: scheduler and servers run beside the first of each host.

Phases, at torchrun's store: rank 0 tells plan and token, every rank whether it is the first of its
host; those start the roles, which tell where they are as in any crew.
"""

from __future__ import annotations

import functools
import hmac
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from allfuse.base.errors import AllfuseError, Interrupted, PlanError, UserError, WorkerFailed
from allfuse.launcher.crew import Crew, CrewWatch, Part, make_part
from allfuse.launcher.crewmate import SCHEDULER, SERVER, WORKER, Crewmate, CrewRequest
from allfuse.launcher.local import flush_output, pack_function
from allfuse.launcher.outcome import Outcome, judge, safe_text
from allfuse.launcher.token import VARIABLE
from allfuse.launcher.torchrun import JoinedWorld, environment_number, join_torchrun, own_address
from allfuse.launcher.zygotes import Zygote, borrowed, warm_up
from allfuse.link.endpoint import host_address, signature

if TYPE_CHECKING:
    from allfuse.base.torch_private import Store

POLL_S = 0.1
END_S = 5.0  # how long roles may take to end before they are killed


def join_crew(crew: Crew, find: Callable[[], bytes | None], timeout_s: float) -> JoinedWorld:
    """The world of the group of a process that torchrun started, and its roles beside it.

    Consecutive ranks are a group. The scheduler runs beside rank 0, and servers are spread over the
    first processes of all hosts.

    Args:
        crew: of the whole job; its token is not used.
        find: the token that this process was given, asked for after rank 0 has found its own. If
            that was given none it makes one, which travels through the store.

    Raises:
        PlanError: rank 0 has another plan. UserError: it has another token. PeerLost: a rank did
        not say what it should.
    """
    if environment_number("LOCAL_RANK", 0) == 0:
        warm_up()  # while this process loads what it needs itself
    world = join_torchrun(crew.inner, timeout_s, ranks=crew.ranks)
    try:
        _refuse_other_plan(world, crew.plan)
        crew = replace(crew, token=_agree_on_token(world, find))
        if not world.all_on_one_host:
            address = own_address(os.environ["MASTER_ADDR"]) or host_address()
            listens = crew.listen if world.place == 0 else None
            crew = replace(crew, address=address, listen=listens)
        world.crew = _mate(crew, world)
        parts = _make_parts(crew, world, _leaders(world))
        if parts:
            flush_output()
            world.beside = RolesBeside(crew, parts, world.crew)
    except BaseException as error:
        world.close(error)
        raise
    return world


def _mate(crew: Crew, world: JoinedWorld) -> Crewmate:
    request = CrewRequest(
        role=WORKER,
        index=world.place // crew.ranks,
        run=world.meeting,
        plan=crew.plan,
        token=crew.token,
        listen=crew.listen,
        address=crew.address,
    )
    return Crewmate(request, world.common)


def _refuse_other_plan(world: JoinedWorld, plan: str) -> None:
    if world.place == 0:
        world.common.set("plan/1", plan.encode())  # where also plans without roles look
        return
    first = world.hear("plan/1", 0, "compare plans", "did not say which plan it has").decode()
    if first != plan:
        why = f"rank {world.place} was given this plan, and rank 0 {first}"
        raise PlanError(plan, why, first)


def _agree_on_token(world: JoinedWorld, find: Callable[[], bytes | None]) -> bytes:
    """The token of rank 0. It travels only where rank 0 was not given one."""
    if world.place == 0:
        own = find()
        token = own or secrets.token_hex(32).encode()
        world.common.set("token", b"given " + _digest(token) if own else b"made " + token)
        return token
    how, _, value = world.hear("token", 0, "find the token", "told no token").partition(b" ")
    own = find()
    if how == b"given" and own is not None and hmac.compare_digest(_digest(own), value):
        return own
    if how == b"made" and own is None:
        return value
    has = "none" if own is None else "one"
    first = "another one" if how == b"given" and own is not None else "none"
    raise UserError(
        f"the token of the job: rank {world.place} was given {has}, and rank 0 "
        f"{'one' if own is None else first}; allowed: the same on every rank, by --token-file or "
        f"{VARIABLE}, or none anywhere"
    )


def _digest(token: bytes) -> bytes:
    return signature(token, "torchrun", b"the same token").encode()


def _leaders(world: JoinedWorld) -> list[int]:
    """The first rank of each host. Only they need to know."""
    if world.all_on_one_host:
        return [0]
    is_first = world.local_rank == 0
    world.common.set(f"first/{world.place}", b"yes" if is_first else b"no")
    if not is_first:
        return []
    said = [
        world.hear(f"first/{rank}", rank, "find the hosts", "did not say which host it is on")
        for rank in range(world.everybody)
    ]
    return [rank for rank, word in enumerate(said) if word == b"yes"]


def _make_parts(crew: Crew, world: JoinedWorld, leaders: Sequence[int]) -> list[Part]:
    """What runs beside this process."""
    if world.place not in leaders:
        return []
    store = (os.environ["MASTER_ADDR"], environment_number("MASTER_PORT", 29500))
    make = functools.partial(
        make_part, crew, store=store, run=world.meeting, threads=1, timeout_s=world.timeout_s
    )
    parts = []
    if world.place == 0 and crew.scheduler is not None:
        parts.append(make(SCHEDULER, 0, 0, pack_function(crew.scheduler)))
    if crew.server is not None:
        for index in range(leaders.index(world.place), crew.servers, len(leaders)):
            packed = pack_function(functools.partial(crew.server, index))
            parts.append(make(SERVER, index, 0, packed))
    return parts


class RolesBeside:
    """The roles beside one of torchrun's processes; a thread looks after them.

    One that is killed is started again; one that fails ends the crew. However this process ends,
    they end, too.

    Args:
        mate: through which all hear how the crew ends.
    """

    def __init__(self, crew: Crew, parts: Sequence[Part], mate: Crewmate) -> None:
        self._mate = mate
        self._stops, told = socket.socketpair()
        self._failure: BaseException | None = None
        self._is_stopped = False
        self._thread = threading.Thread(
            target=self._look_after, args=(crew, parts, told), name="allfuse-roles", daemon=True
        )
        self._thread.start()

    def _look_after(self, crew: Crew, parts: Sequence[Part], stops: socket.socket) -> None:
        is_over = False
        try:
            with stops, borrowed() as zygote:
                watch = RoleWatch(zygote, stops, crew)
                try:
                    for part in parts:
                        watch.start_part(part)
                    watch.until_all_ended()
                finally:
                    watch.close()
            failed = [each for each in watch.roles if each.result is None and not each.is_lost]
            if failed and watch.stops < 2:
                judge(failed, interrupted=False)
            is_over = watch.has_scheduler and watch.stops == 0
        except BaseException as error:
            self._failure = error
            self._tell(error)
        if is_over:
            self._tell(None)

    def _tell(self, error: BaseException | None) -> None:
        """Let all know; a store that is gone tells them the same."""
        if error is not None and not isinstance(error, AllfuseError):
            error = WorkerFailed(f"{type(error).__name__}: {safe_text(error)}", rank=-1)
        try:
            self._mate.tell_end(error)
        except RuntimeError:
            return

    def close(self, error: BaseException | None) -> None:
        """Wait for the end of the crew, where this process ended well, and end what is here.

        The scheduler ends when all workers have gone, and it knows of those that are lost. So the
        wait is as long as others work; torchrun ends it where one of them fails.

        Raises:
            AllfuseError: a role has failed, and `error` says nothing else.
        """
        if self._is_stopped:
            return
        self._is_stopped = True
        try:
            if error is None or isinstance(error, Interrupted):
                while self._thread.is_alive() and self._mate.end() is None:
                    time.sleep(POLL_S)
            elif self._mate.end() is None:
                self._tell(WorkerFailed(f"a worker ended with {_name(error)}", rank=-1))
        finally:
            for _ in range(2):  # the second time they are killed
                if self._thread.is_alive():
                    self._say_stop()
                    self._thread.join(END_S)
            self._stops.close()
        if error is None and self._failure is not None:
            raise self._failure

    def _say_stop(self) -> None:
        try:
            self._stops.send(b"!")
        except OSError:  # the thread has just ended
            return


def _name(error: BaseException) -> str:
    return f"{type(error).__name__}: {safe_text(error)}"


class RoleWatch(CrewWatch):
    """Looks after roles whose workers are elsewhere. They end when the scheduler here has ended,
    when they are told to, or when one of them has failed."""

    def __init__(self, zygote: Zygote, signals: socket.socket, crew: Crew) -> None:
        super().__init__(zygote, signals, crew, _no_board, lambda index, attempt: [])

    @property
    def has_scheduler(self) -> bool:
        return any(part.role == SCHEDULER for part in self.parts)

    @property
    def _is_done(self) -> bool:
        schedulers = [each for each in self.roles if self.part_of(each).role == SCHEDULER]
        return self.stops > 0 or (bool(schedulers) and schedulers[-1].status is not None)

    def _note_failure(self, outcome: Outcome) -> None:
        super()._note_failure(outcome)
        if not outcome.is_lost:
            self._say_stop(self.roles)

    def _stop(self) -> None:
        self.stops += len(self.signals.recv(16))
        if self.stops > 1:
            self._kill()
        else:
            self._say_stop(self.roles)


def _no_board(run: str) -> Store:
    raise AssertionError("no group of workers is looked after here")
