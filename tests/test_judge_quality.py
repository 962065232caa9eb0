"""What greedy soups are worth: fine-tunes of one base on scikit-learn's digits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allfuse.jobfile import load_job
from allfuse.judge.search import search
from allfuse.judge.subject import JobFile, Subject
from allfuse.judge.wish import Wish
from allfuse.rule import Mean
from allfuse.store.tensorfile import write_model
from allfuse.training.start import build_model

JOB = Path(__file__).resolve().parent.parent / "examples" / "digits.py"
RATES = (1e-3, 3e-3, 1e-2)
MODELS, BASES = 12, range(10, 15)
PART = 0.15  # of the training data, that each fine-tune sees
EPOCHS = 20


def train(model: nn.Module, x: Tensor, y: Tensor, rate: float, epochs: int, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=chance).split(60):
            if len(rows) > 1:  # BatchNorm has no statistics of one sample
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
    model.eval()


def fine_tune(folder: Path, seed: int) -> list[Path]:
    """A base that has seen a quarter of the data, and models that went on from it with other seeds,
    rates and subsets."""
    job: Any = load_job(JOB, {})
    x, y = job.train
    base = build_model(job.model, seed)
    train(base, x[:300], y[:300], 2e-3, EPOCHS, seed)
    paths = []
    for number in range(MODELS):
        key = 1000 * seed + number
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(key))
        rows = rows[: int(PART * len(x))]
        model = copy.deepcopy(base)
        train(model, x[rows], y[rows], RATES[number % len(RATES)], EPOCHS, key)
        paths.append(folder / f"{number}.safetensors")
        write_model(paths[-1], model.state_dict())
    return paths


@pytest.mark.slow
def test_greedy_soups_of_digits_are_no_worse_than_the_best_single_model(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    gains = []
    for seed in BASES:
        folder = tmp_path / str(seed)
        folder.mkdir()
        models = fine_tune(folder, seed)
        subject = Subject(models=tuple(models), job=JobFile(path=JOB), rule=Mean())
        report = search(subject, Wish(search="greedy", out=folder / "out"))
        assert report is not None
        rows = {name: row["test"]["figure"] for name, row in report["rows"].items()}
        gains.append(rows["chosen"] - rows["best single"])
    assert sum(gains) / len(gains) >= 0, gains
    assert sum(gain >= 0 for gain in gains) > len(gains) / 2, gains
