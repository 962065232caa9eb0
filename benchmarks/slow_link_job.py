"""What the ranks of `slow_link.py` do: train one of its tasks, each contender in its own way.

All begin with the same weights, take the same batches, each rank its share of them, and step with
the same kind of optimizer.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import slow_link_peers as peers
import torch
import torch.distributed as dist
from slow_link_tasks import TASKS, Task
from torch import nn

import allfuse as af

SENT = Path("/sys/class/net/eth0/statistics/tx_bytes")  # of this host
Way = dict[str, Any]
"""{"plan": ...} in a session, or {"name": ...} of a peer and its options; {"lr": ...} where it is
not the task's."""


@contextlib.contextmanager
def loop_of(way: Way, task: Task, steps: int, seed: int) -> Iterator[tuple[nn.Module, peers.Step]]:
    """A model, and what steps it."""
    options = dict(way)
    lr, plan = options.pop("lr", None), options.pop("plan", None)
    samples = task.samples(steps, seed)
    if plan is None:
        model = task.model(seed)
        with peers.loop_of(model, task, samples, lr, **options) as step:
            yield model, step
        return
    with af.session(plan, quiet=True) as session:
        model = session.model(lambda: task.model(seed))
        optimizer, schedule = task.optimizer(model, lr)
        session.optimizer(optimizer)
        session.scheduler(schedule)
        batches = session.batches(samples, batch_size=task.batch, shuffle=False)

        def step() -> None:
            session.step(next(batches), task.loss, forward=task.forward)

        yield model, step
        batches.close()


def work(runs: list[dict[str, Any]], quick: bool = False) -> list[Any]:
    """Runs in each rank: what `count` or `clock` finds of each, one after the other."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    tasks = {name: TASKS[name](quick) for name in sorted({run["task"] for run in runs})}
    found = []
    for run in runs:
        about = dict(run)
        do = {"count": count, "clock": clock}[about.pop("do")]
        found.append(do(tasks[about.pop("task")], **about))
        dist.barrier()
    dist.destroy_process_group()
    return found


def count(
    task: Task, way: Way, seed: int, most: int, segment: int, target: float | None = None
) -> list[float]:
    """What is measured before the first step and after each segment, until it is the target."""
    with loop_of(way, task, most, seed) as (model, step):
        values = [measure(task, model)]
        for _ in range(most // segment):
            for _ in range(segment):
                step()
            values.append(measure(task, model))
            if target is not None and task.reached(values[-1], target):
                break
        dist.barrier()
    return values


def clock(task: Task, way: Way, steps: int, warm: int = 2, seed: int = 0) -> dict[str, float]:
    """Seconds of a step, from the first after `warm` ones to the end of the last on all ranks, and
    the bytes that this host sends in one."""
    with loop_of(way, task, warm + steps, seed) as (_, step):
        for _ in range(warm):
            step()
        dist.barrier()
        begin, before = time.perf_counter(), sent_so_far()
        for _ in range(steps):
            step()
        dist.barrier()
        seconds, sent = time.perf_counter() - begin, sent_so_far() - before
    return {"seconds": seconds / steps, "sent": sent / steps}


@torch.no_grad()
def measure(task: Task, model: nn.Module) -> float:
    """The mean over the models of all ranks, each as it is: nothing is fused to be measured."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sums = torch.tensor(task.measure(model, rank, ranks), dtype=torch.float64)
    dist.all_reduce(sums)
    return float(sums[0] / sums[1]) if sums[1] else math.nan


def sent_so_far() -> int:
    return int(SENT.read_text()) if SENT.exists() else 0
