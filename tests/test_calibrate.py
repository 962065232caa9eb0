"""BatchNorm's statistics, estimated anew."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from allfuse.base.errors import DataError
from allfuse.training.calibrate import estimate_statistics


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv1d(2, 4, 1),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20, 6),
        nn.BatchNorm1d(6, track_running_stats=False),
        nn.BatchNorm1d(6),
    )


def drawn(sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    chance = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 2, 5, generator=chance) * 3 + 1, torch.zeros(n)) for n in sizes]


def test_it_equals_torchs_update_bn() -> None:
    model, batches = net(), drawn([8, 8, 5])
    expected = copy.deepcopy(model)
    update_bn(batches, expected)
    assert estimate_statistics(model, batches) == 2
    for (name, own), other in zip(
        model.state_dict().items(), expected.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-7, msg=name)


def test_modes_momentum_and_weights_stay_what_they_were() -> None:
    model = net().eval()
    model[0].train()
    before = copy.deepcopy(model)
    estimate_statistics(model, drawn([4]), lambda module, batch: module(batch[0]))
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert model[1].momentum == before[1].momentum == 0.1
    for own, other in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(own, other)
        assert own.grad is None


def test_a_model_without_batch_norm_asks_for_no_batch() -> None:
    def never() -> object:
        raise AssertionError("a batch was asked for")
        yield

    assert estimate_statistics(nn.Linear(2, 2), never()) == 0


@pytest.mark.parametrize("broken", [False, True])
def test_without_batches_the_old_statistics_are_back(broken: bool) -> None:
    model = net()
    estimate_statistics(model, drawn([6]))
    before = copy.deepcopy(model.state_dict())
    bad = [*drawn([6]), (torch.zeros(3, 7), torch.zeros(3))] if broken else []
    with pytest.raises(RuntimeError if broken else DataError):
        estimate_statistics(model, bad)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
