"""What `allfuse plan` says of a model that is cut."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from sliced import GatedUnit, Residual
from torch import nn

from allfuse.plan import as_plan
from allfuse.split.describe import describe_splits

WIDTH, HIDDEN, ROWS = 12, 16, 40


def told(plan: str, model: nn.Module) -> tuple[list[str], Any]:
    runs = [(rows, lambda made, rows=rows: made(torch.randn(rows, WIDTH))) for rows in (2, 3)]
    return describe_splits(as_plan(plan), model, runs, ROWS)


def blocks(count: int) -> nn.Module:
    return nn.Sequential(
        *(Residual(nn.LayerNorm(WIDTH), GatedUnit(WIDTH, HIDDEN)) for _ in range(count))
    )


def test_bytes_of_slices_are_two_sums_of_activations_for_each_region() -> None:
    _, facts = told("tensor(2)", blocks(3))
    sums = 3 * 2 * ROWS * WIDTH * 4
    assert facts["tensor"]["bytes_per_step"] == sums * 2 * (2 - 1) / 2
    assert facts["tensor"]["cut_share"] > 0.9


def test_a_gather_is_half_a_sum_and_what_no_gradient_goes_back_to_is_not_summed() -> None:
    """Of what the last map gives a loss by parts gathers one number of each rank for each row."""
    model = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Softmax(-1), nn.Linear(HIDDEN, 6))
    lines, facts = told("tensor(2)", model)
    assert facts["tensor"]["modules"] == {"0.weight": "gathered", "2.weight": "late"}
    gathers, back = ROWS * (HIDDEN + 2) * 4, 2 * ROWS * HIDDEN * 4
    assert facts["tensor"]["bytes_per_step"] == (gathers + back) / 2
    assert "2 by columns, loss by parts if it is a cross entropy, else gathered" in "".join(lines)


def test_equal_blocks_are_told_once() -> None:
    lines, _ = told("tensor(2)", blocks(3))
    assert lines[1:] == ["    *.inner.*.both (2 parts) by columns, *.inner.*.down by rows  x3"]


def test_blocks_that_read_alike_and_are_cut_in_other_ways_are_told_by_their_numbers() -> None:
    layers = [nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH), nn.Softmax(-1)]
    net = nn.Sequential(*layers, nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))
    lines, _ = told("tensor(2)", nn.Sequential(OrderedDict(net=net)))
    assert lines[1:] == ["    net.0,4 by columns, net.2,6 by rows  x2"]


def test_a_weight_that_two_maps_have_is_told_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(24, WIDTH), nn.Linear(WIDTH, 24, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.head(self.table((x[:, 0] > 0).long()))
            return y

    lines, _ = told("tensor(2)", Tied())
    (line,) = [line for line in lines if "table" in line]
    assert "table by its rows, and in head by columns" in line


def test_what_is_left_whole_is_told_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 1), nn.ReLU(), nn.Linear(1, 2))
    lines, facts = told("tensor(2)", model)
    assert "1 channels of 0 are fewer than 2" in " ".join(lines)
    assert "0" in facts["tensor"]["whole"]


def test_stages_are_told_with_what_they_hold_and_pass_on() -> None:
    lines, facts = told("pipe(2)", blocks(4))
    stages = facts["pipe"]["stages"]
    assert [stage["begins"] for stage in stages] == [None, "2"]
    assert sum(stage["parameters"] for stage in stages) == sum(
        p.numel() for p in blocks(4).parameters()
    )
    assert f"passes on {ROWS * WIDTH * 4 / 1e3:.3g} kB" in lines[1]


def test_plans_that_cut_no_model_say_nothing() -> None:
    assert told("data(2)", blocks(1)) == ([], {})
