"""Time to a fixed loss on 4 emulated hosts of 100 Mbit/s, against DDP and its hooks.

The character model of examples/charlm.py, 5.3 MB of gradients, on one rank a host. The loss is the
one at which a single process has made 90 % of its gain in 288 steps, over the same held-out samples
for all. Each contender trains there in full: same first weights, batches, optimizer and learning
rate, which is the better of two for plain DistributedDataParallel. `data(4)` alone is timed for 24
steps, and what it measures before them is counted once: its steps are those of one process. Beside
it stands what a step takes without a limit.

PowerSGD stands here with what served it best: few steps before it begins (torch recommends 10 % of
all, which takes longer here than all the rest) and one bucket: with several, rank 1 aborted when
tried.
Needs root and iproute2, and is skipped elsewhere.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import harness
import hosts
import slow_link_job as job

import allfuse as af

HOSTS = 4
RATE, BYTES_PER_S = "100mbit", 100e6 / 8
UNLIMITED = "10gbit"
GAIN = 0.9
BARE = "DDP"
TIMED_STEPS = 24  # of what is not trained in full, and on the unlimited link
SECONDS_EACH = 9.0  # to start the ranks of a contender and to measure its losses


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Who takes part. `guess_s`: about how long its step takes, to tell how much time is left."""

    name: str
    way: dict[str, Any]
    guess_s: float = 0.08
    in_full: bool = True

    @property
    def is_plan(self) -> bool:
        return "plan" in self.way

    @property
    def segment(self) -> int:
        """Steps from one measured loss to the next: sites are measured where they have met."""
        found = af.Plan.parse(self.way["plan"]).axis("site") if self.is_plan else None
        every = getattr(found, "every", 1)
        return math.lcm(job.FULL["segment"], every)


def hook(name: str, guess_s: float, **way: Any) -> Contender:
    return Contender(name=name, way=way, guess_s=guess_s)


def plan(text: str, guess_s: float = 0.08, in_full: bool = True) -> Contender:
    return Contender(name=text, way={"plan": text}, guess_s=guess_s, in_full=in_full)


CONTENDERS = [
    hook(BARE, 0.72, hook="none"),
    hook("DDP, fp16", 0.4, hook="fp16"),
    *(
        hook(
            f"DDP, PowerSGD({rank}) after {start} steps",
            0.06 + 0.005 * start,
            hook="powersgd",
            rank=rank,
            start=start,
        )
        for rank, start in ((1, 2), (2, 2), (4, 2), (2, 10))
    ),
    plan("data(4)", 0.72, in_full=False),
    plan("data(4, codec=bf16)", 0.4),
    plan("data(4, codec=int8)", 0.25),
    plan("data(4, codec=int4)", 0.15),
    plan("data(4, codec=sign)", 0.12),
    plan("data(4, codec=topk(0.01))"),
    plan("data(4, codec=topk(0.002))"),
    plan("data(4, topology=ring, codec=topk(0.01))"),
    plan("data(4, codec=randomk(0.02))"),
    *(plan(f"data(4, codec=lowrank({rank}))") for rank in (1, 2, 4)),
    plan("site(4, every=8)", 0.12),
    plan("site(4, every=8, codec=int8)", 0.06),
    plan("site(4, every=16, codec=int8)", 0.05),
    plan("site(4, every=16, codec=int4)", 0.05),
    plan("site(4, every=8, codec=int4)", 0.05),
    plan("site(4, every=32, codec=int8)", 0.05),
]


