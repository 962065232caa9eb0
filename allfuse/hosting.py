"""Starts a plan where it is to run: here, in worker processes, or as a crew with its roles."""

from __future__ import annotations

import contextlib
import functools
import json
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from allfuse.audience import RunAudience
from allfuse.base.errors import UserError
from allfuse.launcher import World
from allfuse.launcher.crew import Crew, launch_crew
from allfuse.launcher.generation import OnLoss
from allfuse.launcher.joined_crew import join_crew
from allfuse.launcher.token import find_token
from allfuse.launcher.torchrun import (
    JoinedWorld,
    environment_number,
    join_torchrun,
    own_address,
)
from allfuse.link.endpoint import Endpoint
from allfuse.link.wire import Wire, split_place
from allfuse.plan import Plan, as_plan, check_workers
from allfuse.roles.messages import About as AboutJob
from allfuse.roles.messages import Hello, open_letter
from allfuse.roles.office import run_scheduler, run_server
from allfuse.training.loop import Result

ASK_S = 1.0  # after which a scheduler is asked again
LAST_WORD_S = 10.0  # after the end, for the figures of it


def launch_with_roles(
    work: Callable[[], Any],
    plan: Plan,
    *,
    threads: int | None = None,
    timeout_s: float = 300.0,
    on_loss: OnLoss = "continue",
    token: bytes | None = None,
    listen: str | None = None,
    token_file: Path | None = None,
) -> Any:
    """Do the work in every rank of a plan that has servers: those and the scheduler are started
    too. What rank 0 of the first group returned.

    Raises:
        UserError, WorkerFailed, Interrupted: as `launch_crew` says.
    """
    crew = replace(
        _crew_of(plan, functools.partial(_work, work), on_loss, listen, token_file),
        token=token or secrets.token_bytes(32),
    )
    return launch_crew(crew, threads=threads, timeout_s=timeout_s)


def _crew_of(
    plan: Plan,
    worker: Callable[[], Any] | None,
    on_loss: OnLoss = "stop",
    listen: str | None = None,
    token_file: Path | None = None,
) -> Crew:
    """All of a plan that has roles."""
    assert plan.outer is not None, "a plan without roles"
    return Crew(
        worker=worker,
        scheduler=functools.partial(
            run_scheduler, functools.partial(RunAudience, token_file=token_file)
        ),
        server=run_server,
        servers=plan.servers,
        plan=str(plan),
        inner=str(plan.inner),
        groups=plan.outer.n,
        ranks=plan.inner.workers,
        on_loss=on_loss,
        listen=listen,
    )


def join_started(
    plan: Plan | None,
    *,
    timeout_s: float = 300.0,
    listen: str | None = None,
    token_file: Path | None = None,
) -> World:
    """The world of a process that torchrun started; where the plan has roles they run beside some.

    Raises:
        PlanError: the plan is for another number of workers, or rank 0 has another one.
        UserError: rank 0 has another token. PeerLost: a rank did not say what it should.
    """
    if plan is None or plan.outer is None:
        return join_torchrun(None if plan is None else str(plan), timeout_s)
    plan.validate_executable()
    check_workers(plan, environment_number("WORLD_SIZE", 1))
    makes = listen is not None and environment_number("RANK", 0) == 0
    find = functools.partial(find_token, token_file, make=makes)
    crew = _crew_of(plan, None, listen=listen, token_file=token_file)
    return join_crew(crew, find, timeout_s)


def work_among_started(world: World, work: Callable[[], Any]) -> Any:
    """Do the work in a world that torchrun started; rank 0 gets the figures of the group that
    measured the end, without weights, where it is not in that itself."""
    result, crew = work(), world.crew
    if crew is None or not isinstance(result, Result) or world.rank != 0:
        return result
    if not result.elsewhere:
        crew.board.set("result", json.dumps(asdict(replace(result, weights={}))).encode())
        return result
    first, deadline = isinstance(world, JoinedWorld) and world.place == 0, None
    while first and (deadline is None or time.monotonic() < deadline):
        with contextlib.suppress(TimeoutError):
            return Result(**json.loads(crew.board.wait("result", ASK_S)))
        if deadline is None and crew.end() is not None:  # who measured it tells it now
            deadline = time.monotonic() + LAST_WORD_S
    return result


@dataclass(frozen=True)
class About:
    """What one who joins is told of a job."""

    plan: str
    arguments: dict[str, Any]
    limits: dict[str, int | None]
    out: str | None


def ask_about(place: str, token: bytes, timeout_s: float) -> About:
    """Ask the scheduler at a place what its job is.

    Raises:
        UserError: nobody answers there, or the token is another one.
    """
    try:
        caller = _post(token).call(place, f"guest {secrets.token_hex(6)}")
    except ValueError as error:
        raise UserError(f"join {place}: {error}") from None
    deadline = time.monotonic() + timeout_s
    try:
        while time.monotonic() < deadline:
            caller.send(Hello().letter())
            for letter in caller.receive(ASK_S):
                message = open_letter(letter)
                if isinstance(message, AboutJob) and message.about:
                    return About(message.plan, **message.about)
            if caller.trouble.startswith(("another token", "it ends the connection")):
                raise UserError(
                    f"join {place}: {caller.trouble}; next: a copy of the token file that the job "
                    "was started with"
                )
    finally:
        caller.close()
    raise UserError(
        f"join {place}: {caller.trouble or 'no job has begun there'} within {timeout_s:g} s; next: "
        "the HOST:PORT that `allfuse train --listen` printed"
    )


def join_job(
    work: Callable[[], Any],
    about: About,
    place: str,
    token: bytes,
    *,
    threads: int | None = None,
    timeout_s: float = 300.0,
) -> None:
    """Take part in a job as one more group, on this host, until the job is done."""
    plan = as_plan(about.plan)
    crew = Crew(
        worker=functools.partial(_take_part, work),
        scheduler=None,
        server=None,
        servers=0,
        plan=str(plan),
        inner=str(plan.inner),
        groups=1,
        ranks=plan.inner.workers,
        on_loss="stop",
        token=token,
        place=place,
        address=own_address(split_place(place)[0]) if plan.gossips else None,  # others call there
    )
    launch_crew(crew, threads=threads, timeout_s=timeout_s)


def _take_part(work: Callable[[], Any]) -> bool:
    work()
    return True


def _post(token: bytes) -> Wire:
    return Wire(Endpoint(loopback=True, encrypt=True, token=token))


def _work(work: Callable[[], Any]) -> Any:
    """What a worker does; of several results that of the group counts that measured the end."""
    result = work()
    return None if getattr(result, "elsewhere", False) else result
