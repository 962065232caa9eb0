"""The job whose first step `startup.py` waits for, as `allfuse train` gets it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import models
import torch

import allfuse as af


def job(stamp: str = "", workers: int = 2) -> af.Job:
    """Writes the time of the first step to the file `stamp`."""
    case = models.CASES["mlp"]

    def note(session: Any, event: Any) -> None:
        if session.is_main and session.steps == 1:
            Path(stamp).write_text(repr(time.time()), encoding="utf-8")

    return af.Job(
        model=case.model,
        train=case.data(),
        loss=models.loss_of,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
        batch_size=case.share * workers,
        stop=af.Stop(steps=1),
        hooks=[af.on("step", note)],
    )
