"""n ranks as threads of this process, on the thread link: the default in tests."""

from __future__ import annotations

import contextvars
import threading
from collections import Counter
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from allfuse.base.errors import PeerLost
from allfuse.launcher.base import World, entered
from allfuse.launcher.generation import Generation, LossPolicy, Lost, Roll, lost_between
from allfuse.launcher.outcome import safe_text
from allfuse.launcher.regroup import Meeting, key_of, place_of
from allfuse.link.thread import Hub, Killed, Script, ThreadLink

if TYPE_CHECKING:
    import torch

    from allfuse.link.base import Link


class ThreadWorld(World):
    """One rank as a thread. There are no process groups: they belong to a whole process."""

    kind = "thread"
    has_process_groups = False

    def __init__(self, hub: Hub, rank: int, timeout_s: float, muster: Muster | None = None) -> None:
        super().__init__()
        self.timeout_s, self._worker, self._muster = timeout_s, rank, muster
        self.goes_on = muster is not None and muster.roll.policy.goes_on
        self._links: Counter[tuple[str, tuple[int, ...]]] = Counter()
        self._enter(hub, rank)

    def _enter(self, hub: Hub, rank: int) -> None:
        self.hub = self.board = hub
        self.rank, self.size = rank, hub.size
        self.local_rank, self.local_size = rank, hub.size

    @property
    def ids(self) -> tuple[int, ...]:
        return self.hub.names

    def regroup(self, error: PeerLost | None) -> tuple[Lost, ...]:
        muster = self._muster
        if not self.goes_on or muster is None:
            return super().regroup(error)
        self.hub.leave(self.rank, "meets the others anew", lost_a_peer=True)
        meeting = Meeting(self._worker, muster.root, muster.hub_of, muster.accuse, self.timeout_s)
        passed = meeting.attend(self._generation, error)
        self.is_over = passed[-1].is_over
        if not passed[-1].members:
            raise error or meeting.lost(None, "the others do not go on")
        if self._worker not in passed[-1].members:
            raise Killed(f"rank {self._worker} left with {passed[-1].lost[0]}")
        self._generation = passed[-1].number
        self._links.clear()
        self._keys.clear()
        self._enter(muster.hub_of(self._generation), passed[-1].members.index(self._worker))
        return lost_between(passed)

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
        if self._muster is not None:
            self._muster.end(self._worker, how, killed=isinstance(error, Killed), error=error)
        self.hub.leave(self.rank, how, lost_a_peer=isinstance(error, PeerLost))


class Muster:
    """The launcher of ranks that are threads: sees who dies, and tells of generations."""

    def __init__(self, hub: Hub, policy: LossPolicy) -> None:
        self.roll, self.root = Roll(hub.size, policy), Hub(1)
        self.worlds: list[ThreadWorld] = []
        self._hubs = {0: hub}
        self._lock = threading.RLock()

    def hub_of(self, number: int) -> Hub:
        return self._hubs[number]

    def end(self, worker: int, how: str, *, killed: bool, error: BaseException | None) -> None:
        """A thread has ended: as it should, killed, or by an error, after which nobody goes on."""
        with self._lock:
            if killed:
                self._lose(worker, how)
            elif error is None:
                self._end(worker)
            elif self.roll.policy.goes_on:
                self._tell(Generation(self.roll.generation.number + 1, ()))

    def accuse(self, number: int, worker: int) -> None:
        """A rank that does not answer is counted as lost; where it has done its work nobody is."""
        with self._lock:
            if number == self.roll.generation.number:
                self._lose(worker, "gave no sign and was left behind")

    def _end(self, worker: int) -> None:
        def has_met(number: int) -> bool:
            return self._hubs[number].get(place_of(worker)) is not None

        self.roll.end(worker)
        if not self.roll.policy.goes_on:
            return
        generation = self.roll.excuse(worker, has_met)
        if generation is not None:
            self._tell(generation)

    def _lose(self, worker: int, how: str) -> None:
        before = self.roll.generation
        generation = self.roll.lose(worker, how)
        if generation is None or not self.roll.policy.goes_on:
            return
        self._tell(generation)
        for member in before.members:  # those that leave too are waited for in vain
            if member not in generation.members and not self.roll.has_ended(member):
                self._hubs[before.number].leave(before.members.index(member), how)

    def _tell(self, generation: Generation) -> None:
        self.roll.generation = generation
        if generation.members:
            names = generation.members
            self._hubs[generation.number] = Hub(len(names), names=names, before=self._hubs[0])
        self.root.set(key_of(generation.number), generation.to_bytes())
        for world in self.worlds:
            world.hear_of_loss(generation.number)


def launch_threads(
    function: Callable[[], Any],
    workers: int,
    *,
    plan: str | None = None,
    script: Script | None = None,
    timeout_s: float = 30.0,
    policy: LossPolicy | None = None,
) -> list[Any]:
    """Run `function()` as `workers` ranks; what each returned, an exception in its place.

    Unlike a launch of processes nothing is raised, so that tests see every rank's outcome.
    """
    hub = Hub(workers, script)
    muster = Muster(hub, policy or LossPolicy())
    muster.worlds = [ThreadWorld(hub, rank, timeout_s, muster) for rank in range(workers)]
    results: list[Any] = [None] * workers

    def run(rank: int) -> None:
        world = muster.worlds[rank]
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
