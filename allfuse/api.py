"""The three ways in, from Python: `session`, `train`, `launch`; and fusions for foreign loops."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from allfuse.base.errors import UserError, nearest
from allfuse.job import Job
from allfuse.jobfile import as_job
from allfuse.launcher import World, current_world, entered
from allfuse.launcher.generation import check_on_loss
from allfuse.launcher.torchrun import started_by_torchrun
from allfuse.plan import Plan, as_plan, check_workers
from allfuse.plan.loss import loss_policy
from allfuse.plan.plan import PlanLike
from allfuse.training.keeper import Resume
from allfuse.training.loop import Result, train_job
from allfuse.training.session import Session
from allfuse.training.settings import Settings
from allfuse.watching import Watching, watch


def session(
    plan: PlanLike | None = None,
    *,
    out: str | Path | None = None,
    resume: Resume = False,
    quiet: bool = False,
    **settings: Any,
) -> Session:
    """A training session for a script's own loop; use it in a `with` statement.

    Args:
        plan: how the job is spread; by default what the launcher was given, else one worker.
        out: the run folder to make (events, checkpoints, model.safetensors), or None.
        resume: go on with the run in `out`; "auto": if there is one, else begin it, so that the
            same script can be started again after anything.
        quiet: show no progress.
        settings: fields of `Settings`: seed, precision, clip, accumulate, compile, recompute,
            batch_statistics, device, keep.

    Raises:
        PlanError, RunError: the plan or folder cannot be used; nothing was written.
    """
    chosen = None if plan is None else as_plan(plan)
    kept = _read_settings(settings)
    made = Session(chosen, out=out, resume=resume, settings=kept, world=_joined(chosen))
    watch(made, Watching(quiet=quiet))
    return made


def _joined(plan: Plan | None) -> World | None:
    """The world of a plan with roles under torchrun; others are found without their parts."""
    if plan is None or plan.outer is None or current_world() is not None:
        return None
    if not started_by_torchrun():
        return None
    from allfuse.hosting import join_started

    return join_started(plan)


def _read_settings(given: Mapping[str, Any]) -> Settings:
    allowed = [field.name for field in fields(Settings)]
    for name in given:
        if name not in allowed:
            raise UserError(
                f"session({name}=...): there is no such setting{nearest(name, allowed)}; "
                f"allowed: {', '.join(allowed)}"
            )
    return Settings(**given)


def train(
    job: Job | Callable[..., Job] | str | Path,
    plan: PlanLike | None = None,
    *,
    out: str | Path | None = None,
    resume: Resume = False,
    device: str | None = None,
    quiet: bool = False,
    settings: Mapping[str, Any] | None = None,
    on_loss: str | None = None,
) -> Result:
    """Train a job under a plan and return what it came to, the weights included.

    Args:
        job: a `Job`, a function that makes one, or the path of a job file.
        plan: text, a Plan, or None for one worker in this process. Several workers are started as
            processes of this machine, unless this process was itself started as one of them.
        out, resume: as for `session`.
        settings: arguments for the job function.
        on_loss: what becomes of the others when a worker process is killed: "stop", "restart",
            "continue"; by default they stop, under plans with servers they continue.
    """
    chosen = as_plan(plan) if plan is not None else None
    work = functools.partial(
        _train_here,
        job,
        chosen,
        out=out,
        resume=resume,
        device=device,
        quiet=quiet,
        settings=settings,
    )
    if (world := _joined(chosen)) is not None:
        with entered(world):
            return work()
    if current_world() is not None or started_by_torchrun():
        return work()
    if chosen is None or (chosen.workers == 1 and chosen.outer is None):
        return work()
    chosen.validate_executable()
    result = launch(work, workers=chosen.workers, plan=chosen, on_loss=on_loss)
    assert isinstance(result, Result)
    return result


def _train_here(
    job: Job | Callable[..., Job] | str | Path,
    plan: Plan | None,
    *,
    out: str | Path | None,
    resume: Resume,
    device: str | None,
    quiet: bool,
    settings: Mapping[str, Any] | None,
) -> Result:
    return train_job(
        as_job(job, settings or {}),
        plan,
        out=out,
        resume=resume,
        device=device,
        prepare=lambda s: watch(s, Watching(quiet=quiet)),
    )


def launch(
    function: Callable[..., Any],
    *args: Any,
    workers: int,
    plan: PlanLike | None = None,
    threads: int | None = None,
    on_loss: str | None = None,
    **kwargs: Any,
) -> Any:
    """Run `function(*args, **kwargs)` in fresh local worker processes; what rank 0 returned.

    Sessions inside take their plan from here (`data(workers)` unless given). Works from notebooks
    and scripts alike: nothing of the caller's `__main__` is run again. `on_loss` as for `train`.

    Raises:
        UserError, WorkerFailed, Interrupted: as `launch_local` says.
    """
    from allfuse.launcher.local import launch_local

    chosen = as_plan(plan) if plan is not None else as_plan(f"data({workers})")
    check_workers(chosen, workers)
    call = functools.partial(function, *args, **kwargs)
    if chosen.outer is not None:
        from allfuse.hosting import launch_with_roles

        policy = check_on_loss(on_loss or "continue")
        return launch_with_roles(call, chosen, threads=threads, on_loss=policy)
    return launch_local(
        call,
        workers,
        plan=str(chosen),
        threads=threads,
        policy=loss_policy(chosen, on_loss),
    )
