"""Dropout in a model that is cut: between regions as in one process, within them by slice. Ranks
are processes here, since threads share a generator."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training_cases import job

from allfuse.job import Job, Stop
from allfuse.launcher.local import launch_local
from allfuse.training.loop import train_job


class Drops(nn.Module):
    """Two blocks with dropout outside of what is cut, and inside where asked for."""

    def __init__(self, inside: float) -> None:
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(8, 16) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(16, 8) for _ in range(2))
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.ups, self.downs, strict=True):
            hidden = F.dropout(F.relu(up(x)), self.inside, self.training)
            x = x + F.dropout(down(hidden), 0.3, self.training)
        return x


def made_job(inside: float) -> Job:
    chance = torch.Generator().manual_seed(3)
    x = torch.randn(24, 8, generator=chance, dtype=torch.float64)
    return job(
        model=lambda: Drops(inside).double(),
        train=(x, x.flip(1)),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        stop=Stop(steps=8),
    )


def trained() -> list[dict[str, Tensor]]:
    """Without dropout inside, and twice with it."""
    return [train_job(made_job(inside)).weights for inside in (0.0, 0.4, 0.4)]


def test_dropout_between_regions_is_that_of_one_process_and_within_them_each_slice_s_own() -> None:
    none, first, second = launch_local(trained, 2, plan="tensor(2)", threads=1)
    whole, dropped, _ = trained()
    for name, value in whole.items():
        torch.testing.assert_close(none[name], value, rtol=1e-9, atol=1e-12)
        assert torch.equal(second[name], first[name])
    name = "ups.0.weight"
    assert (dropped[name] - first[name]).norm() > 1e-3
    assert first[name].norm() == pytest.approx(float(dropped[name].norm()), rel=0.3)
