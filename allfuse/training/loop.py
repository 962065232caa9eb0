"""Training a job: a loop over a session, short enough to read as documentation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allfuse.base.errors import DataError, JobError
from allfuse.job import Job
from allfuse.plan import Plan
from allfuse.training.averaging import complete
from allfuse.training.keeper import Resume
from allfuse.training.schedule import make_scheduler
from allfuse.training.session import Session
from allfuse.training.settings import Settings
from allfuse.training.snapshot import refuse_snapshots
from allfuse.training.stopping import Stopping


@dataclass(kw_only=True)
class Result:
    """What a run came to.

    loss: of the last step. metrics: of the last validation. average: the same of the weights
    averaged along the steps, where the job asks for that. test: of the test data, measured once
    at the end. reason: why it stopped. weights: the model's state dict on the CPU, names of the
    plain model; where ranks share a model on the first of them. out: the run folder. elsewhere:
    another group of workers measured the end.
    """

    steps: int
    loss: float
    reason: str
    metrics: dict[str, float] = field(default_factory=dict)
    average: dict[str, float] = field(default_factory=dict)
    test: dict[str, float] = field(default_factory=dict)
    out: str | None = None
    elsewhere: bool = False
    weights: dict[str, Tensor] = field(default_factory=dict, repr=False)


def train_job(
    job: Job,
    plan: Plan | str | None = None,
    *,
    out: str | Path | None = None,
    resume: Resume = False,
    device: str | None = None,
    prepare: Callable[[Session], None] | None = None,
    keep_weights: bool = True,
) -> Result:
    """Train a job in the ranks that are here already; every rank of the plan calls it.

    `prepare(session)` runs before the first step, for those who watch (consoles, verify). Without
    `keep_weights` the result has none, and no rank has to hold the whole model for it.
    """
    if job.train is None:
        raise DataError("Job(train=None): there is nothing to train on; allowed: samples")
    with Session(plan, out=out, resume=resume, settings=settings_of(job, device)) as s:
        if job.snapshots is not None:
            refuse_snapshots(s.plan)
        if job.average is not None:
            s.average(job.average)
        if prepare is not None:
            prepare(s)
        s.add_hooks(job.hooks)
        model = s.model(
            job.model,
            forward=job.forward,
            keep_whole=job.keep_whole,
            cut_also=job.cut_also,
            weights=job.weights,
            loss=job.loss,
        )
        optimizer = s.optimizer(make_optimizer(job, model))
        if job.scheduler is not None:
            s.scheduler(make_scheduler(job, optimizer), job.scheduler_every)
        stopping = s.remember("stopping", Stopping(job))
        if s.apart is not None:
            s.apart.facts |= {"evaluate_every": job.evaluate_every, "save_every": job.save_every}
        s.on("start", lambda *_: stop_where_due(s, stopping))  # a run that was done stays done

        for batch in s.batches(
            job.train,
            job.batch_size,
            job.stop.epochs,
            steps=job.stop.steps,
            loaders=job.loaders,
            collate=job.collate,
        ):
            s.step(batch, job.loss, forward=job.forward)
            better = False
            if job.validation is not None and s.due(job.evaluate_every):
                better = validate(s, job, stopping)
            if job.save_every is not None and (better or s.due(job.save_every)):
                s.save(score=stopping.score_at(s.steps))
            if s.due(job.snapshots):
                s.snapshot()
            if stopping.time_is_up():
                s.stop(f"{job.stop.seconds:g} seconds have passed")

        measures = s.apart is None or s.apart.finishes  # else another group does
        if s.apart is not None and measures:
            finish_apart(s, job, stopping)
        complete(s)
        return Result(
            steps=s.steps,
            loss=s.loss,
            reason=s.stop_reason or "",
            metrics=last_figures(s, job, stopping) if measures else stopping.figures,
            average=measure_average(s, job),
            test=measure_on(s, job, job.test, "test") if job.test is not None and measures else {},
            weights={
                name: value.detach().cpu().clone()
                for values in (s.weights() if keep_weights else {}).values()
                for name, value in values.items()
                if isinstance(value, Tensor)
            },
            out=None if out is None else str(out),
            elsewhere=not measures,
        )


def make_optimizer(job: Job, model: nn.Module) -> torch.optim.Optimizer:
    """What the job's function makes of the model's parameters; wrong kinds are refused later."""
    try:
        return job.optimizer(model.parameters())
    except ValueError as error:  # torch's refusals of settings, and of models without parameters
        raise JobError(f"Job(optimizer=...): {error}; allowed: what torch.optim takes") from None


def validate(s: Session, job: Job, stopping: Stopping) -> bool:
    """Measure on the validation data, step the schedulers, stop where due; whether it is best."""
    better = False

    def note(figures: dict[str, float]) -> bool:
        nonlocal better
        better = stopping.evaluated(figures, s.steps)
        return better

    figures = measure_on(s, job, job.validation, "validation", note)
    measure_average(s, job)
    s.evaluated(figures[job.monitor_name])
    stop_where_due(s, stopping)
    return better


def finish_apart(s: Session, job: Job, stopping: Stopping) -> None:
    """What falls due with the last step falls to who measures the end, where its own loop has not
    seen to that."""
    assert s.apart is not None
    is_done = stopping.measured_step == s.steps
    if job.validation is not None and s.apart.is_due(job.evaluate_every) and not is_done:
        validate(s, job, stopping)
    s.save(score=stopping.score_at(s.steps))


def last_figures(s: Session, job: Job, stopping: Stopping) -> dict[str, float]:
    """The figures of the model as it is now: measured once more where that was not just done.

    That changes nothing that training would go on from.
    """
    if job.validation is None or stopping.measured_step == s.steps:
        return stopping.figures
    return measure_on(s, job, job.validation, "validation", stopping.is_best)


def measure_average(s: Session, job: Job) -> dict[str, float]:
    """The figures of the weights averaged along the steps, as they are now; none without any."""
    averages = s.averages
    if not averages or job.validation is None:
        return {}
    if averages.measured_step != s.steps:
        with s.averaged():
            name = f"validation ({averages.rule.name})"
            averages.figures = measure_on(s, job, job.validation, name)
        averages.measured_step = s.steps
    return averages.figures


def stop_where_due(s: Session, stopping: Stopping) -> None:
    reason = stopping.reason()
    if reason is not None:
        s.end(reason)


def measure_on(
    s: Session,
    job: Job,
    data: Any,
    name: str,
    best: Callable[[dict[str, float]], bool] | None = None,
) -> dict[str, float]:
    """The job's loss and metrics over a data set."""
    return s.evaluate(
        {"loss": job.loss, **job.metrics},
        data,
        batch_size=job.batch_size,
        name=name,
        forward=job.forward,
        collate=job.collate,
        best=best,
    )


def settings_of(job: Job, device: str | None) -> Settings:
    return Settings(
        seed=job.seed,
        precision=job.precision,
        clip=job.clip,
        accumulate=job.accumulate,
        compile=job.compile,
        recompute=job.recompute,
        batch_statistics=job.batch_statistics,
        device=device,
    )
