"""In which order the ranks of a pipeline work: pure schedules, no I/O.

Stages are counted from the first layers on, microbatches from 0. A rank does its actions in order,
each as soon as what it needs is there: the forward pass of a stage needs that of the stage before,
a backward pass that of the stage after.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, TypeAlias

from allfuse.base.choice import Choice

Kind: TypeAlias = Literal["forward", "backward", "input", "weight"]
"""A backward pass as a whole, or in two: the gradients of what a stage took, which the stage before
waits for, and those of weights, which nobody waits for."""

COSTS: Mapping[Kind, float] = {"forward": 1.0, "backward": 2.0, "input": 1.0, "weight": 1.0}


class Action(NamedTuple):
    kind: Kind
    stage: int
    microbatch: int


Order: TypeAlias = list[Action]
"""What one rank does, in order."""


@dataclass(frozen=True)
class Schedule(Choice, ABC):
    """How n ranks take turns at m microbatches.

    Class variables:
        in_two: backward passes are done in two parts.
    """

    in_two: ClassVar[bool] = False

    @property
    def each(self) -> int:
        """Stages of every rank."""
        return 1

    def owner(self, stage: int, n: int) -> int:
        """The rank that has a stage."""
        return stage % n

    def most(self, m: int, n: int) -> int:
        """The largest number of microbatches up to m for which it has an order."""
        return m

    @abstractmethod
    def orders(self, n: int, m: int) -> list[Order]:
        """The actions of each rank. `m` is a number for which `most(m, n) == m`."""

    def bubble(self, n: int, m: int) -> float:
        """The part of the time in which ranks wait, where all stages take as long and backward
        passes twice as long as forward ones."""
        orders = self.orders(n, m)
        busy = sum(COSTS[action.kind] for order in orders for action in order)
        return 1 - busy / (n * charge_clock(orders, self.each * n))


@dataclass(frozen=True)
class GPipe(Schedule):
    """All forward passes, then all backward ones. Huang et al. 2019, arXiv:1811.06965, section 2.3.

    Bubble (n - 1) / (m + n - 1); holds the activations of all m microbatches.
    """

    name: ClassVar[str] = "gpipe"

    def orders(self, n: int, m: int) -> list[Order]:
        kinds: tuple[Kind, Kind] = ("forward", "backward")
        return [[Action(kind, rank, i) for kind in kinds for i in range(m)] for rank in range(n)]


@dataclass(frozen=True)
class OneForwardOneBackward(Schedule):
    """One forward, one backward pass in turn, as soon as there is something to go backward with.
    Narayanan et al. 2019 (PipeDream), and 2021, arXiv:2104.04473, section 2.2.1, with flushes.

    Bubble as of gpipe; rank r holds the activations of at most n - r microbatches.
    """

    name: ClassVar[str] = "1f1b"

    def orders(self, n: int, m: int) -> list[Order]:
        return [alternate(n, m, rank, each=1, hop=1, in_two=False) for rank in range(n)]


@dataclass(frozen=True)
class _Several(Schedule):
    """Several stages on each rank, which takes as many microbatches through one as there are ranks
    before it goes on to its next."""

    def most(self, m: int, n: int) -> int:
        if self.each == 1:
            return m
        while m % max(1, m // n):
            m -= 1
        return m


@dataclass(frozen=True)
class Interleaved(_Several):
    """1f1b with several stages on each rank. Narayanan et al. 2021, arXiv:2104.04473, section
    2.2.2; with other numbers of microbatches than multiples of n, as in torch.

    Bubble (n - 1) / (stages m + n - 1) where n divides m; sends `stages` times as much.
    """

    name: ClassVar[str] = "interleaved"

    stages: int = 2

    def __post_init__(self) -> None:
        _refuse_few(self.name, self.stages, 2)

    @property
    def each(self) -> int:
        return self.stages

    def orders(self, n: int, m: int) -> list[Order]:
        return [alternate(n, m, rank, self.stages, hop=2, in_two=False) for rank in range(n)]


@dataclass(frozen=True)
class ZeroBubble(_Several):
    """1f1b with gradients of weights computed while a rank would wait. Qi et al. 2023 (ZB-H1),
    arXiv:2401.10241, section 3.1; with several stages on each rank as torch has it.

    Holds what the gradients of weights need for longer.
    """

    name: ClassVar[str] = "zero_bubble"
    in_two: ClassVar[bool] = True

    stages: int = 1

    def __post_init__(self) -> None:
        _refuse_few(self.name, self.stages, 1)

    @property
    def each(self) -> int:
        return self.stages

    def orders(self, n: int, m: int) -> list[Order]:
        return [alternate(n, m, rank, self.stages, hop=1, in_two=True) for rank in range(n)]


@dataclass(frozen=True)
class ZeroBubbleV(Schedule):
    """Two stages on each rank, of which the first rank has the first and the last. Qi et al. 2023
    (ZB-V), arXiv:2401.10241, section 6.

    No bubble where all parts take as long and m is at least 2 n - 1.
    """

    name: ClassVar[str] = "zbv"
    in_two: ClassVar[bool] = True

    @property
    def each(self) -> int:
        return 2

    def owner(self, stage: int, n: int) -> int:
        return min(stage, 2 * n - 1 - stage)

    def orders(self, n: int, m: int) -> list[Order]:
        return [[a for a in self._order(n, max(m, 2 * n - 1), r) if a.microbatch < m]
                for r in range(n)]  # fmt: skip

    def _order(self, n: int, m: int, rank: int) -> Order:
        """That of a rank where there are enough microbatches."""
        taken = _Taken()
        down, up = rank, 2 * n - 1 - rank

        def both(stage: int) -> None:
            taken.do("input", stage)
            taken.do("weight", stage)

        for _ in range(2 * (n - rank) - 1):
            taken.do("forward", down)
        for _ in range(rank):
            taken.do("forward", up)
            taken.do("forward", down)
        for _ in range(n - rank):
            taken.do("forward", up)
            both(up)
        while taken.count("forward", up) < taken.count("forward", down) or (
            taken.count("forward", down) < m
        ):
            if taken.count("forward", down) < m:
                taken.do("forward", down)
            both(down)
            taken.do("forward", up)
            both(up)
        for _ in range(rank):
            taken.do("input", down)
            taken.do("input", up)
        for _ in range(n - rank):
            both(down)
        for stage in (up, down):
            while taken.count("weight", stage) < taken.count("input", stage):
                taken.do("weight", stage)
        return taken.order


SCHEDULES: dict[str, type[Schedule]] = {
    "1f1b": OneForwardOneBackward,
    "gpipe": GPipe,
    "interleaved": Interleaved,
    "zero_bubble": ZeroBubble,
    "zbv": ZeroBubbleV,
}


class _Taken:
    """Actions of one rank so far. Each stage takes microbatches in turn."""

    def __init__(self) -> None:
        self.order: Order = []
        self._counts: Counter[tuple[Kind, int]] = Counter()

    def do(self, kind: Kind, stage: int) -> None:
        self.order.append(Action(kind, stage, self._counts[kind, stage]))
        self._counts[kind, stage] += 1

    def count(self, kind: Kind, stage: int) -> int:
        return self._counts[kind, stage]


def alternate(n: int, m: int, rank: int, each: int, hop: int, in_two: bool) -> Order:
    """Some forward passes, then forward and backward ones in turn, then what is left.

    Args:
        each: stages of the rank, of which it takes `m // max(1, m // n)` microbatches through one
            before it goes on to the next.
        hop: forward passes more before the first backward one, for each rank that comes after.
        in_two: gradients of weights follow `rank` backward passes later.
    """
    run, taken, total = m // max(1, m // n), _Taken(), each * m
    first = min((each - 1) * run + hop * (n - 1 - rank), total)
    backward: list[int] = []  # stages of the backward passes so far
    done = 0  # gradients of weights
    for turn in range(total + first):
        if turn < total:
            taken.do("forward", turn // run % each * n + rank)
        if turn < first:
            continue
        backward.append((each - 1 - (turn - first) // run % each) * n + rank)
        taken.do("input" if in_two else "backward", backward[-1])
        if in_two and turn - first >= rank:
            taken.do("weight", backward[done])
            done += 1
    for stage in backward[done:] if in_two else ():
        taken.do("weight", stage)
    return taken.order


def charge_clock(orders: list[Order], stages: int, costs: Mapping[Kind, float] = COSTS) -> float:
    """How long it takes until the last rank is done, in the unit of the costs of an action.

    Raises:
        ValueError: ranks wait for each other for ever.
    """
    return max(time_actions(orders, stages, costs).values())


def time_actions(
    orders: list[Order], stages: int, costs: Mapping[Kind, float] = COSTS
) -> dict[Action, float]:
    """When each action ends; arguments as of `charge_clock`."""
    times: dict[Action, float] = {}
    ended: dict[tuple[str, int, int], float] = {}
    places, clocks = [0] * len(orders), [0.0] * len(orders)
    left = sum(map(len, orders))
    while left:
        moved = False
        for rank, order in enumerate(orders):
            while places[rank] < len(order):
                action = order[places[rank]]
                needs = needed(action, stages)
                if any(key not in ended for key in needs):
                    break
                begin = max([clocks[rank], *(ended[key] for key in needs)])
                end = clocks[rank] = begin + costs[action.kind]
                ended[_done(action)] = times[action] = end
                places[rank] += 1
                left, moved = left - 1, True
        if not moved:
            stuck = [str(o[p]) for o, p in zip(orders, places, strict=True) if p < len(o)]
            raise ValueError(f"ranks wait for each other: {', '.join(stuck)}")
    return times


def count_held(orders: list[Order]) -> dict[int, int]:
    """The most microbatches at a time of which each stage holds activations: from the forward pass
    until the gradients of its weights are computed."""
    held, most = Counter[int](), Counter[int]()
    for order in orders:
        for kind, stage, _ in order:
            held[stage] += {"forward": 1, "input": 0}.get(kind, -1)
            most[stage] = max(most[stage], held[stage])
    return dict(most)


def needed(action: Action, stages: int) -> list[tuple[str, int, int]]:
    """What has to be done before an action: (pass, stage, microbatch). A pass is "forward", "back"
    or "weight"."""
    kind, stage, microbatch = action
    if kind == "forward":
        return [("forward", stage - 1, microbatch)] if stage else []
    if kind == "weight":
        return [("back", stage, microbatch)]
    own = [("forward", stage, microbatch)]
    return own + ([("back", stage + 1, microbatch)] if stage + 1 < stages else [])


def _done(action: Action) -> tuple[str, int, int]:
    kind = {"forward": "forward", "weight": "weight"}.get(action.kind, "back")
    return kind, action.stage, action.microbatch


def _refuse_few(name: str, stages: object, least: int) -> None:
    if not (type(stages) is int and least <= stages <= 64):
        raise ValueError(f"{name} has from {least} to 64 stages on each rank, got {stages!r}")


def derive_microbatches(rows: int, n: int, schedule: Schedule, least: int = 1) -> int:
    """The number of microbatches, at most 4 n, with which a step over so many rows is shortest by
    the clock: (m + n - 1) turns of the largest microbatch; of equal ones the smallest.

    Args:
        least: rows of each.
    """
    able = {schedule.most(m, n) for m in range(1, max(1, min(rows // least, 4 * n)) + 1)}
    return min(able, key=lambda m: ((m + n - 1) * -(-rows // m), m))


def count_microbatches(
    rows: int, n: int, schedule: Schedule, wanted: int | None, least: int = 1
) -> int:
    """Into how many microbatches so many rows are cut, of which somebody wants a number; None
    derives it."""
    if wanted is None:
        return derive_microbatches(rows, n, schedule, least)
    return schedule.most(min(wanted, max(rows, 1)), n)
