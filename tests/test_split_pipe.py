"""A model cut between its layers gives the numbers of the whole."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sliced import GatedUnit, Residual, encoder, mlp
from test_split_tensor import hugging
from torch import Tensor, nn

from allfuse.base.errors import PlanError
from allfuse.split.parted import drop
from allfuse.split.pipe.boundary import cut_stages, find_boundaries
from allfuse.split.pipe.cutting import keep_out_of_fast_path
from allfuse.split.pipe.sizes import Scaled
from allfuse.split.pipe.stage import Stage
from allfuse.split.record import record
from allfuse.split.shapes import Shapes


def in_stages(
    model: nn.Module, make: Callable[[int], tuple[int, Callable[[nn.Module], Any]]], n: int
) -> tuple[Any, dict[str, Tensor], list[frozenset[str]]]:
    """Output and gradients of n stages one after the other, on a batch of another size than those
    that were recorded."""
    (two, run_two), (three, run_three), (rows, run) = make(2), make(3), make(5)
    one = record(model, run_two)
    plans = cut_stages(one, n, [1.0] * len(one.calls))
    sizes = Scaled(Shapes(one, two, record(model, run_three), three)).of(rows)
    models = [copy.deepcopy(model) for _ in plans]
    for own, plan in zip(models, plans, strict=True):
        drop([p for name, p in own.named_parameters() if name not in plan.parameters])
        keep_out_of_fast_path(own)
    stages = [Stage(m, p, one, torch.device("cpu")) for m, p in zip(models, plans, strict=True)]
    sent: Any = None
    passed = []
    for stage, own in zip(stages, models, strict=True):
        received = None if sent is None else sent.detach().requires_grad_()
        sent = stage.run(received, sizes, functools.partial(run, own))
        passed.append((received, sent))
    loss = weigh(sent)
    gradient = None
    for stage, (received, sent) in reversed(list(zip(stages, passed, strict=True))):
        torch.autograd.backward(loss if stage is stages[-1] else sent, gradient)
        gradient = None if received is None else received.grad
    gradients: dict[str, Tensor] = {}
    for own in models:
        for name, p in own.named_parameters():
            if p.grad is not None:
                before = gradients.get(name)
                gradients[name] = p.grad if before is None else before + p.grad
    return passed[-1][1].detach(), gradients, [plan.parameters for plan in plans]


def weigh(output: Tensor) -> Tensor:
    return (output.sin() * torch.arange(1.0, output.numel() + 1).view_as(output)).sum()


def assert_stages_equal_the_whole(
    model: nn.Module, make: Callable[[int], tuple[int, Callable[[nn.Module], Any]]], n: int
) -> list[frozenset[str]]:
    output, gradients, parameters = in_stages(model, make, n)
    whole = copy.deepcopy(model)
    expected = make(5)[1](whole)
    weigh(expected).backward()
    torch.testing.assert_close(output, expected)
    names = {name for name, p in whole.named_parameters() if p.grad is not None}
    assert gradients.keys() == names
    for name, p in whole.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[name], p.grad, msg=lambda m, k=name: f"{k}: {m}")
    return parameters


def rows_of(*shape: int) -> Callable[[int], tuple[int, Callable[[nn.Module], Any]]]:
    def make(rows: int) -> tuple[int, Callable[[nn.Module], Any]]:
        generator = torch.Generator().manual_seed(rows)
        batch = torch.randn((rows, *shape), generator=generator, dtype=torch.float64)
        return rows, lambda model: model(batch)

    return make


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (mlp, (6,)),
        (encoder, (5, 16)),
        (
            lambda: nn.Sequential(*(Residual(nn.LayerNorm(12), GatedUnit()) for _ in range(4))),
            (12,),
        ),
    ],
)
def test_stages_give_the_output_and_the_gradients_of_the_whole(
    build: Callable[[], nn.Module], shape: tuple[int, ...], n: int
) -> None:
    parameters = assert_stages_equal_the_whole(build().double(), rows_of(*shape), n)
    assert len(parameters) == n
    assert all(parameters)
    for i, names in enumerate(parameters):
        assert all(names.isdisjoint(others) for others in parameters[:i])


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bert", "ViT"])
def test_transformers_are_cut_into_stages_without_rewriting(name: str, n: int) -> None:
    model, _ = hugging(name)
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(96, (5, 6), generator=generator)
    image = torch.randn(5, 3, 8, 8, generator=generator).double()

    def make(rows: int) -> tuple[int, Callable[[nn.Module], Any]]:
        takes = {"pixel_values": image[:rows]} if name == "ViT" else {"input_ids": words[:rows]}
        return rows, lambda made: made(**takes).logits

    parameters = assert_stages_equal_the_whole(model, make, n)
    sizes = {k: p.numel() for k, p in model.named_parameters()}
    assert max(sum(map(sizes.__getitem__, names)) for names in parameters) < sum(sizes.values())


def test_a_model_with_too_few_places_to_cut_is_refused_with_those_it_has() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).double()
    recording = record(model, rows_of(4)(2)[1])
    assert [each.module for each in find_boundaries(recording)] == ["1", "2"]
    with pytest.raises(PlanError, match=r"has 2: 1, 2.*pipe\(3\)"):
        cut_stages(recording, 4, [1.0, 1.0, 1.0])
