"""n ranks as threads of this process, on the thread link: the default in tests."""

from __future__ import annotations

import contextvars
import threading
from collections import Counter
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from allfuse.base.errors import PeerLost
from allfuse.launcher.base import World, entered
from allfuse.launcher.outcome import safe_text
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
        self._links: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def link(
        self,
        name: str,
        members: tuple[int, ...],
        device: torch.device,
        groups: Collection[tuple[int, ...]] = (),
    ) -> Link:
        if len(members) == 1:
            from allfuse.link.lone import LoneLink

            return LoneLink(members[0])
        self._links[name, members] += 1  # a second session must not meet the first one's traces
        number = self._links[name, members]
        return ThreadLink(self.hub, f"{name}/{number}", members, self.rank, self.timeout_s)

    def form_replica(self, replica: tuple[int, ...], backend: str) -> None:
        return

    def close(self, error: BaseException | None = None) -> None:
        """Tells the other ranks how this one ends."""
        how = "had finished its work"
        if isinstance(error, Killed):
            how = "was killed by the script"
        elif error is not None:
            how = f"ended with {type(error).__name__}: {safe_text(error)}"
        self.hub.leave(self.rank, how, lost_a_peer=isinstance(error, PeerLost))


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
        except BaseException as error:  # the outcome of this rank, judged by the caller
            results[rank] = error

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
