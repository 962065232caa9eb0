"""Changing a weight of another stage is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_training_split import CASES
from torch import nn
from training_cases import train

from allfuse.base.errors import UserError
from allfuse.job import Stop, on
from allfuse.split.parted import drop
from allfuse.split.pipe.absent import guard

CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda p: p.mul_(0.9),
    "its data": lambda p: p.data.mul_(0.9),
    "an entry": lambda p: p.__setitem__(0, 1.0),
    "by init": nn.init.normal_,
    "several": lambda p: torch._foreach_mul_([p], 0.9),
}


def two() -> nn.Module:
    """Of whose layers the second is in another stage."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    drop(model[1].parameters())
    guard(model, {"1.weight": (1,), "1.bias": (1,)}, 0, "pipe(2)")
    return model


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_names_the_weight_the_module_and_the_stage(name: str) -> None:
    text = r"weight 1.weight of module 1 .* rank 0 of pipe\(2\) .* in a stage of rank 1.*allowed"
    with torch.no_grad(), pytest.raises(UserError, match=text):
        CHANGES[name](two()[1].weight)


def test_all_else_is_done_as_ever() -> None:
    model = two()
    (model[0].weight.data).mul_(2.0)
    assert model(torch.ones(2, 4)).shape == (2, 3)
    assert type(model.state_dict()["1.weight"]) is torch.Tensor
    assert type(copy.deepcopy(model)[1].weight) is nn.Parameter
    assert isinstance(model[1].weight, nn.Parameter)
    assert [name for name, _ in model.named_parameters()][2:] == ["1.weight", "1.bias"]


def test_a_hook_of_a_job_that_changes_all_weights_is_told_which_it_may_not() -> None:
    def shrink(s: Any, _: Any) -> None:
        (model,) = s.models.values()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)

    made = CASES["mlp"].job(stop=Stop(steps=2), hooks=[on("step", shrink)])
    with pytest.raises(UserError, match=r"of module .* in a stage of rank"):
        train(made, "pipe(2)")
