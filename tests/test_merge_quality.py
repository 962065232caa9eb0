"""What two models that learned other digits know together, merged: figures on digits that none of
them saw. `python tests/test_merge_quality.py` prints a table."""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from merging_cases import make_job, save
from safetensors.torch import load_file
from torch import Tensor, nn

import allfuse as af
from allfuse.merge.learned import LEARNED
from allfuse.merge.learned.learn import LearnedMerge, merge_learned
from allfuse.merge.merge import merge
from allfuse.merge.recipe import Recipe
from allfuse.rule import METHODS

pytest.importorskip("sklearn")

Samples = tuple[Tensor, Tensor]
TASKS = (range(5), range(5, 10))
KEPT = 0.95
FOUND = ("base", "mean", "task_arithmetic", "ties", *LEARNED)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


@functools.cache
def digits() -> Samples:
    """Pixels in 0..1 and classes of 1,797 digits, shuffled once."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor(found.data, dtype=torch.float32)[order] / 16
    return pixels, torch.tensor(found.target)[order]


def part(task: range, begin: int, end: int) -> Samples:
    """The samples of some classes, from a part of the data."""
    pixels, labels = (each[begin:end] for each in digits())
    mine = (labels >= task.start) & (labels < task.stop)
    return pixels[mine], labels[mine]


def train(module: nn.Module, samples: Samples, steps: int, lr: float, seed: int) -> nn.Module:
    optimizer = torch.optim.Adam(module.parameters(), lr=lr)
    chance = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        places = torch.randint(len(samples[1]), (64,), generator=chance)
        optimizer.zero_grad()
        F.cross_entropy(module(samples[0][places]), samples[1][places]).backward()
        optimizer.step()
    return module


def accuracy(module: nn.Module, task: range) -> Tensor:
    """On digits of a task that nobody learned from: among the classes of the task, as a model of
    several tasks is asked in the papers, and among all ten (2,)."""
    pixels, labels = part(task, 1200, 1797)
    with torch.no_grad():
        scores = module(pixels)
    own = scores[:, task.start : task.stop].argmax(1) + task.start
    return torch.stack([own == labels, scores.argmax(1) == labels]).double().mean(1)


def make_models(folder: Path, seed: int) -> tuple[list[Path], list[Tensor]]:
    """A base that knows a little of all digits, and from it a model for each task, which saw no
    other digit since; the accuracy of each on its own task."""
    torch.manual_seed(seed)
    base = train(network(), part(range(10), 0, 200), 60, 2e-3, seed)
    paths, own = [save(base, folder / "base.safetensors")], []
    for number, task in enumerate(TASKS):
        module = network()
        module.load_state_dict(base.state_dict())
        train(module, part(task, 200, 1000), 120, 1e-3, seed + 1 + number)
        own.append(accuracy(module, task))
        paths.append(save(module, folder / f"{number}.safetensors"))
    return paths, own


def job_of(task: range) -> af.Job:
    return make_job(
        network, part(task, 200, 1000), validation=part(task, 1000, 1200), batch_size=64
    )


def fuse(name: str, paths: list[Path], out: Path) -> nn.Module:
    """The module that a method makes of the models; of "base" the base."""
    base, *models = paths
    found = out / "model.safetensors"
    if name == "base":
        found = base
    elif name in LEARNED:
        method = LEARNED[name]()
        given = LearnedMerge(
            method=method,
            models=models,
            jobs=[job_of(task) for task in TASKS],
            weights=[1.0, 1.0],
            base=base if method.of_changes else None,
        )
        merge_learned(given, out)
    else:
        rule = METHODS[name]()
        own = base if rule.of_changes else None
        merge(Recipe(models=models, rule=rule, weights=[1.0, 1.0], base=own), out)
    module = network()
    module.load_state_dict(load_file(found))
    return module


def measure(seed: int, names: Sequence[str]) -> Tensor:
    """What part of each model's accuracy on its own task is kept: (methods, tasks, 2)."""
    with tempfile.TemporaryDirectory() as folder:
        paths, own = make_models(Path(folder), seed)
        kept = []
        for name in names:
            module = fuse(name, paths, Path(folder) / name)
            each = [accuracy(module, task) / of for task, of in zip(TASKS, own, strict=True)]
            kept.append(torch.stack(each))
    return torch.stack(kept)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ties", "regmean", "regmean++"])
def test_two_disjoint_tasks_keep_their_accuracy_when_merged(name: str) -> None:
    kept = torch.stack([measure(seed, ("base", name)) for seed in range(3)])[..., 0]
    assert kept[:, 0].min() < KEPT, "the base knows as much, so nothing had to be kept"
    assert kept[:, 1].min() >= KEPT


def _print(seeds: int) -> None:
    kept = 100 * torch.stack([measure(seed, FOUND) for seed in range(seeds)])
    sys.stdout.write(
        f"{seeds} seeds, % kept of a task's own accuracy: mean +- over seeds (worst)\n"
    )
    for place, name in enumerate(FOUND):
        told = [
            f"{each.mean():6.2f} +- {each.mean(1).std():4.2f} ({each.min():6.2f})"
            for each in kept[:, place].unbind(-1)
        ]
        sys.stdout.write(f"{name:16} of its classes {told[0]}   of ten {told[1]}\n")


if __name__ == "__main__":
    _print(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
