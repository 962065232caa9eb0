"""A finished run with servers: its book, executed again, against the losses and weights it left."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from allfuse.base.errors import Interrupted, RunError
from allfuse.job import Job
from allfuse.jobfile import load_job
from allfuse.launcher import current_world
from allfuse.launcher.thread import launch_threads
from allfuse.plan import Plan, Site, as_plan
from allfuse.roles.blueprint import read_codec
from allfuse.roles.office import BOOK
from allfuse.roles.terms import terms_of
from allfuse.split.data import as_source
from allfuse.store.run import RunFolder
from allfuse.store.tensorfile import read_model
from allfuse.training.start import build_model
from allfuse.verify.compare import TOLERANCES
from allfuse.verify.history import History
from allfuse.verify.ordered import check_ordered, make_report
from allfuse.verify.playback import replay
from allfuse.verify.progress import Listener
from allfuse.verify.report import Report
from allfuse.verify.subject import make_subject, silence_dropout
from allfuse.verify.tally import END, Tally
from allfuse.verify.task import precision_notes
from allfuse.verify.witness import Seen

COMPARED = (
    "the loss of every update in the scheduler's book, and the weights at the end, with one "
    "process that executes the updates in the order of that book"
)


@dataclass(frozen=True)
class Found:
    """What came of executing a run's book. threads: of the process that did."""

    plan: Plan
    precision: str
    tally: Tally
    updates: int
    threads: int


def verify_run(
    path: str | Path, *, on_event: Listener | None = None, threads: bool = False
) -> Report:
    """Whether a finished run's losses and weights are those of its own order of events.

    One process executes the whole run again, in the job's own precision.

    Args:
        on_event: as for `verify_job`.
        threads: in this process (tests).

    Raises:
        RunError: the run has no servers, has not ended, or what it did is not whole in its book:
            says why.
        AllfuseError: the book cannot be right, as `History.check` says.
    """
    with RunFolder.open(path, lock=True) as folder:
        used = int(folder.record.get("threads", 1))
    if on_event is not None:
        on_event("note", text=f"one process executes the updates of {path} in their order")
    work = functools.partial(_play, Path(path))
    if threads:
        (found,) = launch_threads(work, 1, plan="data(1)")
        if isinstance(found, BaseException):
            raise found
    else:
        from allfuse.launcher.local import launch_local

        found = launch_local(work, 1, plan="data(1)", threads=used)
    report = make_report(
        found.plan,
        found.precision,
        "replayed",
        found.tally,
        threads=used,
        reference_threads=found.threads,
        compared=COMPARED,
    )
    told = f"{found.updates} updates were executed"
    if found.tally.is_equal:
        told += "; the weights at the end agree bit for bit"
    return replace(report, notes=[told, *precision_notes(found.precision)])


def _play(path: Path) -> Found:
    """What the one process does."""
    world = current_world()
    assert world is not None

    def tick() -> None:
        if world.stop_requested.is_set():
            raise Interrupted("interrupted while the updates were executed")

    with RunFolder.open(path, lock=True) as folder:
        plan = as_plan(folder.record["plan"])
        job = _job_of(folder, plan)
        history = History.read(path / BOOK, terms_of(plan, timeout_s=0.0))
        _refuse_gaps(folder, plan, history)
        history.check(terms_of(plan, timeout_s=0.0))
        done = max((u.first_step + u.steps for u in history.updates), default=0)
        subject, _ = make_subject(job, steps=history.limit or done, double=False)
        tally = Tally(TOLERANCES[job.precision], done)
        device = torch.device(folder.record.get("device", "cpu"))
        played = replay(subject, plan, history, Seen(path), tally, device, tick)
        own = read_model(folder.model_path)
        sizes = [
            played.yardstick.differences(own, expected)
            for expected in (played.weights, *played.held.values())
        ]
        tally.add_weights(END, 0, min(sizes, key=_largest))  # one of the workers wrote them
    return Found(plan, job.precision, tally, len(history.updates), torch.get_num_threads())


def _largest(sizes: Mapping[str, float]) -> float:
    return max(sizes.values(), default=0.0)


def _job_of(folder: RunFolder, plan: Plan) -> Job:
    """The job of a run that can be executed again.

    Raises:
        RunError: it cannot.
    """
    record, path = folder.record, folder.path
    if plan.outer is None:
        raise _not_whole(
            path,
            f"its plan {plan} has no scheduler, which alone writes down an order of events",
            "verify a plan by its job: allfuse verify JOB.py --plan PLAN",
        )
    check_ordered(plan)
    if not folder.job_path.is_file():
        raise _not_whole(path, "a script made it, and there is no job.py", "train a job file")
    if not (path / BOOK).is_file() or not folder.model_path.is_file():
        what = folder.model_path.name if (path / BOOK).is_file() else BOOK
        raise _not_whole(
            path, f"there is no {what}: it has not ended", f"allfuse train --resume {path}"
        )
    job = load_job(folder.job_path, record.get("arguments", {}), record.get("job_file"))
    data = as_source(job.train, collate=job.collate).fingerprint()
    if data != record["fingerprints"]["data"]:
        raise _not_whole(path, "the job's data are not what they were", "give it the same data")
    if silence_dropout(build_model(job.model, job.seed)):
        raise _not_whole(
            path, "its model has dropout, which every process draws for itself", "verify the job"
        )
    if job.scheduler is not None and job.scheduler_every == "evaluation":
        raise _not_whole(
            path,
            "its learning rate follows evaluations, which the book does not hold",
            "a schedule by steps or epochs",
        )
    return job


def _refuse_gaps(folder: RunFolder, plan: Plan, history: History) -> None:
    """
    Raises:
        RunError: something happened that the book does not tell enough of.
    """
    outer: Any = plan.outer
    keeps = isinstance(outer, Site) or read_codec(str(outer.codec)) is not None
    keeps = keeps and history.gossip is None  # then there are logs of that
    if history.begin:
        raise _not_whole(
            folder.path,
            "it went on from a checkpoint, and its book tells of nothing that was before step "
            f"{history.begin}",
            "a run that was under this plan from its beginning",
        )
    if history.untold:
        raise _not_whole(
            folder.path,
            f"servers were lost that had no snapshot, and were given weights that a worker had: "
            f"{history.untold}",
            "a run whose servers lived, or keep copies: central(servers=2, replicas=1)",
        )
    if history.restarts and isinstance(outer, Site) and history.gossip is None:
        raise _not_whole(
            folder.path,
            f"it was started again after order {history.restarts[-1]}, and what each site's "
            "optimizer kept then is not known",
            "a run that was trained at once",
        )
    if history.taken_back and keeps:
        raise _not_whole(
            folder.path,
            f"{history.taken_back} leases were taken back from workers that were lost, and what "
            "those had kept for themselves (a site's optimizer, a codec's residual) is not known",
            "a run whose workers stayed",
        )


def _not_whole(path: Path, why: str, following: str) -> RunError:
    return RunError(f"verify {path}: the run cannot be executed again: {why}; next: {following}")
