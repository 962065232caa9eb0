"""What a run folder gives back: the job and the model with its trained weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from allfuse.base.errors import RunError
from allfuse.job import Job
from allfuse.jobfile import load_job
from allfuse.store.checkpoint import Checkpoints
from allfuse.store.run import RunFolder
from allfuse.store.tensorfile import read_model
from allfuse.training.merged import mean_of_sites
from allfuse.training.start import build_model


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A run, ready to predict.

    model: on the CPU, weights loaded. record: what run.json says. notes: what whoever asked should
    know of how it was restored.
    """

    job: Job
    model: nn.Module
    record: dict[str, Any]
    folder: RunFolder
    notes: list[str] = field(default_factory=list)


def open_run(path: str | Path, *, best: bool = False) -> Restored:
    """The job of a run and its model with the trained weights.

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
    model = build_model(job.model, job.seed)
    weights, source, notes = read_best(folder) if best else read_weights(folder)
    load_weights(model, weights, source)
    return Restored(job=job, model=model, record=record, folder=folder, notes=notes)


def read_weights(folder: RunFolder) -> tuple[dict[str, Any], str, list[str]]:
    """The trained weights, where they are from, and notes on that.

    Raises:
        RunError: there are none yet, or those of several models.
        CheckpointError: model.safetensors is damaged.
    """
    if folder.model_path.is_file():
        return dict(read_model(folder.model_path)), str(folder.model_path), []
    notes: list[str] = []
    step = Checkpoints(folder.checkpoints).newest(notes.append)
    if step is None:
        raise RunError(
            f"run folder {folder.path} holds neither {folder.model_path.name} nor a whole "
            f"checkpoint: there are no weights yet; next: train on with --resume {folder.path}"
        )
    weights, source = _only_model(folder, step)
    notes.append(
        f"training was interrupted before it wrote {folder.model_path.name}: the weights are those "
        f"of {source}"
    )
    return weights, source, notes


def read_best(folder: RunFolder) -> tuple[dict[str, Any], str, list[str]]:
    """The weights of the best checkpoint, where they are from, and a note on that.

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
    weights, source = _only_model(folder, step)
    return weights, source, [f"the weights are those of {source}, the best of the run"]


def _only_model(folder: RunFolder, step: int) -> tuple[dict[str, Any], str]:
    models, source = _checkpoint_models(folder, step), f"the checkpoint of step {step}"
    if len(models) != 1:
        raise RunError(
            f"{source} in {folder.path} holds {len(models)} models ({', '.join(models)}); allowed: "
            "the one model of a job"
        )
    return next(iter(models.values())), source


def _checkpoint_models(folder: RunFolder, step: int) -> dict[str, dict[str, Any]]:
    """The models of a checkpoint; where sites differ, their mean as a resume would take it."""
    checkpoints = Checkpoints(folder.checkpoints)
    states = [checkpoints.read(step, rank=writer)[0] for writer in checkpoints.writers(step)]
    whole = [state for state in states if "models" in state]  # others hold what codecs keep
    merged: dict[str, dict[str, Any]] = mean_of_sites(whole)["models"]
    return merged


def load_weights(model: nn.Module, weights: dict[str, Any], source: str) -> None:
    """Load a state dict in which every name and shape must be the model's.

    Raises:
        RunError: names or shapes differ; says which.
    """
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    differences = [f"{name} is not in the file" for name in own if name not in weights]
    differences += [f"the model has no {name}" for name in weights if name not in own]
    differences += [
        f"{name} is {tuple(weights[name].shape)} in the file and {tuple(value.shape)} in the model"
        for name, value in own.items()
        if name in weights and not is_lazy(value) and weights[name].shape != value.shape
    ]
    reason = differences[0] if differences else ""
    if not reason:
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
    if reason:
        more = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
        raise RunError(
            f"the weights of {source} do not fit the job: {reason}{more}; allowed: the model that "
            "was trained; next: undo the changes to the job file and what it imports, or train anew"
        )
