"""What cannot be followed by its shapes is refused by the name of its module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_training_split import Case
from torch import Tensor, nn
from training_cases import train

from allfuse.base.errors import UserError
from allfuse.split.record import record

WAYS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "a branch": (lambda y: -y if bool((y > 0).any()) else y, "asks for the numbers in a tensor"),
    "a number": (lambda y: y * y.sum().item(), "asks for the numbers in a tensor"),
    "a loop": (lambda y: [y + k for k in range(int(y.sum()))], "asks for the numbers in a tensor"),
    "a choice": (lambda y: y[y > 0], "a shape depends on the numbers in a tensor"),
}


class Router(nn.Module):
    def __init__(self, way: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.map, self.way = nn.Linear(6, 6), way

    def forward(self, x: Tensor) -> Any:
        return self.way(self.map(x))


def routed(name: str) -> nn.Module:
    blocks = nn.ModuleDict({"first": nn.Linear(6, 6), "second": Router(WAYS[name][0])})
    return nn.Sequential(nn.Linear(6, 6), nn.Sequential(*blocks.values()), nn.Linear(6, 4))


@pytest.mark.parametrize("name", WAYS)
def test_a_way_that_depends_on_numbers_names_the_module(name: str) -> None:
    model = routed(name)
    with pytest.raises(UserError, match=rf"in 1\.1 \(Router\): .*{WAYS[name][1]}.*allowed.*next"):
        record(model, lambda made: made(torch.ones(2, 6)))


@pytest.mark.parametrize("plan", ["pipe(2)", "tensor(2)"])
def test_the_plan_is_named_before_training(plan: str) -> None:
    made = Case(lambda: routed("a branch"), (6,), (), 4).job()
    text = rf"{plan[:4]}.*2\): the forward pass cannot be followed.*1\.1 \(Router\)"
    with pytest.raises(UserError, match=text):
        train(made, plan)
