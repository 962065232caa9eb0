"""What a run folder gives back: the job and the model with its trained weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from allfuse.base.errors import RunError, UserError
from allfuse.job import Job
from allfuse.jobfile import load_job
from allfuse.split.base import Run, Split
from allfuse.split.pending import Pending
from allfuse.store.checkpoint import Checkpoints
from allfuse.store.run import RunFolder
from allfuse.store.weights import HeldWeights, WeightFiles, Weights, list_differences
from allfuse.training.building import build_pending, differences, take_weights
from allfuse.training.served import read_state


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A run, ready to predict.

    model: on the CPU. pending: its weights, which `load` gives it, or `cut`, where a plan does
    that. record: what run.json says. notes: what whoever asked should
    know of how it was restored.
    """

    job: Job
    model: nn.Module
    record: dict[str, Any]
    folder: RunFolder
    pending: Pending
    notes: list[str] = field(default_factory=list)

    def on(self, device: torch.device) -> nn.Module:
        """The model, which is on a device from now on."""
        self.pending.move(device)
        return self.model.to(device)

    def load(self) -> None:
        """Give the model its weights."""
        self.pending.fill()

    def cut(
        self,
        split: Split,
        runs: Sequence[tuple[int, Run]],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """Keep this rank's part of the model, where a plan cuts it, and read its weights.

        Raises:
            PlanError, UserError: it cannot be cut.
        """
        self.pending.stop_guarding()
        split.cut(self.model, runs, self.job.request, autocast)
        self.pending.fill(split.pieces())


def open_run(path: str | Path, *, weights: str = "last", later: bool = False) -> Restored:
    """The job of a run and its model with the trained weights; with `later` these stay in their
    file until it is known which of them are needed.

    The weights are those of model.safetensors, which are the "last" ones, or of the newest whole
    checkpoint where training was interrupted before it wrote that file; the "best" those of the
    checkpoint with the best monitored value; the "average" what a job averaged along its steps.

    Raises:
        UserError: other weights are asked for.
        RunError: no run, a run of a script (no job file), no weights yet, or weights of another
            model than the job builds.
        JobError: the job file cannot be used any more.
        CheckpointError: the file with the weights is damaged.
    """
    if weights not in READERS:
        raise UserError(f"--weights {weights}: allowed: {', '.join(READERS)}")
    folder = RunFolder.open(path)
    if not folder.job_path.is_file():
        raise RunError(
            f"run folder {path} has no job.py: a script made it, and only a job file says how to "
            "build the model and read its data; next: write the model as def job() -> af.Job (see "
            "docs/writing-a-job.md) and train it with `allfuse train`"
        )
    record = folder.record
    job = load_job(folder.job_path, record.get("arguments", {}), record.get("job_file"))
    model, pending = build_pending(job.model, job.seed)
    found, notes = READERS[weights](folder)
    load_weights(model, found, pending)
    if not later:
        pending.fill()
    return Restored(
        job=job, model=model, record=record, folder=folder, pending=pending, notes=notes
    )


def read_weights(folder: RunFolder) -> tuple[Weights, list[str]]:
    """The trained weights, and notes on where they are from.

    Raises:
        RunError: there are none yet, or those of several models.
        CheckpointError: model.safetensors is damaged.
    """
    if folder.model_path.is_file():
        return WeightFiles([folder.model_path], str(folder.model_path)), []
    notes: list[str] = []
    step = Checkpoints(folder.checkpoints).newest(notes.append)
    if step is None:
        raise RunError(
            f"run folder {folder.path} holds neither {folder.model_path.name} nor a whole "
            f"checkpoint: there are no weights yet; next: train on with --resume {folder.path}"
        )
    weights = _only_model(folder, step)
    notes.append(
        f"training was interrupted before it wrote {folder.model_path.name}: the weights are those "
        f"of {weights.source}"
    )
    return weights, notes


def read_best(folder: RunFolder) -> tuple[Weights, list[str]]:
    """The weights of the best checkpoint, and a note on that.

    Raises:
        RunError: no checkpoint has a score.
        CheckpointError: it is damaged.
    """
    step = Checkpoints(folder.checkpoints).best()
    if step is None:
        raise RunError(
            f"--weights best: no checkpoint in {folder.path} has a score; allowed: runs of jobs "
            "with validation data; next: leave it out for the last weights"
        )
    weights = _only_model(folder, step)
    return weights, [f"the weights are those of {weights.source}, the best of the run"]


def read_average(folder: RunFolder) -> tuple[Weights, list[str]]:
    """The weights that were averaged along the steps, and notes on where they are from.

    Raises:
        RunError: the run has none. CheckpointError: average.safetensors is damaged.
    """
    path = folder.average_path
    if path.is_file():
        return WeightFiles([path], str(path)), []
    notes: list[str] = []
    step = Checkpoints(folder.checkpoints).newest(notes.append)
    average = None if step is None else _state(folder, step).get("average")
    if not average or not average["models"]:
        raise RunError(
            f"--weights average: run folder {folder.path} holds no {path.name}, and no checkpoint "
            "with an average; allowed: runs of jobs with Job(average=af.EMA()), or another, whose "
            "start was reached; next: leave it out for the last weights"
        )
    source = f"the average in the checkpoint of step {step}"
    notes.append(f"training was interrupted before it wrote {path.name}: the weights are {source}")
    return HeldWeights(next(iter(average["models"].values())), source), notes


READERS = {"last": read_weights, "best": read_best, "average": read_average}


def _only_model(folder: RunFolder, step: int) -> Weights:
    models, source = _state(folder, step)["models"], f"the checkpoint of step {step}"
    if len(models) != 1:
        raise RunError(
            f"{source} in {folder.path} holds {len(models)} models ({', '.join(models)}); allowed: "
            "the one model of a job"
        )
    return HeldWeights(next(iter(models.values())), source)


def _state(folder: RunFolder, step: int) -> dict[str, Any]:
    """What is in a checkpoint, as one worker would go on from it; tensors lie in files still."""
    return read_state(Checkpoints(folder.checkpoints), step, mapped=True)[0]


def load_weights(model: nn.Module, weights: Weights, pending: Pending) -> None:
    """Have a model take its numbers from weights, of which every name and shape must be its own.

    Raises:
        RunError: names, shapes or types differ; says which.
    """
    told = differences(model, weights)
    if told:
        raise RunError(
            f"the weights of {weights.source} do not fit the job: {list_differences(told)}; "
            "allowed: the model that was trained; next: undo the changes to the job file and what "
            "it imports, or train anew"
        )
    take_weights(model, weights, pending)
