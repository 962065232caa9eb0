"""Runs over servers are runs like any other: checkpoints that every plan reads, and the other way
round."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import allfuse as af
from allfuse.base.errors import Interrupted
from allfuse.job import Job
from allfuse.launcher import current_world
from allfuse.launcher.thread import launch_threads
from allfuse.plan import as_plan
from allfuse.prediction.restore import open_run
from allfuse.split.data import BatchPlan, ColumnSource, Learned, Loader, Stretch
from allfuse.store.checkpoint import Checkpoints
from allfuse.training.loop import Result, train_job
from tests.crews import small_job, train_crew_into

ASP = "data(2, topology=central(servers=2), sync=asp)"
BSP = "data(2, topology=central(servers=2))"


def adamw(steps: int = 14, **changes: Any) -> Job:
    """14 steps are two epochs."""
    changes = {"stop": af.Stop(steps=steps), **changes}
    return small_job(
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        **changes,
    )


def train(job: Job, plan: str, out: Path, *, resume: bool = False) -> Result:
    """Under any plan, on threads."""
    if "servers" in plan:
        return train_crew_into(out, job, plan, resume=resume).result
    workers = as_plan(plan).workers
    results = launch_threads(lambda: train_job(job, out=out, resume=resume), workers, plan=plan)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results[0]


def newest(out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    checkpoints = Checkpoints(out / "checkpoints")
    state, note = checkpoints.read(checkpoints.steps()[0])
    return state, note


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_the_end_of_a_run_over_servers_is_a_checkpoint_of_its_weights(tmp_path: Path) -> None:
    result = train(adamw(), ASP, tmp_path / "run")
    state, note = newest(tmp_path / "run")
    assert state["cursor"][0] == note["steps"] == 14
    assert all(torch.equal(state["models"]["model"][n], w) for n, w in result.weights.items())
    kept = state["optimizers"][0]["state"]
    assert [tuple(kept[i]["exp_avg"].shape) for i in range(4)] == [(9, 8), (9,), (2, 9), (2,)]
    assert all(float(each["step"]) == 28 for each in kept.values())


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (BSP, "data(2)"),
        (BSP, "data(1)"),
        ("data(2)", BSP),
        (BSP, "data(3, topology=central(servers=1))"),
        (BSP, BSP),
    ],
)
def test_a_run_goes_on_under_another_plan_as_if_nothing_had_been(
    tmp_path: Path, first: str, second: str
) -> None:
    whole = train(adamw(), "data(1)", tmp_path / "whole")
    train(adamw(steps=5), first, tmp_path / "run")
    rest = train(adamw(), second, tmp_path / "run", resume=True)
    assert rest.steps == 14
    assert furthest(whole.weights, rest.weights) < 1e-12


def test_a_run_changes_to_servers_and_back_more_than_once(tmp_path: Path) -> None:
    whole = train(adamw(), "data(1)", tmp_path / "whole")
    for number, plan in enumerate([BSP, "data(2)", BSP, "data(1)", BSP]):
        steps = min(3 * (number + 1), 14)
        rest = train(adamw(steps=steps), plan, tmp_path / "run", resume=number > 0)
    assert furthest(whole.weights, rest.weights) < 1e-12
