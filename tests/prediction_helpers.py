"""Runs to predict with: a small job file, and a run folder of it with random weights."""

from __future__ import annotations

from pathlib import Path

import torch

from allfuse.jobfile import load_job
from allfuse.store.run import RunFolder
from allfuse.store.tensorfile import write_model
from allfuse.training.start import build_model

JOB = """
import torch
from torch import nn

import allfuse as af

NAMES = ["low", "middle, or so", 'say "high"']


def samples(count, seed):
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=source)
    return x, (x.sum(1) > 0).long() + (x[:, 0] > 1).long()


def loss(outputs, batch):
    return nn.functional.cross_entropy(outputs, batch[1])


def job(hidden=5, outputs=3, classes=True, inputs=True, test=41, precision="fp32") -> af.Job:
    return af.Job(
        model=lambda: nn.Sequential(
            nn.Linear(4, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs)
        ),
        train=samples(64, 0),
        validation=samples(23, 1),
        test=samples(test, 2) if test else None,
        loss=loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        metrics={"accuracy": af.accuracy},
        batch_size=16,
        inputs=["a", "b", "c", "d"] if inputs else None,
        classes=NAMES if classes else None,
        precision=precision,
        EXTRA
    )
"""


def make_run(folder: Path, *, extra: str = "", weights: bool = True, **arguments: object) -> Path:
    """A run folder as training leaves it, with the weights that seed 0 gives."""
    job_file = folder / "job_file.py"
    job_file.write_text(JOB.replace("EXTRA", extra))
    run = folder / "run"
    record = {"plan": "data(1)", "arguments": arguments, "job_file": str(job_file)}
    with RunFolder.create(run, record) as opened:
        opened.copy_job(job_file)
        if weights:
            job = load_job(job_file, arguments)
            write_model(opened.model_path, build_model(job.model, job.seed).state_dict())
    return run


def write_rows(path: Path, rows: torch.Tensor, names: str = "a,b,c,d") -> Path:
    lines = [names, *(",".join(map(repr, row)) for row in rows.tolist())]
    path.write_text("\n".join(lines) + "\n")
    return path
