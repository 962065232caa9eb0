"""Small models on disk with a job, for tests of what merges by data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import allfuse as af
from allfuse.merge.learned.ingredients import Ingredients
from allfuse.merge.source import Source, open_source

Build = Callable[[], nn.Module]


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def make_job(
    build: Build = small, train: Any = None, *, loss: Any = None, batch_size: int = 8, **more: Any
) -> af.Job:
    """A job whose data has three classes, unless `train` is given."""
    return af.Job(
        model=build,
        train=classes(0) if train is None else train,
        loss=loss or (lambda outputs, batch: F.cross_entropy(outputs, batch[1])),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        batch_size=batch_size,
        **more,
    )


def classes(seed: int, samples: int = 24) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, 5, generator=chance)
    return inputs, torch.randint(3, (samples,), generator=chance)


def make_modules(build: Build, count: int) -> list[nn.Module]:
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        made.append(build().eval())
    return made


def save(module: nn.Module, path: Path) -> Path:
    save_file({name: value.contiguous() for name, value in module.state_dict().items()}, path)
    return path


def save_all(modules: Sequence[nn.Module], folder: Path) -> list[Path]:
    return [save(each, folder / f"{place}.safetensors") for place, each in enumerate(modules)]


def mix_of(
    folder: Path, modules: Sequence[nn.Module], jobs: Sequence[af.Job], **about: Any
) -> Ingredients:
    """What a method is given to fuse these modules."""
    sources: tuple[Source, ...] = tuple(open_source(path) for path in save_all(modules, folder))
    about.setdefault("weights", (1.0,) * len(modules))
    return Ingredients(sources=sources, jobs=tuple(jobs), **about)
