"""Blocks of a model that is cut go through torch.compile, and learn what they learn without."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sliced import GatedUnit, Residual
from test_training_split import Case, assert_near, figures, recorded
from torch import nn
from training_cases import train

from allfuse.base.errors import PlanError, UserError
from allfuse.job import Job, Stop
from allfuse.launcher.local import launch_local
from allfuse.training.loop import train_job

# which compilers hush by themselves, but not on several threads at once
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def deep() -> nn.Module:
    """Blocks that are small beside the model, so that shards bring each together as one."""
    blocks = [Residual(nn.LayerNorm(8), GatedUnit(8, 16)) for _ in range(14)]
    return nn.Sequential(*blocks, nn.Linear(8, 4))


def shallow() -> nn.Module:
    """Blocks within which shards bring parts together."""
    blocks = [Residual(nn.LayerNorm(8), GatedUnit(8, 16), nn.Dropout(0.0)) for _ in range(3)]
    return nn.Sequential(nn.Linear(6, 8), *blocks, nn.Linear(8, 4))


CASES = {"deep": Case(deep, (8,), (), 4), "shallow": Case(shallow, (6,), (), 4)}


def made(name: str, **changes: Any) -> Job:
    return CASES[name].job(stop=Stop(steps=3), **changes)


@functools.cache
def alone(name: str) -> Any:
    results, told = recorded(made(name), "data(1)")
    return results[0].weights, figures(told[0])


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many calls each program has that was made. They run as torch runs them."""
    found: list[int] = []

    def take(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        found.append(sum(node.op.startswith("call") for node in graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=take))
    torch.compiler.reset()
    return found


AXES = ("tensor(2)", "shard(2)", "pipe(2)")
PRODUCTS = (
    "data(2) * tensor(2)",
    "shard(2) * tensor(2)",
    "pipe(2, schedule=interleaved(2), microbatches=2)",
)


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        *(("shallow", plan) for plan in AXES),
        *(pytest.param("shallow", plan, marks=pytest.mark.slow) for plan in PRODUCTS),
        *(pytest.param("deep", plan, marks=pytest.mark.slow) for plan in AXES + PRODUCTS),
    ],
)
def test_compiled_blocks_learn_what_one_process_learns(
    name: str, plan: str, graphs: list[int]
) -> None:
    results, told = recorded(made(name, compile=True), plan)
    weights, expected = alone(name)
    assert_near(results[0].weights, weights)
    for own, other in zip(figures(told[0]), expected, strict=True):
        assert own == pytest.approx(other, rel=1e-9)
    assert max(graphs) > 1


@pytest.mark.slow
@pytest.mark.parametrize("plan", AXES)
def test_compiled_blocks_that_run_again_learn_the_same(plan: str, graphs: list[int]) -> None:
    results, _ = recorded(made("deep", compile=True, recompute=True), plan)
    assert_near(results[0].weights, alone("deep")[0])
    assert graphs


@pytest.mark.slow
@pytest.mark.parametrize("plan", AXES)
def test_blocks_that_inductor_compiles_learn_the_same_to_rounding(plan: str) -> None:
    """In processes: torch's compiler may crash where several threads run what it makes."""
    job = made("deep", compile=True)
    result = launch_local(lambda: train_job(job), 2, plan=plan, timeout_s=300)
    for key, value in alone("deep")[0].items():
        torch.testing.assert_close(result.weights[key], value, rtol=1e-8, atol=1e-9, msg=key)


def test_a_run_keeps_how_many_blocks_were_compiled(graphs: list[int]) -> None:
    _, told = recorded(made("shallow", compile=True), "pipe(2)")
    (start,) = told[0].named("start")
    assert start.data["choices"]["compile"] == "3 blocks are compiled, each by itself"


def test_models_without_blocks_that_repeat_are_refused() -> None:
    plain = Case(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), (6,), (), 4)
    with pytest.raises(UserError, match=r"compile=True: Sequential has no blocks that repeat"):
        train(plain.job(compile=True), "tensor(2)")


def test_schedules_that_find_gradients_in_two_turns_are_refused() -> None:
    with pytest.raises(PlanError, match=r"compile=True has a block.*1f1b, gpipe or interleaved"):
        train(made("shallow", compile=True), "pipe(2, schedule=zero_bubble)")
