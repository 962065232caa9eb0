"""kill -9 of every process of a run, at any moment, loses nothing but time.

The real command line, the real processes. A run is held at a chosen moment (by its own job file,
told by the environment), killed while it stands there, and resumed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_cli import allfuse
from training_cases import assert_equal

from allfuse.base.tensors import digest
from allfuse.store.checkpoint import Checkpoints
from allfuse.store.tensorfile import read_model

STEPS = 12  # as the job below says

JOB = '''
import os, random, threading
from pathlib import Path
import numpy as np
import torch
from torch import nn
import allfuse as af

KIND, COUNT, MARK = (os.environ.get("HOLD") or "never 0 .").split()


def hold():
    Path(MARK).touch()
    threading.Event().wait()


def hold_at(name):
    """The COUNTth call of a function of os by a thread that saves is not done, or done and held."""
    original, calls = getattr(os, name), [0]

    def patched(*arguments):
        saving = threading.current_thread().name.startswith("allfuse-save")
        calls[0] += saving
        if saving and calls[0] == int(COUNT):
            hold()
        return original(*arguments)

    setattr(os, name, patched)


if KIND in ("fsync", "rename"):
    hold_at(KIND)


def after_step(session, event):
    if KIND == "step" and event.step == int(COUNT):
        hold()


class Noisy:
    def __len__(self):
        return 24

    def __getitem__(self, index):
        x = torch.sin(torch.arange(4.0) * (index + 1))
        noise = torch.rand(()) + random.random() + float(np.random.rand())
        return x + 0.1 * noise, x.sum(dim=0, keepdim=True)


def job(lr=0.05) -> af.Job:
    return af.Job(
        model=lambda: nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1)
        ),
        train=Noisy(),
        validation=Noisy(),
        loss=lambda outputs, batch: nn.functional.mse_loss(outputs, batch[1]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr),
        scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, lr, total_steps=20),
        precision="bf16",
        clip=1.0,
        accumulate=2,
        batch_size=8,
        stop=af.Stop(steps=12),
        evaluate_every=3,
        save_every=2,
        hooks=[af.on("step", after_step)],
    )
'''


def command(job: Path, plan: str, *where: str) -> list[str]:
    program = [sys.executable, "-m", "allfuse", "train", str(job), "--plan", plan]
    return [*program, "--quiet", "--threads", "1", *where]


def run_to_the_end(job: Path, plan: str, *where: str) -> None:
    """In this process, whose workers have torch loaded."""
    allfuse(*command(job, plan, *where)[3:], cwd=job.parent, ok=True)


def run_and_kill(job: Path, plan: str, hold: str, newest: int, *where: str) -> None:
    """Start a run and kill all its processes, once it is held and its last save has ended."""
    mark, checkpoints = job.with_name("held"), Checkpoints(Path(where[1]) / "checkpoints")
    mark.unlink(missing_ok=True)
    process = subprocess.Popen(
        command(job, plan, *where),
        env={**os.environ, "HOLD": f"{hold} {mark}"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 150
    while not (mark.exists() and newest in checkpoints.steps()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the run never came to where it is held"
        time.sleep(0.01)  # polling for what was asked for; no order of events depends on it
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert checkpoints.steps()[0] == newest


def state_at(run: Path, step: int) -> list[str]:
    checkpoints = Checkpoints(run / "checkpoints")
    states = [checkpoints.read(step, rank=rank)[0] for rank in checkpoints.writers(step)]
    for state in states:
        del state["parts"]["stopping"]["seconds"]
    return [digest(state) for state in states]


@pytest.mark.parametrize(
    ("plan", "holds"),
    [
        # In a step; while a file of a checkpoint is written; before a checkpoint is committed.
        ("data(2)", [("step 5", 4), ("fsync 4", 4), ("rename 2", 6)]),
        pytest.param("site(2, every=3)", [("step 7", 6)], marks=pytest.mark.slow),
    ],
)
def test_a_run_whose_processes_are_all_killed_ends_with_the_same_bits(
    plan: str, holds: list[tuple[str, int]], tmp_path: Path
) -> None:
    job = tmp_path / "train_me.py"
    job.write_text(JOB)
    whole, run = tmp_path / "whole", tmp_path / "run"
    run_to_the_end(job, plan, "--out", str(whole))
    where = ("--out", str(run))
    for hold, newest in holds:
        run_and_kill(job, plan, hold, newest, *where)
        where = ("--resume", str(run))
    run_to_the_end(job, plan, *where)
    assert_equal(
        read_model(whole / "model.safetensors"), read_model(run / "model.safetensors"), exact=True
    )
    assert state_at(whole, STEPS) == state_at(run, STEPS)
