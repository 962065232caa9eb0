"""How well models train under each topology, codec and rule, against one process.

4 worker processes train the digits and the character model of the examples under each plan, with
the batches, learning rates and seeds of data(1), and as many steps as data(1) takes to 90 % of
what it gains in its whole run: there curves are still steep, while at their ends all are alike.
A figure is how far behind data(1) a plan is by then, the mean over seeds (below 0: ahead of it).
Other work on the machine does not change it.

Both are trained by AdamW, as in the examples, and by SGD: the digits with momentum, the characters
without. What comes late is not lost to SGD, which adds it all up. AdamW divides by the size of what
comes: a value that is sent in one of R rounds, as R times itself, moves 1 / sqrt(R) as far. The
codecs that feel it are measured also with `warm` rounds before the first encoded one.
"""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import harness
import torch

import allfuse as af
from allfuse.launcher.local import launch_local
from allfuse.topology import TOPOLOGIES
from allfuse.topology.gossip import GRAPHS
from allfuse.training.loop import train_job

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
WORKERS = 4
SEEDS = (0, 1, 2)
SHARE = 0.9  # of what data(1) gains in its whole run

EXACT = (*(name for name, topology in TOPOLOGIES.items() if topology.exact), "tree(double)")
CODECS = (
    "bf16",
    "fp16",
    "int8",
    "int4",
    "topk(0.25)",
    "topk(0.05)",
    "topk(0.01)",
    "randomk(0.5)",
    "randomk(0.1)",
    "lowrank(8)",
    "lowrank(4)",
    "lowrank(2)",
    "sign",
    "sign, topology=exchange",  # sums are not encoded a second time
)
SLOW = ("topk(0.05)", "topk(0.01)", "randomk(0.1)", "lowrank(4)", "lowrank(2)", "sign")
"""What sends so little that it is measured with warm rounds too."""
RULES = ("median", "trimmed", "clipped(1.0)", "vote")
SUMS = tuple(f"data({WORKERS}, topology={name})" for name in EXACT)
LOSSY = (
    *(f"site({WORKERS}, topology=gossip({graph}))" for graph in GRAPHS),
    *(f"data({WORKERS}, codec={codec})" for codec in CODECS),
)
TOLD = tuple(f"data({WORKERS}, rule={rule})" for rule in RULES)
"""Without a target: what they fuse is not the mean gradient."""

