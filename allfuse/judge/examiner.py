"""Makes a candidate, has the job's module take its weights, and measures it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from allfuse.job import Job
from allfuse.judge.candidate import Candidate
from allfuse.judge.data import Data
from allfuse.judge.measured import Measured, measure_model
from allfuse.judge.subject import Subject
from allfuse.merge.loaded import batches, build, load
from allfuse.merge.merge import merge
from allfuse.merge.source import Source, open_source
from allfuse.merge.written import write_model
from allfuse.store.tensorfile import DTYPES
from allfuse.training.calibrate import estimate_statistics, norms_of
from allfuse.training.learner import Precision
from allfuse.training.measure import to_device

STATISTICS_SAMPLES = 4096
"""Of the training data, that the statistics of BatchNorm are estimated from."""


class Examiner:
    """One process's judge of candidates.

    Args:
        data: by name. scratch: a folder of its own, for one candidate at a time.
    """

    def __init__(
        self, subject: Subject, job: Job, data: Mapping[str, Data], device: torch.device,
        scratch: Path,
    ) -> None:  # fmt: skip
        self.subject, self.job, self.data, self.device = subject, job, data, device
        self.model = build(job).to(device)
        self.calibrates = subject.calibrate and bool(norms_of(self.model))
        self._folder = scratch / "model"

    def examine(self, candidate: Candidate, name: str) -> Measured:
        """The figures of a candidate on the data of that name.

        Raises:
            MergeError: it cannot be made, or does not fit the job. JobError: it cannot be measured.
        """
        self._take(candidate)
        return measure_model(self.model, self.job, self.data[name], self.device)

    def write(self, candidate: Candidate, out: Path) -> None:
        """Write a candidate as a model on disk, which has the figures that `examine` gives."""
        if not self.calibrates or candidate.is_single:
            merge(self.subject.recipe(candidate), out, memory_bytes=self.subject.memory_bytes)
            return
        made = self._take(candidate)
        held = self.model.state_dict()
        write_model(made, {name: held[name] for name in made.entries if name in held}, out)

    def _take(self, candidate: Candidate) -> Source:
        """Have the module take a candidate's weights; the candidate on disk."""
        shutil.rmtree(self._folder, ignore_errors=True)
        merge(
            self.subject.recipe(candidate),
            self._folder,
            memory_bytes=self.subject.memory_bytes,
            threads=torch.get_num_threads(),
        )
        made = open_source(self._folder)
        load(self.model, replace(made, path=Path(self.subject.describe(candidate))))  # for errors
        if self.calibrates and not candidate.is_single:
            self._calibrate(made)
        return made

    def _calibrate(self, made: Source) -> None:
        """Estimate the statistics of BatchNorm, as exact as the file can hold them."""
        with Precision(self.job.precision, self.device).autocast():
            estimate_statistics(self.model, self._batches(), self.job.forward)
        for name, buffer in self.model.named_buffers():
            entry = made.entries.get(name)
            if entry is not None and buffer.is_floating_point():
                buffer.copy_(buffer.to(DTYPES[entry.dtype]))

    def _batches(self) -> Iterator[Any]:
        for batch in batches(self.job, "train", STATISTICS_SAMPLES):
            yield to_device(batch, self.device)
