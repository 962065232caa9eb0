"""Models to judge: a small job with a known answer, and models that are near it or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from allfuse.judge.search import search
from allfuse.judge.subject import JobFile, Subject
from allfuse.judge.wish import Wish
from allfuse.rule import Mean, Rule

JOB = """
import torch
from safetensors.torch import load_file
from torch import nn

import allfuse as af


def samples(count, seed):
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=chance)
    return x, answer(x)


def answer(x):
    truth = torch.randn(6, 3, generator=torch.Generator().manual_seed(7))
    return (x @ truth).argmax(1)


def labelled_by(x, path):
    return x, (x @ load_file(path)["0.weight"].T).argmax(1)


def network(norm):
    layers = [nn.Linear(6, 3, bias=False)]
    return nn.Sequential(*layers, nn.BatchNorm1d(3)) if norm else nn.Sequential(*layers)


def job(test=200, norm=False, teacher="", metric="accuracy", seed=2) -> af.Job:
    held = samples(test, seed) if test else None
    if teacher:
        held = labelled_by(held[0], teacher)
    return af.Job(
        model=lambda: network(norm),
        train=samples(256, 0),
        validation=samples(301, 1),
        test=held,
        loss=lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1]),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        metrics={"accuracy": af.accuracy} if metric == "accuracy" else {},
        batch_size=50,
    )
"""


def truth() -> Tensor:
    """The weights that are always right, (3, 6)."""
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(7)).T.contiguous()


def near(seed: int, noise: float = 0.6) -> Tensor:
    """Weights that are about right, each wrong in its own way: their mean is better."""
    return truth() + noise * torch.randn(3, 6, generator=torch.Generator().manual_seed(seed))


def write_models(folder: Path, weights: list[Tensor], **others: Tensor) -> list[Path]:
    """Files with these weights."""
    paths = [folder / f"m{number}.safetensors" for number in range(len(weights))]
    for path, each in zip(paths, weights, strict=True):
        save_file({"0.weight": each, **others}, path)
    return paths


def write_job(folder: Path) -> Path:
    path = folder / "job_of_models.py"
    path.write_text(JOB)
    return path


def subject(
    models: list[Path],
    rule: Rule | None = None,
    arguments: dict[str, Any] | None = None,
    **about: Any,
) -> Subject:
    job = JobFile(path=write_job(models[0].parent), arguments=arguments or {})
    return Subject(models=tuple(models), job=job, rule=rule or Mean(), **about)


def find(
    given: Subject,
    out: Path,
    how: str = "greedy",
    tell: Callable[..., None] | None = None,
    **wish: Any,
) -> dict[str, Any]:
    """The report of a search in this process."""
    told = {} if tell is None else {"tell": tell}
    report = search(given, Wish(search=how, out=out, **wish), **told)
    assert report is not None
    return report


def chosen(report: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = report["rows"]["chosen"]
    return row


def weights_of(out: Path) -> Tensor:
    return load_file(out / "model.safetensors")["0.weight"]
