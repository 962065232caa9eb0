"""What the processes of both runs are told, and what they do with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from allfuse.base.errors import AllfuseError, Interrupted
from allfuse.job import Job
from allfuse.jobfile import as_job
from allfuse.launcher import current_world
from allfuse.plan import Data, Plan
from allfuse.training.device import choose_device
from allfuse.verify.compare import TOLERANCES, compare_run
from allfuse.verify.record import Recorder, Reference
from allfuse.verify.reference import run_reference
from allfuse.verify.report import Row
from allfuse.verify.subject import make_subject

JobSource = Job | Callable[..., Job] | str | Path


@dataclass(frozen=True)
class Task:
    """What both runs are told. Travels to other processes."""

    source: JobSource
    settings: dict[str, Any]
    plan: Plan
    steps: int
    double: bool
    device: str | None
    folder: Path

    def subject(self, double: bool) -> tuple[Job, list[str]]:
        torch.set_default_dtype(torch.float64 if double else torch.float32)
        job = as_job(self.source, self.settings)
        return make_subject(job, steps=self.steps, double=double)

    def reference(self) -> Reference:
        """Train the reference, in the job's own precision if it cannot do without that."""
        if not self.double:
            return self._reference(double=False)
        try:
            return self._reference(double=True)
        except AllfuseError:
            raise
        except Exception as error:
            made = self._reference(double=False)
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            note = f"the job cannot run in float64, so its own precision is compared ({reason})"
            return replace(made, notes=[note, *made.notes])

    def _reference(self, double: bool) -> Reference:
        job, notes = self.subject(double)
        world = current_world()
        assert world is not None
        device = choose_device(self.device, world)
        recorder = Recorder(self.folder, self.steps)
        generator = torch.cuda if device.type == "cuda" else torch.random
        states = []

        def tick(step: int) -> None:
            world.step = step - 1
            if world.stop_requested.is_set():
                raise Interrupted("interrupted while the reference trained")
            if step == 1:
                states.append(generator.get_rng_state())

        model = run_reference(job, self.plan, self.steps, device, recorder, tick)
        if not torch.equal(states[0], generator.get_rng_state()):
            notes.append(
                "the model or the loss draws random numbers by other means than dropout modules: "
                "each worker draws its own, so differences are to be expected"
            )
        notes += statistics_notes(job, self.plan, model)
        return Reference(
            folder=self.folder,
            figures=recorder.figures,
            seconds=recorder.seconds,
            kept=recorder.kept,
            precision="float64" if double else job.precision,
            threads=torch.get_num_threads(),
            notes=notes + precision_notes("float64" if double else job.precision) + recorder.notes,
        )

    def run(self, reference: Reference) -> tuple[list[Row], int]:
        job, _ = self.subject(reference.precision == "float64")
        return compare_run(job, self.plan, self.device, reference, self.folder / "progress.jsonl")


def statistics_notes(job: Job, plan: Plan, model: nn.Module) -> list[str]:
    """What BatchNorm does to the promise, where it does anything."""
    norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    data = plan.axis("data")
    if not norms or not isinstance(data, Data) or data.n == 1:
        return []
    if job.batch_statistics == "local":
        return [
            "batch_statistics is local: BatchNorm sees each worker's share only, which no single "
            "process does, so differences are to be expected; global keeps the promise"
        ]
    if job.accumulate > 1:
        return [
            f"with accumulate={job.accumulate} BatchNorm sees one piece of the batch at a time: "
            "those of all workers together, in the reference too. One worker cuts other pieces"
        ]
    return []


def precision_notes(precision: str) -> list[str]:
    """What cannot be seen in types shorter than float64."""
    if precision == "float64":
        return []
    allowed = TOLERANCES[precision]
    return [
        f"in {precision} rounding hides small faults: what counts is that losses agree to "
        f"{allowed['loss']:.0e} and gradient norms to {allowed['gradient norm']:.0e}"
    ]
