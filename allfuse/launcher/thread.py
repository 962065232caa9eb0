"""n ranks as threads of this process, on the thread link: the default in tests."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from allfuse.base.errors import PeerLost
from allfuse.launcher.base import World, entered
from allfuse.link.thread import Hub, Killed, Script, ThreadLink

if TYPE_CHECKING:
    import torch

    from allfuse.link.base import Link


class ThreadWorld(World):
    """One rank as a thread. There are no process groups: they belong to a whole process."""

    kind = "thread"
    has_process_groups = False

    def __init__(self, hub: Hub, rank: int, timeout_s: float) -> None:
        super().__init__()
        self.hub, self.rank, self.size, self.timeout_s = hub, rank, hub.size, timeout_s
        self.local_rank, self.local_size = rank, hub.size
        self.board = hub

    def link(self, name: str, members: tuple[int, ...], device: torch.device) -> Link:
        if len(members) == 1:
            from allfuse.link.lone import LoneLink

            return LoneLink(members[0])
        return ThreadLink(self.hub, name, members, self.rank, self.timeout_s)

    def form_replica(self, replica: tuple[int, ...], backend: str) -> None:
        return

    def close(self) -> None:
        return


def launch_threads(
    function: Callable[[], Any],
    workers: int,
    *,
    plan: str | None = None,
    script: Script | None = None,
    timeout_s: float = 30.0,
) -> list[Any]:
    """Run `function()` as `workers` ranks; what each returned, an exception in its place.

    Unlike a launch of processes nothing is raised, so that tests see every rank's outcome.
    """
    hub = Hub(workers, script)
    results: list[Any] = [None] * workers

    def run(rank: int) -> None:
        world = ThreadWorld(hub, rank, timeout_s)
        world.plan = plan
        try:
            with entered(world):
                results[rank] = function()
            hub.leave(rank, "has ended")
        except Killed as error:
            results[rank] = error
            hub.leave(rank, "was killed by the script")
        except BaseException as error:  # the outcome of this rank, judged by the caller
            results[rank] = error
            hub.leave(rank, f"ended with {type(error).__name__}: {error}")

    threads = [
        threading.Thread(target=contextvars.Context().run, args=(run, rank), name=f"rank-{rank}")
        for rank in range(workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def first_failure(results: list[Any]) -> BaseException | None:
    """The failure to show: one that is not the mere loss of a peer, if there is any."""
    failures = [result for result in results if isinstance(result, BaseException)]
    causes = [failure for failure in failures if not isinstance(failure, PeerLost)]
    return next(iter(causes or failures), None)
