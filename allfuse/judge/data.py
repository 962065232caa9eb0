"""The data that decides, and the data that tells how good what was chosen really is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from allfuse.base.errors import JobError
from allfuse.base.tensors import digest
from allfuse.job import Job
from allfuse.merge.loaded import open_loader
from allfuse.split.data import Source, Stream, as_source
from allfuse.split.data.permutation import Indices

VALIDATION, TEST = "validation", "test"
Data = Source | Stream


def read_data(job: Job) -> tuple[dict[str, Data], str | None]:
    """The job's validation and test data by name, and a note where it has no test data: half of
    the validation data is held back for it then, the same half every time.

    Raises:
        JobError: there is no validation data, or it cannot be halved.
    """
    if job.validation is None:
        raise JobError(
            "the job has no validation data, by which models are judged; next: give "
            "Job(validation=...) samples"
        )
    validation = as_source(job.validation, collate=job.collate)
    if job.test is not None:
        return {VALIDATION: validation, TEST: as_source(job.test, collate=job.collate)}, None
    own_order = validation.settings.sampler or validation.settings.batch_sampler
    if isinstance(validation, Stream) or own_order is not None or validation.size < 2:
        raise JobError(
            "the job has no test data, and its validation data cannot be halved, being a stream, "
            "of a sampler's own order, or too little; next: give Job(test=...) samples"
        )
    order = torch.randperm(validation.size, generator=torch.Generator().manual_seed(0))
    half = validation.size // 2
    judging, held = Part(validation, order[half:]), Part(validation, order[:half])
    note = (
        f"the job has no test data: {held.size} of its {validation.size} validation samples were "
        "held back for it"
    )
    return {VALIDATION: judging, TEST: held}, note


class Part(Source):
    """Some samples of a source, in their order.

    Args:
        rows: which: int64 (k,).
    """

    def __init__(self, whole: Source, rows: torch.Tensor) -> None:
        self.whole, self.size, self.settings = whole, len(rows), whole.settings
        self._rows: Indices = rows.sort().values.numpy()

    def fetch(self, indices: Indices, epoch: int = 0, seed: int = 0) -> Any:
        return self.whole.fetch(self._rows[indices], epoch, seed)

    def sample(self, index: int) -> Any:
        return self.whole.sample(int(self._rows[index]))


def fingerprint(job: Job, data: Data) -> str:
    """A short hash of all samples. Reads them once."""
    loader = open_loader(data, job)
    try:
        return digest([digest(batch) for batch in _batches(loader.epoch(0))])
    finally:
        loader.close()


def _batches(portions: Iterable[Any]) -> Iterable[Any]:
    return (portion.batch for portion in portions)
