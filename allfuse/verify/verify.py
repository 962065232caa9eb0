"""A job under its plan against its reference: runs both and says how they compare."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from allfuse.base.errors import PlanError, UserError
from allfuse.launcher.thread import first_failure, launch_threads
from allfuse.plan import Data, Plan, Site, as_plan
from allfuse.plan.axes import Axis
from allfuse.plan.plan import PlanLike
from allfuse.rule import Mean
from allfuse.store.scratch import scratch_folder
from allfuse.verify.compare import TOLERANCES
from allfuse.verify.ordered import check_ordered, verify_ordered
from allfuse.verify.progress import Listener, Relay
from allfuse.verify.record import Reference
from allfuse.verify.report import Report, Row
from allfuse.verify.task import JobSource, Task

PLAIN: dict[str, Any] = {"codec": "identity", "rule": "mean", "fragments": 1}


def verify_job(
    job: JobSource,
    plan: PlanLike,
    *,
    settings: Mapping[str, Any] | None = None,
    steps: int = 10,
    double: bool = True,
    device: str | None = None,
    on_event: Listener | None = None,
    threads: bool = False,
) -> Report:
    """Whether a job under a plan gives the numbers that the plan promises, step by step.

    First the reference (reference.py) trains in a process of its own, then the job trains under the
    plan, with `train_job` as always. Every rank compares its own loss, gradient norm and weights
    after every step. Weights of the reference lie in a temporary folder meanwhile: steps x weights
    in float64, at most 4 GB. Plans with servers run first, and their own order of events is
    executed serially afterwards (ordered.py).

    Args:
        job: a `Job`, a function that makes one, or the path of a job file.
        settings: arguments for the job function.
        double: both in float64, where all that is not rounding stands out. Else, and for jobs that
            cannot, in the job's own precision, with wider tolerances.
        on_event: called as `Bus.emit` is, with "compared" and "note" events, while it goes on.
        threads: ranks are threads of this process (tests) instead of new processes.

    Raises:
        PlanError: verify cannot replay the plan. Else as training does.
    """
    chosen = as_plan(plan)
    check_plan(chosen)
    if steps < 1:
        raise UserError(f"verify: received {steps} steps; allowed: 1 or more")
    if device is None and torch.cuda.device_count() < chosen.workers:
        device = "cpu"  # the same for both runs
    crew = Crew(chosen, threads)
    before = torch.get_default_dtype()
    try:
        with scratch_folder("allfuse-verify-") as folder:
            task = Task(job, dict(settings or {}), chosen, steps, double, device, folder)
            with Relay(task.folder / "progress.jsonl", on_event) as relay:
                if chosen.outer is not None:
                    return verify_ordered(crew, task, lambda text: relay.emit("note", text=text))
                relay.emit("note", text="the reference trains: a plain loop in one process")
                reference: Reference = crew.run_alone(task.reference)
                relay.emit("note", text=f"{chosen} trains, and is compared at every step")
                rows, each = crew.run(functools.partial(task.run, reference))
    finally:
        torch.set_default_dtype(before)  # which threads share
    return make_report(chosen, reference, rows, each)


class Crew:
    """Starts the ranks of the two runs: the same number of threads in all for both."""

    def __init__(self, plan: Plan, threads: bool) -> None:
        self.plan, self.by_threads = plan, threads
        usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
        self.cores = len(usable) or os.cpu_count() or 1
        self.each = max(1, self.cores // plan.workers)

    def run_alone(self, function: Callable[[], Any]) -> Any:
        total = min(self.cores, self.each * self.plan.workers)
        return self._launch(function, 1, "data(1)", total)

    def run(self, function: Callable[[], Any]) -> Any:
        return self._launch(function, self.plan.workers, str(self.plan), self.each)

    def _launch(self, function: Callable[[], Any], workers: int, plan: str, threads: int) -> Any:
        if not self.by_threads:
            from allfuse.launcher.local import launch_local

            return launch_local(function, workers, plan=plan, threads=threads)
        results = launch_threads(function, workers, plan=plan)
        failure = first_failure(results)
        if failure is not None:
            raise failure
        return results[0]


def check_plan(plan: Plan) -> None:
    """Refuse plans that the reference cannot follow.

    Raises:
        PlanError: the plan cannot run, or an axis fuses otherwise than in step.
    """
    if plan.outer is not None:
        check_ordered(plan)
        return
    plan.validate_executable()
    for axis in plan.axes:
        if axis.replicates and not (isinstance(axis, Data | Site) and axis.sync.bound == 0):
            raise PlanError(str(plan), f"verify cannot replay {axis} yet", f"{axis.name}({axis.n})")
        if plan.replica_size > 1 and isinstance(axis, Data | Site):
            _refuse_beside_splits(plan, axis)


def _refuse_beside_splits(plan: Plan, axis: Data | Site) -> None:
    """What depends on where tensors are cut: the reference has them whole.

    Raises:
        PlanError: a codec that loses something, a rule other than the mean, or fragments.
    """
    reasons = {
        "codec": not axis.codec.lossless,
        "rule": not isinstance(axis.rule, Mean),
        "fragments": isinstance(axis, Site) and axis.fragments > 1,
    }
    found = [name for name, applies in reasons.items() if applies]
    if not found:
        return
    plain: Axis = replace(axis, **{name: PLAIN[name] for name in found})
    nearest = " * ".join(str(plain if each is axis else each) for each in plan.axes)
    why = (
        f"{found[0]}={getattr(axis, found[0])} fuses what one rank has of the model by itself, and "
        "the reference, which has it whole, cannot replay that yet"
    )
    raise PlanError(str(plan), why, nearest)


def make_report(plan: Plan, reference: Reference, rows: list[Row], threads: int) -> Report:
    spent = [row.seconds for row in rows if row.seconds is not None]
    return Report(
        plan=str(plan),
        promise=plan.promise,
        steps=len(reference.figures),
        precision=reference.precision,
        tolerance=dict(TOLERANCES[reference.precision]),
        rows=rows,
        notes=reference.notes,
        workers=plan.workers,
        threads=threads,
        reference_threads=reference.threads,
        plan_seconds=min(spent),
        reference_seconds=min(reference.seconds),
    )
