"""The job as verify runs it, the same under the plan and in the reference."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from allfuse.base.tensors import map_nest
from allfuse.job import Job, Stop, default_forward
from allfuse.training.schedule import make_scheduler

DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)


class NotDouble(Exception):
    """The job computes its loss in a shorter type although its model and batches are float64."""


def make_subject(job: Job, *, steps: int, double: bool) -> tuple[Job, list[str]]:
    """The job for so many steps, and what was changed about it, in words.

    Left out is what makes two runs differ by design (dropout) and what does not bear on weights
    (evaluations, saving, averages, hooks). With `double` model and batches are float64, autocast
    is off. The list is whole once the model is built.
    """
    notes: list[str] = []

    def build() -> Any:
        made: Any = job.model
        made = copy.deepcopy(made) if isinstance(made, nn.Module) else made()
        if not isinstance(made, nn.Module):
            return made  # the session says what is wrong with it
        if silence_dropout(made):
            notes.append("dropout is 0 in both runs, since every plan draws it differently")
        return made.double() if double else made

    if job.compile:
        notes.append("compile is off in both runs")
    if job.hooks:
        notes.append("the job's hooks are left out in both runs")
    if job.scheduler is not None and job.scheduler_every == "evaluation":
        notes.append(
            "nothing is evaluated, so the scheduler that waits for evaluations never steps"
        )
    if double and job.precision != "fp32":
        notes.append(f"autocast to {job.precision} is off: both runs are in float64")
    subject = replace(
        job,
        model=build if callable(job.model) else job.model,
        forward=_double_forward(job) if double else job.forward,
        loss=_double_loss(job) if double else job.loss,
        precision="fp32" if double else job.precision,
        stop=Stop(steps=steps),
        scheduler=None if job.scheduler is None else functools.partial(make_scheduler, job),
        compile=False,
        hooks=(),
        validation=None,
        test=None,
        metrics={},
        monitor=None,
        evaluate_every=None,
        save_every=None,
        snapshots=None,
        average=None,
    )
    return subject, notes


def silence_dropout(model: nn.Module) -> bool:
    """Set the dropout of every module to 0, in place; whether there was any.

    Attention and recurrent layers keep theirs as a number under a name that ends in "dropout".
    """
    found = False
    for module in model.modules():
        names = [name for name in vars(module) if name.endswith("dropout")]
        names += ["p"] if isinstance(module, DROPOUTS) else []
        for name in names:
            value = getattr(module, name)
            if isinstance(value, float) and value:
                setattr(module, name, 0.0)
                found = True
    return found


def _as_double(batch: Any) -> Any:
    def widen(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return map_nest(widen, batch)


def _double_forward(job: Job) -> Callable[[nn.Module, Any], Any]:
    run = job.forward or default_forward
    return lambda model, batch: run(model, _as_double(batch))


def _double_loss(job: Job) -> Callable[[Any, Any], Any]:
    def loss(outputs: Any, batch: Any) -> Any:
        value = job.loss(outputs, _as_double(batch))
        total = value[0] if isinstance(value, tuple) else value
        if isinstance(total, Tensor) and total.dtype != torch.float64:
            raise NotDouble(f"the loss is {total.dtype} although model and batches are float64")
        return value

    return loss
