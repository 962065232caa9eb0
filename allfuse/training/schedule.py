"""A job's learning-rate scheduler, and how often it will step."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch

from allfuse.base.errors import JobError
from allfuse.job import Job
from allfuse.split.data import Stream, as_source, plan_batches


def make_scheduler(job: Job, optimizer: torch.optim.Optimizer) -> Any:
    """What the job's function makes; it is told how often it will step if it takes a second
    argument. None without one.

    Raises:
        JobError: it wants to know, and nobody does.
    """
    if job.scheduler is None:
        return None
    make: Any = job.scheduler
    return make(optimizer, count_steps(job)) if _wants_steps(make) else make(optimizer)


def _wants_steps(function: Any) -> bool:
    """Whether a second argument must be given."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some built in C cannot be asked
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]
    return len(needed) == 2


def count_steps(job: Job) -> int:
    """How often the scheduler steps in a run that its stop rule's steps or epochs end."""
    source = as_source(job.train, collate=job.collate)
    per_epoch = None
    if not isinstance(source, Stream):
        per_epoch = plan_batches(source, batch_size=job.batch_size).steps_per_epoch
    steps, epochs = job.stop.steps, job.stop.epochs
    if job.scheduler_every == "step":
        whole = None if epochs is None or per_epoch is None else epochs * per_epoch
        known = [limit for limit in (steps, whole) if limit is not None]
    else:
        whole = None if steps is None or per_epoch is None else math.ceil(steps / per_epoch)
        known = [limit for limit in (epochs, whole) if limit is not None]
    if not known or job.scheduler_every == "evaluation":
        raise JobError(
            f"Job(scheduler=...) takes (optimizer, steps), and how often it steps is not known "
            f"(stop={job.stop}, scheduler_every={job.scheduler_every!r}); allowed: a stop rule "
            "with steps, or with epochs of data of known length; next: Stop(steps=...)"
        )
    return max(1, min(known))
