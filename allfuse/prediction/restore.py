"""What a run folder gives back: the job and the model with its trained weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from allfuse.base.errors import RunError
from allfuse.job import Job
from allfuse.jobfile import load_job
from allfuse.split.base import Run, Split
from allfuse.split.pending import Pending
from allfuse.store.checkpoint import Checkpoints
from allfuse.store.run import RunFolder
from allfuse.store.weights import HeldWeights, WeightFiles, Weights, list_differences
from allfuse.training.building import build_pending, differences, take_weights
from allfuse.training.merged import mean_of_sites


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


def open_run(path: str | Path, *, best: bool = False, later: bool = False) -> Restored:
    """The job of a run and its model with the trained weights; with `later` these stay in their
    file until it is known which of them are needed.

    The weights are those of model.safetensors, which are the last ones, or of the newest whole
    checkpoint where training was interrupted before it wrote that file; with `best` those of the
    checkpoint with the best monitored value.

    Raises:
        RunError: no run, a run of a script (no job file), no weights yet, or weights of another
            model than the job builds.
        JobError: the job file cannot be used any more.
        CheckpointError: the file with the weights is damaged.
    """
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
    weights, notes = read_best(folder) if best else read_weights(folder)
    load_weights(model, weights, pending)
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
            f"--best: no checkpoint in {folder.path} has a score; allowed: runs of jobs with "
            "validation data; next: leave --best out for the last weights"
        )
    weights = _only_model(folder, step)
    return weights, [f"the weights are those of {weights.source}, the best of the run"]


def _only_model(folder: RunFolder, step: int) -> Weights:
    models, source = _checkpoint_models(folder, step), f"the checkpoint of step {step}"
    if len(models) != 1:
        raise RunError(
            f"{source} in {folder.path} holds {len(models)} models ({', '.join(models)}); allowed: "
            "the one model of a job"
        )
    return HeldWeights(next(iter(models.values())), source)


def _checkpoint_models(folder: RunFolder, step: int) -> dict[str, dict[str, Any]]:
    """The models of a checkpoint; where sites differ, their mean as a resume would take it."""
    checkpoints = Checkpoints(folder.checkpoints)
    states = [
        checkpoints.read(step, rank=writer, mapped=True)[0] for writer in checkpoints.writers(step)
    ]
    whole = [state for state in states if "models" in state]  # others hold what codecs keep
    merged: dict[str, dict[str, Any]] = mean_of_sites(whole)["models"]
    return merged


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
