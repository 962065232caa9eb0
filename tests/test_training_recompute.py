"""Blocks that run again in the backward pass: the same numbers, in less memory."""

from __future__ import annotations

import pytest
import torch
from sliced import Residual
from test_training_split import CASES, Case, Words, alone, assert_near, figures, heavy, recorded
from torch import nn
from training_cases import TIGHT, assert_equal, session, train

from allfuse.base.errors import PlanError, UserError
from allfuse.job import Stop
from allfuse.split.recompute import recompute_blocks, repeated_blocks


def blocks() -> nn.Module:
    """Running statistics are those of one pass, though each block runs twice."""
    layers = (Residual(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh()) for _ in range(3))
    return nn.Sequential(*layers, nn.Linear(6, 4))


CASES |= {"blocks": Case(blocks, (6,), (), 4, optimizer=heavy)}


PLANS = ("data(1)", "data(2)", "tensor(2)", "shard(2)", "shard(2) * tensor(2)", "pipe(2)")


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["tied", "blocks"])
def test_the_numbers_are_those_of_a_model_that_keeps_everything(name: str, plan: str) -> None:
    if (name, plan) == ("blocks", "pipe(2)"):
        pytest.skip("pipe has no statistics of the whole batch")
    result, expected = alone(name)
    results, told = recorded(CASES[name].job(recompute=True), plan)
    for events in told:
        torch.testing.assert_close(figures(events), expected, **TIGHT)
    assert_near(results[0].weights, result.weights)


def test_dropout_draws_the_same_numbers_again() -> None:
    def build() -> nn.Module:
        model = Words()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
        return model

    made = Case(build, (5,), (5,), 24, words=24)
    expected = train(made.job(stop=Stop(steps=6)), "data(1)")[0]
    result = train(made.job(stop=Stop(steps=6), recompute=True), "data(1)")[0]
    assert_equal(result.weights, expected.weights, exact=True)
    assert result.loss != train(made.job(stop=Stop(steps=6), seed=1), "data(1)")[0].loss


def test_codecs_and_gradients_that_add_up_see_each_gradient_once() -> None:
    made = CASES["tied"].job(stop=Stop(steps=6), accumulate=2)
    again = CASES["tied"].job(stop=Stop(steps=6), accumulate=2, recompute=True)
    plan = "data(2, codec=topk(0.2))"
    assert_equal(train(again, plan)[0].weights, train(made, plan)[0].weights)


def test_of_activations_only_what_goes_into_a_block_is_kept() -> None:
    x = torch.randn(5, 6)

    def kept(model: nn.Module) -> int:
        found: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            found.append(tensor.untyped_storage().nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(x)
        return sum(found)

    plain, again = blocks(), blocks()
    recompute_blocks(again)
    assert kept(again) < kept(plain) / 3


def test_blocks_are_layers_wherever_they_lie() -> None:
    assert repeated_blocks(Words()) == ["trunk.layers.0", "trunk.layers.1"]
    assert repeated_blocks(blocks()) == ["0", "1", "2"]


def test_a_model_without_blocks_is_refused_with_what_can_be() -> None:
    with (
        session(recompute=True) as s,
        pytest.raises(UserError, match=r"no blocks that repeat.*accumulate="),
    ):
        s.model(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))


def test_gradients_in_two_parts_are_refused_with_the_schedules_that_can() -> None:
    made = CASES["tied"].job(recompute=True)
    with pytest.raises(PlanError, match=r"recompute=True.*schedule=1f1b, gpipe or interleaved"):
        train(made, "pipe(2, schedule=zero_bubble)")
