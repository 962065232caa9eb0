"""Time to a fixed loss and accuracy on 4 emulated hosts of 100 and 10 Mbit/s.

The character model of examples/charlm.py, 1.3 M parameters, and digits, 0.3 M, on one rank a host.
Each contender trains from the same weights on the same batches, at the learning rate that suits it
(tuned on other seeds, as all settings here). Counted are its steps to the goal where the link has
no limit: the first after which the mean over the ranks' own models, each as it is and nothing fused
to be measured, reaches it. Timed are its steps on each link, whole rounds of them. Its time to the
goal is the product, for each seed.

a. against DistributedDataParallel, DiLoCo written by hand over gloo at its best H, and torchft and
   hivemind where they install;
b. characters to an easy loss at 100 Mbit/s, against DDP's fp16 and PowerSGD hooks.

PowerSGD stands here with what served it best: few steps before it begins (torch recommends 10 % of
all, which takes longer here than all the rest) and one bucket: with several, rank 1 aborted when
tried. Needs root and iproute2, and is skipped elsewhere.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import harness
import hosts
import slow_link_peers as peers
from slow_link_contenders import (
    DDP,
    FAST,
    FREE,
    HAND,
    LINKS,
    NESTEROV,
    SLOW,
    Contender,
    Goal,
    by_hand,
    contests,
    ddp,
    from_elsewhere,
    hooks,
    plan,
)

HOSTS = 4
ROUNDS = 3  # of timing plans, all links in each

Contest = tuple[Goal, list[Contender]]


def launch(runs: list[dict[str, Any]], *, quick: bool = False, count: int = HOSTS) -> list[Any]:
    """What rank 0 found. Ranks are timed together, so that all say the same."""
    arguments = {"runs": runs, "quick": quick}
    return list(hosts.launch("slow_link_job:work", arguments, hosts=count, timeout_s=900.0)[0])


class Together:
    """Runs of several contenders in one launch; one by one where that failed."""

    def __init__(self, quick: bool = False, count: int = HOSTS) -> None:
        self.quick, self.count = quick, count
        self.asked: list[tuple[Contender, dict[str, Any], Any]] = []

    def ask(self, contender: Contender, goal: Goal, take: Any, **run: Any) -> None:
        if not contender.failed:
            about = {"task": goal.task, "way": contender.way, **run}
            self.asked.append((contender, about, take))

    def run(self, alone: bool = False) -> None:
        """`alone`: each in a launch of its own, since some abort."""
        for part in [[each] for each in self.asked] if alone else [self.asked]:
            try:
                found = launch([run for _, run, _ in part], quick=self.quick, count=self.count)
            except RuntimeError as error:
                if len(part) > 1:
                    self.run(alone=True)
                    return
                part[0][0].failed = str(error).strip().splitlines()[-1][:160]
                print(f"  {part[0][0].name}: failed: {part[0][0].failed}", flush=True)
                continue
            for (_, _, take), said in zip(part, found, strict=True):
                take(said)


def is_shaky(contender: Contender) -> bool:
    """Whether it is started alone, so that nobody else falls with it."""
    return contender.kind in ("torchft", "hivemind") or "powersgd" in contender.way.values()


def count_steps(goal: Goal, contenders: Sequence[Contender], **about: Any) -> None:
    """On the link without a limit, until the goal is reached."""
    for shaky in (False, True):
        for seed in goal.seeds:
            together = Together(**about)
            for each in contenders:
                if is_shaky(each) == shaky:
                    keep = each.curves.__setitem__
                    together.ask(
                        each, goal, lambda said, keep=keep, seed=seed: keep(seed, said),
                        do="count", seed=seed, most=goal.most, segment=goal.segment,
                        target=goal.target,
                    )  # fmt: skip
            if together.asked:
                together.run(alone=shaky)


def clock(contests: Sequence[Contest], link: str, first: bool, **about: Any) -> None:
    """What steps take on this link. Plans are timed in each round, others in the first one."""
    for shaky in (False, True):
        together = Together(**about)
        for goal, contenders in contests:
            for each in contenders:
                if is_shaky(each) == shaky and (first or each.kind == "plan"):
                    together.ask(
                        each, goal, lambda said, each=each: take_time(each, link, said),
                        do="clock", steps=each.steps_to_clock(goal, link),
                    )  # fmt: skip
        if together.asked:
            together.run(alone=shaky)


def take_time(contender: Contender, link: str, said: dict[str, float]) -> None:
    contender.seconds.setdefault(link, []).append(said["seconds"])
    contender.sent = said["sent"]


def compete() -> list[harness.Figure]:
    found, easy, begin = contests(), hooks(), time.monotonic()
    missing = sorted({c.kind for _, cs in found for c in cs if not peers.installed(c.kind)})
    found = [(goal, [c for c in cs if c.kind not in missing]) for goal, cs in found]
    for name in missing:
        print(f"  skipped, as it is not installed: {name}", flush=True)

    def tell(text: str) -> None:
        print(f"  {(time.monotonic() - begin) / 60:4.1f} min: {text}", flush=True)

    with hosts.emulated(HOSTS, FREE):
        for goal, contenders in (*found, easy):
            count_steps(goal, contenders)
            for each in contenders:
                steps = [each.steps_to(goal, seed) for seed in goal.seeds]
                tell(f"{goal.name}: {each.name}: {steps} steps")
    for number in range(ROUNDS):
        for link in LINKS:
            with hosts.emulated(HOSTS, link):
                clock(found, link, first=number == 0)
                if link == FAST and number == 0:
                    clock([easy], link, first=True)
            tell(f"timed on a link {LINKS[link]}, round {number + 1} of {ROUNDS}")
    return [
        *(figure for goal, contenders in found for figure in figures(goal, contenders)),
        *hook_figures(*easy),
    ]


def best(contenders: Sequence[Contender], goal: Goal, link: str) -> Contender:
    return min(contenders, key=lambda each: statistics.median(each.times(goal, link)))


def figures(goal: Goal, contenders: Sequence[Contender]) -> Iterator[harness.Figure]:
    """Both links: the best plan over DDP, the best by hand, others, and itself without a limit."""
    goals = {FAST: (12.0, 1.0, 1.25), SLOW: (60.0, 2.0, 1.6)}
    bare = contenders[0]
    for link, (over_ddp, over_hand, limit) in goals.items():
        kinds: dict[str, list[Contender]] = {}
        for each in contenders:
            kinds.setdefault(each.kind, []).append(each)
        ours = best(kinds.pop("plan"), goal, link)
        if ours.failed:
            raise RuntimeError(f"{ours.name} failed: {ours.failed}")
        for kind, group in kinds.items():
            target = {DDP: over_ddp, HAND: over_hand}.get(kind)
            yield faster(goal, link, ours, best(group, goal, link), bare, target)
        slowed = harness.ratios(ours.seconds[link], ours.seconds[FREE])
        yield harness.figure(
            f"{goal.name}, {LINKS[link]}: {ours.name} over itself without a limit",
            slowed,
            target=limit,
            floor=f"{statistics.median(ours.seconds[link]) * 1e3:.1f} and "
            f"{statistics.median(ours.seconds[FREE]) * 1e3:.1f} ms a step",
        )


def faster(
    goal: Goal, link: str, ours: Contender, other: Contender, bare: Contender, target: float | None
) -> harness.Figure:
    """The other's time over ours, for each seed; 0 where ours does not come there, or it failed."""
    slow, fast = other.times(goal, link, at_least=True), ours.times(goal, link)
    values = harness.ratios([0.0] * len(fast) if other.failed else slow, fast)
    name = f"{goal.name} to {goal.unit} {goal.target}, {LINKS[link]}: {other.name} over the plan"
    floor = f"{about(goal, link, ours, bare)} against {about(goal, link, other, bare)}"
    if lost := other.times(goal, link).count(math.inf):
        floor += f"; not there after {goal.most} steps, which count: {lost} of {len(values)} seeds"
    return harness.figure(name, values, target=target, better="higher", floor=floor)


