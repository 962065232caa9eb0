"""A restored model that answers for batches of rows."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from allfuse.base.errors import DistributedError, JobError
from allfuse.job import Job, default_forward
from allfuse.prediction.answers import Columns, answer
from allfuse.prediction.restore import Restored
from allfuse.split.base import Run, Split
from allfuse.split.elsewhere import ELSEWHERE
from allfuse.training.learner import Precision
from allfuse.training.parting import ROWS

if TYPE_CHECKING:
    from allfuse.split.pipe.pipeline import Pipeline


class Scorer:
    """The model of a run in evaluation mode on a device, under the precision of its job."""

    def __init__(self, restored: Restored, device: torch.device) -> None:
        self.job, self.device = restored.job, device
        self.model = restored.on(device).eval()
        self._restored = restored
        self._forward = self.job.forward or default_forward
        self._autocast = Precision(self.job.precision, device).autocast
        self._pipeline: Pipeline | None = None

    def cut(self, split: Split) -> None:
        """Keep this rank's part of the model, where a plan cuts it, and read its weights.

        Raises:
            PlanError, UserError: it cannot be cut.
        """
        if not split.cuts:
            self._restored.load()
            return

        def run(rows: int) -> tuple[int, Run]:
            batch = (torch.zeros(rows, len(require_inputs(self.job)), device=self.device),)
            return rows, lambda made: self._forward(made, batch)

        self._restored.cut(split, [run(rows) for rows in ROWS], self._autocast)
        self._pipeline = split.pipeline

    def answer(self, numbers: Tensor, first_row: int) -> Columns | None:
        """The columns that the model gives for a batch of inputs, float32 (rows, inputs). None
        where another stage of it has them.

        `first_row` is for errors: where the batch begins in the table.

        Raises:
            JobError: the model cannot take such a batch, or gives what is no table.
            BadOutput: it gives NaN or infinity.
        """
        try:
            with torch.no_grad(), self._autocast():
                outputs = self._run((numbers.to(self.device),))
        except DistributedError:
            raise
        except Exception as error:
            last = first_row + len(numbers) - 1
            full = isinstance(error, torch.OutOfMemoryError)
            remedy = "correct Job(inputs=...), or let Job(forward=...) take such a batch"
            raise JobError(
                f"the model failed on rows {first_row} to {last}: {type(error).__name__}: {error}; "
                f"received a batch (x,) with x float32 {tuple(numbers.shape)}; next: "
                f"{'a smaller --batch-size' if full else remedy}"
            ) from error
        if outputs is ELSEWHERE:
            return None
        return answer(outputs, len(numbers), self.job.classes)

    def _run(self, batch: tuple[Tensor]) -> Any:
        if self._pipeline is None:
            return self._forward(self.model, batch)
        compute = functools.partial(self._forward, self.model, batch)
        return self._pipeline.predict(len(batch[0]), compute)


def require_inputs(job: Job) -> list[str]:
    """The names of the job's input columns.

    Raises:
        JobError: it has none, or one twice.
    """
    names = list(job.inputs or ())
    if not names:
        raise JobError(
            "the job does not say which columns are the model's input; next: give "
            "Job(inputs=[...]) their names, in the order of the input"
        )
    twice = [name for place, name in enumerate(names) if name in names[:place]]
    if twice:
        raise JobError(f"Job(inputs=...): {twice[0]!r} stands twice; allowed: each column once")
    return names


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Compute with one thread on a CPU: the last bits of a product depend on how many there are."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
