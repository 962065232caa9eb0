"""What stages send each other, in which order, on a link that starts transfers as one, on a queue,
as NCCL does. Emulated here, as strictly as NCCL may be; several GPUs are not at hand."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from allfuse.link import Link, Work
from allfuse.plan.schedule import SCHEDULES, Interleaved, Schedule, ZeroBubble
from allfuse.split.pipe import courier
from allfuse.split.pipe.courier import Courier
from allfuse.split.pipe.itinerary import (
    Exchange,
    Parcel,
    order_exchanges,
    parcel_of,
    taken_by,
)

ALL: list[Schedule] = [made() for made in SCHEDULES.values()] + [Interleaved(3), ZeroBubble(2)]
SIZES = [(n, m) for n in (2, 3, 4) for m in (1, 2, 3, 4, 8)]


class Stuck(Exception):
    """All ranks wait, and nothing is on its way."""


@dataclass
class Transfer:
    """One side of one. back: this side receives."""

    peer: int
    back: bool
    tensor: Tensor
    ended: bool = False


@dataclass
class Group(Work):
    """Transfers that were started as one. Of each kind to and from each peer the first is done
    first; the second ones begin when all first ones have ended."""

    queue: Queue
    levels: deque[list[Transfer]] = field(default_factory=deque)

    def wait(self) -> None:
        self.queue.start_held()
        self.queue.fabric.wait(self.queue.rank, self)


class Fabric:
    """Queues of n ranks. A group begins when the one before it has ended; a transfer is done when
    both of its sides have begun."""

    def __init__(self, n: int) -> None:
        self.queues: list[deque[Group]] = [deque() for _ in range(n)]
        self.waits: dict[int, Group | None] = {}  # by rank; None: it has ended
        self.changed = threading.Condition()
        self.is_stuck = False

    def start(self, rank: int, group: Group) -> None:
        with self.changed:
            self.queues[rank].append(group)
            self._go_on()

    def _go_on(self) -> None:
        while self._pass_on():
            for queue in self.queues:
                while queue and all(each.ended for each in queue[0].levels[0]):
                    queue[0].levels.popleft()
                    if not queue[0].levels:
                        queue.popleft()
        self.changed.notify_all()

    def _pass_on(self) -> bool:
        begun = {
            (rank, each.peer, each.back): each
            for rank, queue in enumerate(self.queues)
            for each in (queue[0].levels[0] if queue else ())
            if not each.ended
        }
        found = False
        for (rank, peer, back), each in begun.items():
            other = begun.get((peer, rank, True))
            if not back and other is not None:
                other.tensor.copy_(each.tensor)
                each.ended = other.ended = found = True
        return found

    def wait(self, rank: int, group: Group | None) -> None:
        """Until a group has ended; None: the rank has."""
        with self.changed:
            self.waits[rank] = group
            while group is not None and group.levels and not self.is_stuck:
                on = [each for each in self.waits.values() if each is None or each.levels]
                if len(on) == len(self.queues):
                    self.is_stuck = True
                    self.changed.notify_all()
                    break
                self.changed.wait()
            if group is not None:
                del self.waits[rank]
                if self.is_stuck:
                    raise Stuck
            self.changed.notify_all()


class Queue(Link):
    """A rank's queue as a link."""

    holds_back = True

    def __init__(self, fabric: Fabric, rank: int) -> None:
        self.fabric, self.rank = fabric, rank
        self.members = tuple(range(len(fabric.queues)))
        self._held: list[Transfer] = []
        self._group = Group(self)

    def send(self, tensor: Tensor, peer: int, operation: str) -> Work:
        self._held.append(Transfer(peer, False, tensor))
        return self._group

    def receive(self, tensor: Tensor, peer: int, operation: str) -> Work:
        self._held.append(Transfer(peer, True, tensor))
        return self._group

    def start_held(self) -> None:
        ways: dict[tuple[int, bool], list[Transfer]] = defaultdict(list)
        for each in self._held:
            ways[each.peer, each.back].append(each)
        if ways:
            group, self._group, self._held = self._group, Group(self), []
            for number in range(max(map(len, ways.values()))):
                group.levels.append([own[number] for own in ways.values() if number < len(own)])
            self.fabric.start(self.rank, group)

    def all_reduce(self, tensor: Tensor, operation: str) -> Work:
        raise NotImplementedError

    def broadcast(self, tensor: Tensor, operation: str, root: int = 0) -> Work:
        raise NotImplementedError

    def alive(self) -> tuple[int, ...]:
        return self.members

    def close(self) -> None:
        pass


def content(parcel: Parcel) -> Tensor:
    return torch.tensor([float(each) for each in parcel])


def run(schedule: Schedule, n: int, m: int) -> list[str]:
    """All ranks' actions, without what they compute; what went wrong."""
    if schedule.most(m, n) != m:
        pytest.skip("it has no order for that number of microbatches")
    orders, stages = schedule.orders(n, m), n * schedule.each
    fabric, wrong = Fabric(n), list[str]()

    def work(rank: int) -> None:
        own = Courier(
            Queue(fabric, rank),
            orders,
            stages,
            lambda stage: schedule.owner(stage, n),
            lambda crossing, microbatch: torch.empty(3),
        )
        try:
            for action in orders[rank]:
                taken, given = taken_by(action, stages), parcel_of(action, stages)
                if taken is not None and not torch.equal(own.take(taken), content(taken)):
                    wrong.append(f"{taken} was another one")
                if given is not None:
                    own.give(given, content(given))
            own.settle()
        except Stuck:
            wrong.append(f"rank {rank} waits for ever")
        finally:
            fabric.wait(rank, None)

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    assert not any(thread.is_alive() for thread in threads)
    return wrong


@pytest.mark.parametrize(("n", "m"), SIZES)
@pytest.mark.parametrize("schedule", ALL, ids=str)
def test_stages_on_queues_pass_on_all_of_every_schedule(schedule: Schedule, n: int, m: int) -> None:
    assert run(schedule, n, m) == []


def follow(monkeypatch: pytest.MonkeyPatch, *itineraries: list[Exchange]) -> None:
    monkeypatch.setattr(courier, "order_exchanges", lambda *_: list(itineraries))


def test_what_crosses_goes_together() -> None:
    schedule, (a, b), (back, _) = SCHEDULES["1f1b"](), FORTH, BACK
    first, second = order_exchanges(schedule.orders(2, 2), 2, lambda stage: stage)
    assert first == second == [(a,), (b, back), (BACK[1],)]


FORTH = [Parcel(False, 0, microbatch) for microbatch in range(2)]
BACK = [Parcel(True, 0, microbatch) for microbatch in range(2)]


def test_all_that_was_sent_in_one_with_what_comes_first_would_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The check above can fail. So it was done; gpipe sends all before anything comes."""
    alone: list[Exchange] = [(each,) for each in (*FORTH, *BACK)]
    follow(monkeypatch, alone, alone)
    assert run(SCHEDULES["gpipe"](), 2, 2) == []
    follow(monkeypatch, [(*FORTH, BACK[0]), (BACK[1],)], alone)
    assert sorted(run(SCHEDULES["gpipe"](), 2, 2)) == STUCK


def test_each_rank_in_an_order_of_its_own_would_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (a, b), (back, last) = FORTH, BACK
    follow(monkeypatch, [(a,), (b,), (back,), (last,)], [(a,), (back,), (b,), (last,)])
    assert sorted(run(SCHEDULES["1f1b"](), 2, 2)) == STUCK


STUCK = ["rank 0 waits for ever", "rank 1 waits for ever"]
