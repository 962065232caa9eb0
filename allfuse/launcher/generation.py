"""Who takes part in a launch while workers are lost: bookkeeping, without input or output."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from allfuse.base.errors import UserError

OnLoss = Literal["stop", "restart", "continue"]

RESTARTS = 5  # of one process, or of all, before an end counts as a failure


@dataclass(frozen=True, kw_only=True)
class LossPolicy:
    """What a killed worker means to the others of a launch.

    group: how many workers, in a row, leave together: the ranks of one replica. least: groups that
    must be left for them to go on.
    """

    on_loss: OnLoss = "stop"
    group: int = 1
    least: int = 1

    @property
    def goes_on(self) -> bool:
        return self.on_loss == "continue"


@dataclass(frozen=True)
class Lost:
    """A worker that is lost: its rank when it was started, how it ended, and when (UNIX time)."""

    worker: int
    how: str
    time: float

    def __str__(self) -> str:
        return f"rank {self.worker} {self.how}"


@dataclass(frozen=True)
class Generation:
    """Those that take part from one loss to the next.

    members: by the ranks that they were started with, in order; a member's place is its rank now.
    None are left where the others may not go on, nor where they need not (`is_over`): one of them
    has done all its work, and none does before all are sure to. lost: since the generation before.
    """

    number: int
    members: tuple[int, ...]
    lost: tuple[Lost, ...] = ()
    is_over: bool = False

    def to_bytes(self) -> bytes:
        lost = [[each.worker, each.how, each.time] for each in self.lost]
        return json.dumps([self.number, self.members, lost, self.is_over]).encode()

    @classmethod
    def of(cls, content: bytes) -> Generation:
        number, members, lost, is_over = json.loads(content)
        return cls(number, tuple(members), tuple(Lost(*each) for each in lost), is_over)


class Roll:
    """What a launcher knows of who takes part."""

    def __init__(self, workers: int, policy: LossPolicy) -> None:
        self.policy = policy
        self.generation = Generation(0, tuple(range(workers)))
        self._ended: set[int] = set()

    def end(self, worker: int) -> None:
        """It has done its work: nobody meets it again."""
        self._ended.add(worker)

    def excuse(self, worker: int, has_met: Callable[[int], bool]) -> Generation | None:
        """The generation after one that a worker has not met, as it had done all its work: then the
        others have what that takes. None where nobody waits for it.

        Args:
            has_met: whether it has come to the generation of a number.
        """
        here = self.generation
        if not here.number or worker not in here.members or has_met(here.number):
            return None
        self.generation = Generation(here.number + 1, (), (), is_over=True)
        return self.generation

    def has_ended(self, worker: int) -> bool:
        return worker in self._ended

    def mates(self, worker: int) -> list[int]:
        """The other members that leave with a worker."""
        size = self.policy.group
        here = [m for m in self.generation.members if m // size == worker // size]
        return [m for m in here if m != worker]

    def lose(self, worker: int, how: str) -> Generation | None:
        """The next generation; None where the worker was no member any more."""
        before = self.generation
        if worker not in before.members:
            return None
        away = {worker, *self.mates(worker), *self._ended}
        left = tuple(member for member in before.members if member not in away)
        is_over = len(left) % self.policy.group > 0  # since some of a replica have ended
        if is_over or len(left) < self.policy.least * self.policy.group:
            left = ()
        lost = Lost(worker, how, time.time())
        self.generation = Generation(before.number + 1, left, (lost,), is_over)
        return self.generation


def check_on_loss(value: str) -> OnLoss:
    """The policy of that name.

    Raises:
        UserError: there is none.
    """
    for policy in ("stop", "restart", "continue"):
        if value == policy:
            return policy
    raise UserError(f"--on-loss {value}: allowed: stop, restart, continue")


def lost_between(generations: Sequence[Generation]) -> tuple[Lost, ...]:
    """All that were lost on the way through some generations."""
    return tuple(lost for generation in generations for lost in generation.lost)