@dataclass
class Run:
    """What came out of a contender. Losses are those before and after each segment."""

    contender: Contender
    segment: int = 1
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    sent: float = math.nan
    failed: str = ""
    free_s: float = math.nan  # a step on the unlimited link

    def take(self, found: dict[str, Any]) -> None:
        self.segment, self.losses = found["segment"], found["losses"]
        self.seconds, self.sent = found["seconds"], found["sent"]

    @property
    def step_s(self) -> float:
        """The mean: rounds come only now and then."""
        return statistics.mean(self.seconds) / self.segment if self.seconds else math.nan

    def steps_to(self, target: float) -> int | None:
        """The steps after which the loss was measured to be reached."""
        reached = [n for n, loss in enumerate(self.losses) if loss <= target]
        return reached[0] * self.segment if reached else None

    def seconds_to(self, target: float) -> float:
        """Infinite where the loss was not reached."""
        steps = self.steps_to(target)
        return math.inf if steps is None else sum(self.seconds[: steps // self.segment])

    def loss_at(self, step: int) -> float:
        """At the first measuring after so many steps."""
        place = -(-step // self.segment)
        return self.losses[place] if place < len(self.losses) else math.nan


def launch(contenders: Sequence[Contender], count: int = HOSTS, **rest: Any) -> list[Any]:
    """What rank 0 found of each. Ranks are timed together, so that all say the same."""
    arguments = {"ways": [each.way for each in contenders], **rest}
    found: list[Any] = hosts.launch(
        "slow_link_job:train_all", arguments, hosts=count, timeout_s=400.0
    )[0]
    return found


class Progress:
    """Says what was done and how long the rest may take."""

    def __init__(self, costs: Sequence[float]) -> None:
        self.left, self.done, self.begin = list(costs), 0.0, time.monotonic()

    def tell(self, text: str) -> None:
        self.done += self.left.pop(0)
        rest = sum(self.left) * (time.monotonic() - self.begin) / self.done
        print(f"  {text}; {rest / 60:.1f} min left", flush=True)


def train_alone() -> tuple[float, Run]:
    """The loss to reach, and the run of one process that says so."""
    alone = Run(Contender(name="one process", way={}))
    alone.take(launch([alone.contender], count=1, sizes=job.FULL)[0])
    return target_of(alone), alone


def target_of(alone: Run) -> float:
    return alone.losses[0] - GAIN * (alone.losses[0] - alone.losses[-1])


def time_unlimited(runs: Sequence[Run]) -> None:
    """What a step takes where the link has no limit; rounds of sites are in it."""
    alike: dict[tuple[bool, int], list[Run]] = {}
    for run in runs:
        alike.setdefault((run.contender.is_plan, run.contender.segment), []).append(run)
    for (_, segment), group in alike.items():
        contenders = [run.contender for run in group]
        try:
            found = launch(contenders, sizes=job.FULL, segment=segment, most=2 * segment)
        except RuntimeError as error:
            print(f"  not timed: {last_line(error)}", flush=True)
            continue
        for run, told in zip(group, found, strict=True):
            run.free_s = told["seconds"][-1] / segment


def train_contender(run: Run, target: float, steps: int) -> str:
    """On the slow link. What to say of it."""
    contender = run.contender
    limits: dict[str, Any] = {"target": target, "least": steps}
    if not contender.in_full:
        limits = {"most": TIMED_STEPS}
    try:
        run.take(launch([contender], sizes=job.FULL, segment=contender.segment, **limits)[0])
    except RuntimeError as error:
        run.failed = last_line(error)
        return f"{contender.name}: failed ({run.failed})"
    reached = run.steps_to(target)
    said = f"{run.seconds_to(target):.1f} s, {reached} steps" if reached else "not reached"
    return f"{contender.name}: {run.step_s * 1e3:.0f} ms a step" + (
        f"; {said}" if contender.in_full else ""
    )


def last_line(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[-1][:160]


def compete() -> list[harness.Figure]:
    runs = [Run(contender) for contender in CONTENDERS]
    steps = int(0.5 * job.FULL["steps"])
    progress = Progress(
        [40.0, 2.0 * len(runs)]
        + [
            SECONDS_EACH + each.guess_s * (steps if each.in_full else TIMED_STEPS)
            for each in CONTENDERS
        ]
    )
    with hosts.emulated(HOSTS, UNLIMITED):
        target, alone = train_alone()
        steps = alone.steps_to(target) or job.FULL["steps"]
        progress.tell(f"one process: loss {target:.3f} after {steps} steps")
        time_unlimited(runs)
        progress.tell("timed on a link without limit")
    with hosts.emulated(HOSTS, RATE):
        for run in runs:
            progress.tell(train_contender(run, target, steps))
    for run in runs:
        if not run.contender.in_full:  # goes as one process does, to rounding
            run.losses, run.segment = alone.losses, alone.segment
            first, *rest = run.seconds  # a session measures its links before its first step
            run.seconds = [first, *[statistics.mean(rest)] * (len(alone.losses) - 2)]
    return list(figures(runs, target, steps))


def figures(runs: Sequence[Run], target: float, steps: int) -> Iterator[harness.Figure]:
    """Each contender beside plain DDP, then the best against the targets."""
    bare = runs[0]
    plans = [run for run in runs if run.contender.is_plan]
    hooks = [run for run in runs if not run.contender.is_plan and run is not bare]
    yield harness.Figure(
        name=f"{BARE}: seconds to a loss of {target:.3f}",
        value=bare.seconds_to(target),
        spread=0.0,
        unit="s",
        floor=about(bare, target, steps),
    )
    for run in (*hooks, *plans):
        if run.failed:
            print(f"{run.contender.name}: failed: {run.failed}")
        else:
            yield ratio(run.contender.name, bare, run, target, floor=about(run, target, steps))
    best = min(plans, key=lambda run: run.seconds_to(target))
    yield ratio(
        "DDP's time over that of the best plan",
        bare,
        best,
        target,
        goal=8.0,
        floor=f"{best.contender.name}; the wire's own floor of DDP's sums is "
        f"{1.5 * payload_bytes() / BYTES_PER_S * 1e3:.0f} ms a step",
    )
    hook = min(hooks, key=lambda run: run.seconds_to(target), default=bare)
    yield ratio(
        "the best hook's time over that of the best plan",
        hook,
        best,
        target,
        goal=1.0,
        floor=f"{hook.contender.name} against {best.contender.name}",
    )


def about(run: Run, target: float, steps: int) -> str:
    """The row of a contender."""
    reached = run.steps_to(target)
    took = "not reached" if reached is None else f"{run.seconds_to(target):.1f} s, {reached} steps"
    free = "" if math.isnan(run.free_s) else f" ({run.free_s * 1e3:.0f} without a limit)"
    return (
        f"{took}; {run.step_s * 1e3:.0f} ms a step{free}; "
        f"{run.sent / 1e6:.2f} MB sent a step; loss {run.loss_at(steps):.3f} after {steps} steps"
    )


def ratio(
    name: str, slow: Run, fast: Run, target: float, goal: float | None = None, floor: str = ""
) -> harness.Figure:
    """How many times as long one takes; 0 where the other does not come there. The spread is that
    of the fast one's segments."""
    low, middle, high = harness.quartiles(fast.seconds)
    took = fast.seconds_to(target)
    value = 0.0 if took == math.inf else slow.seconds_to(target) / took
    return harness.Figure(
        name=name,
        value=value,
        spread=value * (high - low) / middle,
        target=goal,
        better="higher",
        floor=floor,
        rounds=len(fast.seconds),
    )


def payload_bytes() -> int:
    return 4 * sum(parameter.numel() for parameter in job.model_of(job.FULL).parameters())


def smoke() -> list[harness.Figure]:
    """All kinds of contenders on 2 hosts, in one launch."""
    contenders = [
        Contender(name="one process", way={}),
        hook(BARE, 0.0, hook="none"),
        plan("data(2, codec=topk(0.1))"),
        plan("site(2, every=2)"),
    ]
    with hosts.emulated(2, RATE):
        found = launch(contenders, count=2, sizes=job.QUICK)
    runs = [Run(contender) for contender in contenders]
    for run, said in zip(runs, found, strict=True):
        run.take(said)
    return list(figures(runs[1:], target_of(runs[0]), job.QUICK["steps"]))


def main() -> None:
    options = harness.parse_options(__doc__)
    if (reason := hosts.why_not()) is not None:
        print(f"skipped: {reason}")
        print(harness.json_line("slow_link", [], options, [reason]))
        return
    harness.report("slow_link", smoke() if options.quick else compete(), options)


if __name__ == "__main__":
    main()
