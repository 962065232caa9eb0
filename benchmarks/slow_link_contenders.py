"""Who takes part in `slow_link.py`, in what, and how far each came."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

FREE, FAST, SLOW = "10gbit", "100mbit", "10mbit"
LINKS = {FREE: "without a limit", FAST: "100 Mbit/s", SLOW: "10 Mbit/s"}
DDP, HAND = "DDP", "DiLoCo by hand"
NESTEROV = {"outer_lr": 0.7, "momentum": 0.5}


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a task is trained to, and how its contenders are measured.

    most: steps. segment: steps from one measuring to the next. clocked: at least so many are timed.
    """

    name: str
    task: str
    target: float
    most: int
    segment: int
    clocked: int
    seeds: tuple[int, ...]

    @property
    def unit(self) -> str:
        return "loss" if self.task == "characters" else "accuracy"

    def reached(self, value: float) -> bool:
        return value <= self.target if self.unit == "loss" else value >= self.target


@dataclass(kw_only=True)
class Contender:
    """Who takes part.

    Attributes:
        every: steps from round to round.
        bytes_heavy: sends so much that few steps are timed on the slow links.
        curves: what was measured at each segment, by seed.
        seconds: of a step, by link, a value for each round of timing. sent: bytes of a host in one.
    """

    name: str
    kind: str
    way: dict[str, Any]
    every: int = 1
    bytes_heavy: bool = False
    curves: dict[int, list[float]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    sent: float = math.nan
    failed: str = ""

    def steps_to(self, goal: Goal, seed: int) -> float:
        values = self.curves.get(seed, [])[1:]
        reached = (n for n, value in enumerate(values, 1) if goal.reached(value))
        return next(reached, math.inf) * goal.segment

    def times(self, goal: Goal, link: str, at_least: bool = False) -> list[float]:
        """Seconds to the goal, for each seed: infinite where it was not reached, or, as what it
        takes at least, those of all steps that were done."""
        if link not in self.seconds:
            return [math.inf] * len(goal.seeds)
        step_s = statistics.median(self.seconds[link])
        most = goal.most if at_least else math.inf
        return [min(self.steps_to(goal, seed), most) * step_s for seed in goal.seeds]

    def at(self, goal: Goal, seed: int, step: float) -> float:
        """What was measured after so many steps, or last."""
        values = self.curves.get(seed, [math.nan])
        return values[min(int(min(step, goal.most)) // goal.segment, len(values) - 1)]

    def steps_to_clock(self, goal: Goal, link: str) -> int:
        if self.bytes_heavy and link != FREE:
            return 24 if link == FAST else 4
        return self.every * -(-goal.clocked // self.every)


def plan(text: str, every: int, lr: float) -> Contender:
    return Contender(name=text, kind="plan", way={"plan": text, "lr": lr}, every=every)


def by_hand(every: int, lr: float, **outer: float) -> Contender:
    told = "Nesterov" if outer else "average"
    way = {"name": "diloco", "every": every, "lr": lr, **outer}
    return Contender(name=f"{HAND}, H={every}, {told}", kind=HAND, way=way, every=every)


def ddp(lr: float) -> Contender:
    return Contender(name=DDP, kind=DDP, way={"name": "ddp", "lr": lr}, bytes_heavy=True)


def from_elsewhere(name: str, every: int, lr: float, **options: float) -> Contender:
    way = {"name": name, "every": every, "lr": lr, **options}
    return Contender(name=f"{name}, H={every}", kind=name, way=way, every=every)


def contests() -> list[tuple[Goal, list[Contender]]]:
    """The tasks of (a), each with its contenders: the best of what was tried, see docs/log.md."""
    text = Goal(
        name="characters", task="characters", target=2.45, most=1120, segment=16, clocked=64,
        seeds=(1, 2),
    )  # fmt: skip
    digits = Goal(
        name="digits", task="digits", target=0.97, most=480, segment=8, clocked=96,
        seeds=(1, 2, 3, 4, 5),
    )  # fmt: skip
    return [
        (
            text,
            [
                ddp(1e-3),
                by_hand(64, 2e-3, **NESTEROV),
                by_hand(128, 1e-3, **NESTEROV),
                by_hand(128, 2e-3, **NESTEROV),
                from_elsewhere("torchft", 64, 2e-3, **NESTEROV),
                from_elsewhere("hivemind", 64, 1e-3),
                plan("site(4, every=16, topology=central, codec=sign)", 16, 2e-3),
            ],
        ),
        (
            digits,
            [
                ddp(4e-3),
                by_hand(32, 4e-3),
                by_hand(96, 4e-3),
                by_hand(208, 3e-3),
                from_elsewhere("torchft", 96, 4e-3, outer_lr=1.0, momentum=0.0),
                from_elsewhere("hivemind", 96, 4e-3),
                plan("site(4, every=32, topology=central, codec=int4)", 32, 3e-3),
                plan("site(4, every=208, topology=central, codec=int4)", 208, 3e-3),
                plan("site(4, every=16, topology=central, codec=sign)", 16, 4e-3),
                plan("site(4, every=16, topology=central, codec=sign(block=256))", 16, 4e-3),
            ],
        ),
    ]


def hooks() -> tuple[Goal, list[Contender]]:
    """The task of (b) and its contenders. PowerSGD's first steps cost more: all are timed."""
    goal = Goal(
        name="characters, easy", task="characters", target=2.82, most=288, segment=8, clocked=32,
        seeds=(1,),
    )  # fmt: skip
    fp16 = Contender(
        name="DDP, fp16", kind="hook", way={"name": "ddp", "hook": "fp16"}, bytes_heavy=True
    )
    return goal, [
        ddp(1e-3),
        fp16,
        *(powersgd(rank, start) for rank, start in ((4, 2), (2, 10))),
        *(
            plan(f"data(4, codec={codec})", 1, 1e-3)
            for codec in ("int8", "int4", "sign", "topk(0.01)", "lowrank(2)", "lowrank(4)")
        ),
        plan("site(4, every=16, topology=central, codec=int4)", 16, 1e-3),
    ]


def powersgd(rank: int, start: int) -> Contender:
    way = {"name": "ddp", "hook": "powersgd", "rank": rank, "start": start}
    name = f"DDP, PowerSGD({rank}) after {start} steps"
    return Contender(name=name, kind="hook", way=way, every=144)
