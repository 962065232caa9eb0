"""The figures of a trained run on data of its job."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from allfuse.base.errors import Interrupted, JobError, UserError
from allfuse.job import Job, default_forward
from allfuse.plan import Plan
from allfuse.prediction.restore import Restored, open_run
from allfuse.split.data import as_source
from allfuse.training.learner import Precision
from allfuse.training.loading import make_loader, order_of_all
from allfuse.training.measure import measure
from allfuse.training.parting import make_split, runs_on
from allfuse.training.place import Place

DATA = ("test", "validation", "train")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured: figures by name (the job's metrics and "loss"), on which data of the job,
    over how many samples, and notes on what differs from what was asked."""

    figures: dict[str, float]
    data: str
    samples: int
    seconds: float
    notes: list[str] = field(default_factory=list)


def evaluate_run(
    path: str | Path,
    *,
    plan: Plan | str | None = None,
    data: str = "test",
    weights: str = "last",
    device: str | None = None,
) -> Evaluation:
    """Measure a trained run in the ranks that are here already; every rank of the plan calls it.

    Each sample counts once. The figures are the same on every rank, and for any number of workers
    to rounding.

    Args:
        path: a run folder.
        data: "test", "validation" or "train". Without test data the validation data is taken, and
            a note says so.
        weights: the "last" ones, those of the "best" checkpoint, or the "average".

    Raises:
        RunError, JobError, CheckpointError: as `open_run`; JobError without data to measure on.
        Interrupted: Ctrl-C.
    """
    if data not in DATA:
        raise UserError(f"--data {data}: allowed: {', '.join(DATA)}")
    begin = time.perf_counter()
    try:
        with contextlib.closing(Place(plan, device)) as place:
            restored = open_run(path, weights=weights, later=True)
            name, samples = choose_data(restored.job, data)
            figures, count = _measure_here(restored, samples, place)
    except KeyboardInterrupt:
        raise Interrupted("the evaluation was interrupted") from None
    notes = list(restored.notes)
    if name != data:
        notes.append(f"the job has no {data} data: measured on its {name} data")
    return Evaluation(
        figures=figures, data=name, samples=count, seconds=time.perf_counter() - begin, notes=notes
    )


def choose_data(job: Job, name: str) -> tuple[str, Any]:
    """The job's data of that name; instead of missing test data its validation data."""
    if name == "test" and job.test is None:
        name = "validation"
    data = getattr(job, name)
    if data is None:
        raise JobError(
            f"the job has no {name} data; next: give Job(test=...) samples, or name other data: "
            f"{', '.join(DATA)}"
        )
    return name, data


def _measure_here(restored: Restored, data: Any, place: Place) -> tuple[dict[str, float], int]:
    """This rank's part, in batches as large as those of training."""
    job = restored.job
    source = as_source(data, collate=job.collate)
    forward, model = job.forward or default_forward, restored.on(place.device)
    split = make_split(place)
    if split.cuts:
        runs = runs_on(place.plan, source, forward, place.device)
        restored.cut(split, runs, Precision(job.precision, place.device).autocast)
    else:
        restored.load()
    loader = make_loader(source, order_of_all(source, job.batch_size, place), place)
    try:
        return measure(
            model,
            loader,
            {**job.metrics, "loss": job.loss},
            forward=forward,
            link=place.replicas,
            device=place.device,
            autocast=Precision(job.precision, place.device).autocast,
            pipeline=split.pipeline,
        )
    finally:
        loader.close()
