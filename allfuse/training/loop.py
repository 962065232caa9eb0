"""Training a job: a loop over a session, short enough to read as documentation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from allfuse.base.errors import DataError
from allfuse.job import Job
from allfuse.plan import Plan
from allfuse.training.session import Session, Settings
from allfuse.training.stopping import Stopping


@dataclass(kw_only=True)
class Result:
    """What a run came to.

    loss: of the last step. metrics: of the last validation. test: of the test data, measured once
    at the end. reason: why it stopped. weights: the model's state dict on the CPU, names of the
    plain model. out: the run folder.
    """

    steps: int
    loss: float
    reason: str
    metrics: dict[str, float] = field(default_factory=dict)
    test: dict[str, float] = field(default_factory=dict)
    out: str | None = None
    weights: dict[str, Tensor] = field(default_factory=dict, repr=False)


def train_job(
    job: Job,
    plan: Plan | str | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    device: str | None = None,
    prepare: Callable[[Session], None] | None = None,
) -> Result:
    """Train a job in the ranks that are here already; every rank of the plan calls it.

    `prepare(session)` runs before the first step, for those who watch (consoles, verify).
    """
    if job.train is None:
        raise DataError("Job(train=None): there is nothing to train on; allowed: samples")
    with Session(plan, out=out, resume=resume, settings=settings_of(job, device)) as s:
        if prepare is not None:
            prepare(s)
        s.add_hooks(job.hooks)
        model = s.model(job.model)
        optimizer = s.optimizer(job.optimizer(model.parameters()))
        if job.scheduler is not None:
            s.scheduler(job.scheduler(optimizer), job.scheduler_every)
        stopping = s.remember("stopping", Stopping(job.stop))
        loss, figures = float("nan"), {}

        for batch in s.batches(
            job.train,
            job.batch_size,
            job.stop.epochs,
            steps=job.stop.steps,
            loaders=job.loaders,
            collate=job.collate,
        ):
            loss = s.step(batch, job.loss, forward=job.forward)
            if job.validation is not None and s.due(job.evaluate_every):
                figures = validate(s, job, stopping)
            if s.due(job.save_every):
                s.save()
            if stopping.time_is_up():
                s.stop(f"{job.stop.seconds:g} seconds have passed")
        if job.validation is not None and not stopping.measured_at(s.steps):
            figures = validate(s, job, stopping)
        test = measure_on(s, job, job.test, "test") if job.test is not None else {}
        weights = {
            name: value.detach().cpu().clone()
            for name, value in model.state_dict().items()
            if isinstance(value, Tensor)
        }
        return Result(
            steps=s.steps,
            loss=loss,
            reason=s.stop_reason or "",
            metrics=figures,
            test=test,
            out=None if out is None else str(out),
            weights=weights,
        )


def validate(s: Session, job: Job, stopping: Stopping) -> dict[str, float]:
    """Measure on the validation data; note the best, step the schedulers, and stop where due."""
    figures = measure_on(
        s, job, job.validation, "validation", lambda f: stopping.evaluated(job.score(f), s.steps)
    )
    s.keeper.score = job.score(figures)
    s.evaluated(figures[job.monitor_name])
    reason = stopping.reason(figures[job.monitor_name], not job.monitor_text.startswith("-"))
    if reason is not None:
        s.end(reason)
    return figures


def measure_on(
    s: Session,
    job: Job,
    data: Any,
    name: str,
    best: Callable[[dict[str, float]], bool] | None = None,
) -> dict[str, float]:
    """The job's loss and metrics over a data set."""
    return s.evaluate(
        {**job.metrics, "loss": job.loss},
        data,
        batch_size=max(job.batch_size, s.place.parts),
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
        batch_statistics=job.batch_statistics,
        device=device,
    )
