"""A crew as threads of this process: the default in tests."""

from __future__ import annotations

import contextvars
import functools
import threading
from collections.abc import Callable
from typing import Any

from allfuse.base.errors import AllfuseError, Interrupted, WorkerFailed
from allfuse.launcher.base import entered
from allfuse.launcher.crew import Crew
from allfuse.launcher.crewmate import SCHEDULER, SERVER, WORKER, Crewmate, CrewRequest
from allfuse.launcher.thread import ThreadWorld
from allfuse.link.post import Post
from allfuse.link.thread import Hub, Script


class ThreadCrew:
    """Runs a crew's functions as threads, on any post.

    Nothing is raised: `results` holds what each group's ranks returned, exceptions in their place,
    and `roles` what the scheduler and the servers did. Servers and the scheduler are told to end
    when all workers have; all are where one has failed by an error of ours.

    Args:
        crew: what is run; `on_loss` has no meaning here.
        post: carries letters.
        scripts: faults of the ranks inside a group, by its index.
    """

    def __init__(
        self,
        crew: Crew,
        post: Post,
        *,
        scripts: dict[int, Script] | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        self.crew, self.post, self.timeout_s = crew, post, timeout_s
        self.board = Hub(1)
        self.hubs = [Hub(crew.ranks, (scripts or {}).get(g)) for g in range(crew.groups)]
        self.results: list[list[Any]] = [[None] * crew.ranks for _ in range(crew.groups)]
        self.roles: dict[str, Any] = {}
        self._role_worlds: list[ThreadWorld] = []

    def run(self) -> ThreadCrew:
        """Start all, and wait until all have ended."""
        crew = self.crew
        roles = []
        if crew.scheduler is not None:
            roles.append(self._role(SCHEDULER, 0, crew.scheduler))
        if crew.server is not None:
            roles += [
                self._role(SERVER, index, functools.partial(crew.server, index))
                for index in range(crew.servers)
            ]
        workers = [
            self._thread(f"worker-{group}-{rank}", self._work, group, rank)
            for group in range(crew.groups)
            for rank in range(crew.ranks)
        ]
        for worker in workers:
            worker.join()
        for world in self._role_worlds:
            world.stop_requested.set()
        for role in roles:
            role.join()
        return self

    def _thread(self, name: str, function: Callable[..., None], *args: Any) -> threading.Thread:
        run = contextvars.Context().run
        thread = threading.Thread(target=run, args=(function, *args), name=name)
        thread.start()
        return thread

    def _mate(self, role: str, index: int) -> Crewmate:
        request = CrewRequest(role=role, index=index, run="", plan=self.crew.plan, token=b"")
        return Crewmate(request, self.board, self.post)

    def _role(self, role: str, index: int, function: Callable[[], Any]) -> threading.Thread:
        world = ThreadWorld(Hub(1), 0, self.timeout_s)
        world.crew = mate = self._mate(role, index)
        self._role_worlds.append(world)

        def work() -> None:
            try:
                with entered(world):
                    self.roles[f"{role} {index}"] = function()
            except BaseException as error:  # its outcome, judged by the caller
                self.roles[f"{role} {index}"] = error
                if isinstance(error, AllfuseError):
                    mate.tell_end(error)

        return self._thread(f"{role}-{index}", work)

    def _work(self, group: int, rank: int) -> None:
        world = ThreadWorld(self.hubs[group], rank, self.timeout_s)
        world.plan, world.crew = self.crew.inner, (mate := self._mate(WORKER, group))
        try:
            with entered(world):
                assert self.crew.worker is not None
                self.results[group][rank] = self.crew.worker()
        except BaseException as error:
            self.results[group][rank] = error
            if isinstance(error, AllfuseError) and not isinstance(error, Interrupted):
                mate.tell_end(WorkerFailed(f"a worker ended with {error}", rank=-1))