Curve = list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model to train.

    Args:
        job: makes the job, in each worker.
        metric: what is compared; `higher` says which way it gets better.
        every: steps from one look at data(1) to the next.
        target: the most that a plan may be behind, in `unit`.
        warm: numbers of rounds that `SLOW` codecs wait for.
    """

    name: str
    job: Callable[[], af.Job]
    metric: str
    higher: bool
    every: int
    target: float
    unit: str
    warm: tuple[int, ...]

    @property
    def warmed(self) -> list[str]:
        """Plans that encode nothing at first."""
        return [
            f"data({WORKERS}, codec={later(codec, warm)})" for codec in SLOW for warm in self.warm
        ]

    def made(self, seed: int) -> af.Job:
        return replace(self.job(), seed=seed, save_every=None, hooks=[])

    def behind(self, own: float, one: float) -> float:
        """How far a plan is behind data(1), in `unit`."""
        return 100 * (one - own) if self.higher else 100 * (own / one - 1)


def later(codec: str, warm: int) -> str:
    """A codec that encodes nothing in its first rounds.

    >>> later("sign", 10), later("topk(0.01)", 10)
    ('sign(warm=10)', 'topk(0.01, warm=10)')
    """
    axis = af.Plan.parse(f"data({WORKERS}, codec={codec})").axes[0]
    return str(replace(axis.codec, warm=warm))


def by_sgd(job: af.Job, lr: float, momentum: float) -> af.Job:
    return replace(job, optimizer=lambda p: torch.optim.SGD(p, lr=lr, momentum=momentum))


def digits_job(sgd: bool = False, **settings: Any) -> af.Job:
    """Measured on the 597 samples that are not trained on."""
    import digits

    job = digits.job(**settings)
    held_out = tuple(map(torch.cat, zip(job.validation, job.test, strict=True)))
    job = replace(job, validation=held_out, test=None)
    return by_sgd(job, lr=3e-3, momentum=0.9) if sgd else job


def charlm_job(windows: int = 128, sgd: bool = False, **settings: Any) -> af.Job:
    """Measured on the first windows of the text that is held out.

    With momentum, its steepest directions would oscillate where a part of a gradient comes late.
    """
    import charlm

    job = charlm.job(**settings)
    job = replace(job, validation=job.validation[:windows])
    return by_sgd(job, lr=0.3, momentum=0.0) if sgd else job


def accuracy(name: str, warm: tuple[int, ...] = (), **settings: Any) -> Task:
    return Task(
        name=name,
        job=functools.partial(digits_job, **settings),
        metric="accuracy",
        higher=True,
        every=5,
        target=1.0,
        unit="points",
        warm=warm,
    )


def loss(name: str, warm: tuple[int, ...] = (), **settings: Any) -> Task:
    return Task(
        name=name,
        job=functools.partial(charlm_job, **settings),
        metric="loss",
        higher=False,
        every=20,
        target=2.0,
        unit="%",
        warm=warm,
    )


SMALL = {"width": 64, "steps": 300, "megabytes": 1.0}
DIGITS = accuracy("digits, AdamW", warm=(5, 10))
DIGITS_SGD = accuracy("digits, SGD", warm=(10,), sgd=True)
CHARACTERS = loss("characters, AdamW", warm=(10, 25), lr=5e-3, **SMALL)
CHARACTERS_SGD = loss("characters, SGD", warm=(25,), sgd=True, **SMALL)
QUICK = (
    accuracy("digits", epochs=1),
    loss("characters", layers=1, width=32, context=16, steps=20, megabytes=0.2, windows=8),
)


def curve(task: Task, seed: int) -> Curve:
    """What data(1) measures before the first step and every so many steps."""
    found: Curve = []
    job = replace(task.made(seed), evaluate_every=task.every)

    def begin(session: Any, event: Any) -> None:
        metrics = {"loss": job.loss, **job.metrics}
        session.evaluate(metrics, job.validation, batch_size=job.batch_size, forward=job.forward)

    def note(session: Any, event: Any) -> None:
        found.append((session.steps, event.data["metrics"][task.metric]))

    train_job(replace(job, hooks=[af.on("start", begin), af.on("evaluated", note)]), "data(1)")
    return found


def compared_at(curves: Sequence[Curve]) -> tuple[int, list[float]]:
    """The step at which the mean of some curves has made `SHARE` of its gain, and their values.

    The mean, since a single curve gets there sooner by chance, and is ahead of others by that.

    >>> compared_at([[(0, 0.0), (5, 0.8), (10, 0.92), (15, 1.0)]])
    (10, [0.92])
    """
    means = [statistics.mean(value for _, value in points) for points in zip(*curves, strict=True)]
    gain = means[-1] - means[0]
    place = next(i for i, mean in enumerate(means) if (mean - means[0]) / gain >= SHARE)
    return curves[0][place][0], [points[place][1] for points in curves]


def reached(task: Task, plan: str, seed: int, steps: int) -> float:
    """What a plan measures after so many steps. Runs in each of its workers."""
    job = replace(task.made(seed), stop=af.Stop(steps=steps), evaluate_every=steps)
    return train_job(job, plan).metrics[task.metric]


Reach = Callable[[Task, str, int, int], float]


def compare(
    task: Task, plans: Sequence[str], seeds: Sequence[int] = SEEDS, reach: Reach = reached
) -> list[harness.Figure]:
    """A figure for each plan; all run one after the other in the same workers."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))  # workers take it over
    curves = launch_local(lambda: [curve(task, seed) for seed in seeds], 1, threads=1)
    steps, one = compared_at(curves)
    measured = launch_local(
        lambda: [[reach(task, plan, seed, steps) for seed in seeds] for plan in plans],
        WORKERS,
        threads=1,
    )
    return [figure(task, plan, own, one, steps) for plan, own in zip(plans, measured, strict=True)]


def figure(
    task: Task, plan: str, own: Sequence[float], one: Sequence[float], steps: int
) -> harness.Figure:
    """How far a plan is behind data(1), from what both measure with each seed."""
    behind = [task.behind(a, b) for a, b in zip(own, one, strict=True)]
    low, _, high = harness.quartiles(behind)
    each = ", ".join(f"{value:.2f}" for value in behind)
    return harness.Figure(
        name=f"{task.name}: {task.unit} behind data(1), {plan}",
        value=statistics.mean(behind),
        spread=high - low,
        target=None if plan in TOLD else task.target,
        unit=task.unit,
        floor=f"{task.metric} {statistics.mean(own):.4f}, data(1) {statistics.mean(one):.4f} "
        f"after {steps} steps; by seed {each}",
        rounds=len(behind),
    )


def main() -> None:
    options = harness.parse_options(__doc__)
    found: list[harness.Figure] = []
    if options.quick:
        few = (
            "data(4, topology=ring)",
            "site(4, topology=gossip(ring))",
            "data(4, codec=topk(0.05))",
            "data(4, codec=lowrank(4, warm=10))",
        )
        for task in QUICK:
            found += compare(task, few, SEEDS[:1])
    else:
        for task in (DIGITS, CHARACTERS):
            found += compare(task, [*SUMS, *LOSSY, *task.warmed, *TOLD])
        for task in (DIGITS_SGD, CHARACTERS_SGD):  # sums are the same for every optimizer
            found += compare(task, [*LOSSY, *task.warmed])
    harness.report("quality", found, options)


if __name__ == "__main__":
    main()