def about(goal: Goal, link: str, run: Contender, bare: Contender) -> str:
    """A contender's row."""
    if run.failed:
        return f"{run.name} failed: {run.failed}"
    seconds = statistics.median(run.times(goal, link))
    steps = statistics.median(run.steps_to(goal, seed) for seed in goal.seeds)
    equal = statistics.mean(run.at(goal, seed, bare.steps_to(goal, seed)) for seed in goal.seeds)
    step_s = statistics.median(run.seconds.get(link, [math.nan]))
    return (
        f"{run.name}: {seconds:.1f} s, {steps:.0f} steps of {step_s * 1e3:.1f} ms, "
        f"{run.sent / 1e6:.3f} MB sent in one; {goal.unit} {equal:.3f} after as many samples as DDP"
    )


def hook_figures(goal: Goal, contenders: Sequence[Contender]) -> Iterator[harness.Figure]:
    """Each beside plain DDP, then the best plan against the targets."""
    bare = contenders[0]
    for each in contenders[1:]:
        yield faster(goal, FAST, each, bare, bare, None)
    ours = best([c for c in contenders if c.kind == "plan"], goal, FAST)
    hook = best([c for c in contenders if c.kind == "hook"], goal, FAST)
    yield faster(goal, FAST, ours, bare, bare, 8.0)
    yield faster(goal, FAST, ours, hook, bare, 1.0)


def smoke() -> list[harness.Figure]:
    """All kinds of contenders on 2 hosts, some steps each."""
    goal = Goal(
        name="characters", task="characters", target=9.0, most=2, segment=2, clocked=2, seeds=(1,)
    )
    contenders = [
        ddp(1e-3),
        by_hand(2, 1e-3, **NESTEROV),
        *(
            from_elsewhere(name, 2, 1e-3, **(NESTEROV if name == "torchft" else {}))
            for name in ("torchft", "hivemind")
            if peers.installed(name)
        ),
        plan("site(2, every=2, topology=central, codec=sign)", 2, 1e-3),
    ]
    small = {"quick": True, "count": 2}
    with hosts.emulated(2, FREE):
        count_steps(goal, contenders, **small)
    for link in LINKS:
        with hosts.emulated(2, link):
            clock([(goal, contenders)], link, first=True, **small)
    return list(figures(goal, contenders))


def main() -> None:
    options = harness.parse_options(__doc__)
    if (reason := hosts.why_not()) is not None:
        print(f"skipped: {reason}")
        print(harness.json_line("slow_link", [], options, [reason]))
        return
    missing = [name for name in ("torchft", "hivemind") if not peers.installed(name)]
    found = smoke() if options.quick else compete()
    harness.report("slow_link", found, options, missing)


if __name__ == "__main__":
    main()
