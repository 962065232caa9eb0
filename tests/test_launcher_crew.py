"""Crews as processes: who is started again when somebody is killed, and what comes of it."""

from __future__ import annotations

import os
import signal
import time

import pytest

from allfuse.base.errors import WorkerFailed
from allfuse.launcher import current_world
from allfuse.launcher.crew import Crew, launch_crew
from allfuse.launcher.crewmate import Crewmate
from allfuse.launcher.generation import OnLoss
from allfuse.launcher.store import StoreWorld


def here() -> tuple[StoreWorld, Crewmate]:
    world = current_world()
    assert isinstance(world, StoreWorld)
    assert world.crew is not None
    return world, world.crew


def die_once(what: str) -> None:
    _, crew = here()
    if crew.board.get(what) is None:
        crew.board.set(what, b"died")
        os.kill(os.getpid(), signal.SIGKILL)


def work() -> tuple[int, int] | None:
    """Rank 1 of group 1 is killed once and rank 0 loses it; then both meet, with a result."""
    world, crew = here()
    if crew.index == 0:
        crew.board.wait("group 1 is done", 60.0)
        return None
    import torch

    link = world.link("pair", (0, 1), torch.device("cpu"))
    if world.rank == 1:
        die_once("worker")
    total = torch.ones(1)
    link.all_reduce(total, "meet").wait()
    link.close()
    crew.board.set("group 1 is done", b"yes")
    return crew.index, int(total)


def work_on() -> int:
    """Group 1 is killed, and the other one has a result."""
    _, crew = here()
    if crew.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return crew.index


def role() -> str:
    world, _ = here()
    world.step = 0
    world.stop_requested.wait(60)
    return "done"


def server(index: int) -> str:
    die_once(f"server {index}")
    here()[1].board.set(f"server {index} is back", b"yes")
    return role()


def crew_of(worker: object, on_loss: OnLoss, ranks: int = 1, servers: int = 0) -> Crew:
    return Crew(
        worker=worker,  # type: ignore[arg-type]
        scheduler=role,
        server=server if servers else None,
        servers=servers,
        plan="site(2, sync=asp)",
        inner=f"data({ranks})",
        groups=2,
        ranks=ranks,
        on_loss=on_loss,
    )


def test_a_group_of_which_one_was_killed_is_started_again_as_a_whole() -> None:
    assert launch_crew(crew_of(work, "restart", ranks=2), timeout_s=30.0) == (1, 2)


@pytest.mark.slow
def test_others_go_on_without_a_group_that_was_killed() -> None:
    assert launch_crew(crew_of(work_on, "continue")) == 0


def test_a_killed_worker_ends_a_crew_that_is_to_stop() -> None:
    def wait() -> None:
        work_on()
        time.sleep(60)  # until it is killed

    begin = time.monotonic()
    with pytest.raises(WorkerFailed, match="worker 1 was killed by SIGKILL"):
        launch_crew(crew_of(wait, "stop"))
    assert time.monotonic() - begin < 50


def test_a_server_that_was_killed_is_started_again() -> None:
    def wait() -> int:
        here()[1].board.wait("server 0 is back", 60.0)
        return 7

    assert launch_crew(crew_of(wait, "continue", servers=1)) == 7
