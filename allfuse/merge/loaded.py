"""Models on disk in the module of a job, and the job's data: for what looks at what models do."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from allfuse.base.errors import JobError, MergeError
from allfuse.base.tensors import count_rows, cut_rows
from allfuse.job import Job
from allfuse.jobfile import load_job
from allfuse.merge.blocks import Files
from allfuse.merge.source import Source
from allfuse.split.data import IterableLoader, Loader, Stream, as_source, plan_batches
from allfuse.split.pending import Pending
from allfuse.store.run import RunFolder, is_run
from allfuse.store.tensorfile import DTYPES
from allfuse.store.weights import Shapes, list_differences
from allfuse.training.building import differences, take_weights
from allfuse.training.start import build_model, refuse_lazy

DATA = ("train", "validation", "test")
BATCH = 32  # samples, where a job does not say


class SourceWeights:
    """The tensors of a model on disk by name, each read when it is asked for. A context manager."""

    def __init__(self, source: Source) -> None:
        self.source = str(source.path)
        self.shapes: Shapes = {
            name: (DTYPES[entry.dtype], entry.shape) for name, entry in source.entries.items()
        }
        self._entries, self._files = source.entries, Files()

    def read(self, name: str) -> Tensor:
        """A tensor in memory of its own. Raises MergeError: it cannot be read."""
        entry = self._entries[name]
        return self._files.read(entry, 0, entry.count).view(entry.shape)

    def __enter__(self) -> SourceWeights:
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()


def find_jobs(
    models: Sequence[Path], files: Sequence[Path], settings: Mapping[str, Any]
) -> list[Job]:
    """The job of each model: one file for all of them, one for each, or, without any, the one that
    each run folder has. Models with the same job and arguments share one object.

    Args:
        settings: arguments for the jobs; of a run folder's they replace those it was trained with.

    Raises:
        MergeError: a number of files that is neither, or a model that is no run folder with a job.
        JobError: a job file cannot be used.
    """
    if files:
        if len(files) not in (1, len(models)):
            raise MergeError(
                f"{len(files)} jobs for {len(models)} models; allowed: one for all, or one for each"
            )
        made = {file: load_job(file, settings) for file in dict.fromkeys(files)}
        return [made[files[place % len(files)]] for place in range(len(models))]
    jobs: dict[str, Job] = {}
    found = []
    for model in models:
        folder = RunFolder.open(model) if is_run(model) else None
        if folder is None or not folder.job_path.is_file():
            raise MergeError(
                f"{model} has no job, which says how to build the model and read its data; next: "
                "--job job.py (one for all models, or one for each), or a run folder of "
                "`allfuse train`"
            )
        arguments = {**folder.record.get("arguments", {}), **settings}
        original = folder.record.get("job_file")
        text = folder.job_path.read_text(errors="replace")
        key = json.dumps([text, arguments, original], sort_keys=True, default=repr)
        if key not in jobs:
            jobs[key] = load_job(folder.job_path, arguments, original)
        found.append(jobs[key])
    return found


def build(job: Job) -> nn.Module:
    """A module of a job with the numbers that its seed gives, on the CPU, in evaluation mode.

    Raises:
        JobError: the job builds none, or one whose sizes are not known.
    """
    made = build_model(job.model, job.seed)
    refuse_lazy(made)
    if made is job.model:
        made = copy.deepcopy(made)  # so that the job's own stays what it is
    return made.eval()


@torch.no_grad()
def load(module: nn.Module, source: Source) -> None:
    """Give a module the numbers of a model on disk: all of them, by name, in place.

    Numbers take the type that the module has. Of tensors that share memory one name is enough.

    Raises:
        MergeError: names or shapes differ, or the module's types hold less than the file's (the
            first ten, and how many more), or a file cannot be read.
    """
    with SourceWeights(source) as weights:
        told = differences(module, weights)
        if told:
            raise MergeError(
                f"{source.path} does not fit the model that the job builds: "
                f"{list_differences(told)}; next: the job, and its arguments by --set, that it was "
                "trained with"
            )
        take_weights(module, weights, Pending(module, {}))


def batches(
    job: Job,
    which: str = "train",
    limit: int | None = None,
    *,
    seed: int = 0,
) -> Iterator[Any]:
    """Batches of a job's data, as large as the job's, on the CPU: every sample once.

    Args:
        which: "train", "validation" or "test".
        limit: this many samples at most, drawn by `seed`; None: all of them, in order. What a
            sampler of the job's own or a stream gives comes in its order.

    Raises:
        JobError: the job has no such data. DataError: it cannot be read.
    """
    data = getattr(job, which)
    if data is None:
        raise JobError(f"the job has no {which} data; next: give Job({which}=...) samples")
    loader = open_loader(as_source(data, collate=job.collate), job, limit is not None, seed)
    left = limit
    try:
        for portion in loader.epoch(0):
            rows = count_rows(portion.batch)
            if left is None or rows <= left:
                yield portion.batch
            else:
                yield cut_rows(portion.batch, 0, left)
            if left is not None:
                left -= min(rows, left)
                if not left:
                    return
    finally:
        loader.close()


class Reads(Protocol):
    """What gives the portions of an epoch."""

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Any]: ...

    def close(self) -> None: ...


def open_loader(source: Any, job: Job, shuffle: bool = False, seed: int = 0) -> Reads:
    """Gives the portions of an epoch in batches as large as the job's, every sample once."""
    settings = source.settings
    size = job.batch_size or settings.batch_size or BATCH
    if isinstance(source, Stream):
        return IterableLoader(source, size, parts=1, index=0, agree=lambda n: (n,), seed=seed)
    own = settings.batch_sampler is not None
    plan = plan_batches(
        source,
        batch_size=None if own else size,
        seed=seed,
        shuffle=None if own or settings.sampler is not None else shuffle,
        drop_last=None if own else False,
    )
    return Loader(source, plan, parts=1, index=0, processes=settings.processes)
