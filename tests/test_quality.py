"""Models train under plans as well as in one process, and the check of that can fail."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from allfuse.codec import CODECS
from allfuse.fusion.fuser import Fuser
from allfuse.plan import as_plan
from allfuse.topology import TOPOLOGIES
from allfuse.topology.gossip import GRAPHS, Gossip

ROOT = Path(__file__).resolve().parent.parent
LOSSY = ["data(4, codec=topk(0.1))", "data(4, codec=sign)"]


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "benchmarks")])
    return importlib.import_module("quality")


@pytest.mark.slow
def test_digits_train_across_processes_as_well_as_in_one(quality: ModuleType) -> None:
    plans = [
        "data(4, topology=ring)",
        "data(4, topology=tree(double))",
        "site(4, topology=gossip(matching))",
        "data(4, codec=int4)",
        "data(4, codec=lowrank(4))",
        *LOSSY,
    ]
    for figure in quality.compare(quality.DIGITS_SGD, plans):
        assert figure.ok, (figure.name, figure.value, figure.floor)


@pytest.mark.slow
def test_exact_topologies_train_as_well_by_the_optimizer_of_the_example(
    quality: ModuleType,
) -> None:
    for figure in quality.compare(quality.DIGITS, ["data(4, topology=halving)"]):
        assert figure.ok, (figure.name, figure.value, figure.floor)
        assert abs(figure.value) < 0.5


@pytest.mark.slow
def test_warm_rounds_bring_lowrank_to_its_target_by_the_optimizer_of_the_example(
    quality: ModuleType,
) -> None:
    plans = ["data(4, codec=lowrank(4, warm=10))", "data(4, codec=lowrank(4))"]
    warm, cold = quality.compare(quality.DIGITS, plans)
    assert warm.ok, (warm.value, warm.floor)
    assert not cold.ok, (cold.value, cold.floor)


def reached_without_feedback(task: Any, plan: str, seed: int, steps: int) -> float:
    """As `reached`, by a fuser that forgets what was not sent. Runs in each worker."""
    whole = Fuser.start

    def forgets(self: Fuser, block: Any, operation: str, **keywords: Any) -> Any:
        if (memory := keywords.get("memory")) is not None:
            memory.residual.zero_()
        return whole(self, block, operation, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fuser, "start", forgets)
        found: float = importlib.import_module("quality").reached(task, plan, seed, steps)
        return found


@pytest.mark.slow
def test_training_without_error_feedback_is_found(quality: ModuleType) -> None:
    task = quality.DIGITS_SGD
    for figure in quality.compare(task, LOSSY, reach=reached_without_feedback):
        assert not figure.ok, (figure.name, figure.value, figure.floor)


def test_curves_are_compared_where_their_mean_has_made_its_share(quality: ModuleType) -> None:
    rising = [
        [(0, 0.1), (5, 0.5), (10, 0.95), (15, 1.1)],
        [(0, 0.1), (5, 0.7), (10, 1.09), (15, 1.1)],
    ]
    assert quality.compared_at(rising) == (10, [0.95, 1.09])
    falling = [[(0, 5.0), (20, 4.0), (40, 2.0), (60, 1.9)]]
    assert quality.compared_at(falling) == (40, [2.0])


def test_a_plan_that_is_too_far_behind_misses_its_target(quality: ModuleType) -> None:
    one = [0.90, 0.89, 0.91]
    near, far = [0.90, 0.88, 0.90], [0.90, 0.87, 0.89]
    assert quality.figure(quality.DIGITS, "data(4)", near, one, 20).ok
    assert not quality.figure(quality.DIGITS, "data(4)", far, one, 20).ok
    assert quality.figure(quality.CHARACTERS, "data(4)", [2.03], [2.0], 100).ok
    assert not quality.figure(quality.CHARACTERS, "data(4)", [2.05], [2.0], 100).ok


def test_every_exact_topology_is_among_the_plans(quality: ModuleType) -> None:
    for name, topology in TOPOLOGIES.items():
        if topology.exact:
            assert f"data(4, topology={name})" in quality.SUMS


def test_every_codec_and_every_graph_is_among_the_plans(quality: ModuleType) -> None:
    axes = [as_plan(plan).axes[0] for plan in quality.LOSSY]
    assert {axis.codec.name for axis in axes} == set(CODECS)  # gossip has no codec
    graphs = {axis.topology.graph for axis in axes if isinstance(axis.topology, Gossip)}
    assert graphs == set(GRAPHS)
    for task in (quality.DIGITS, quality.CHARACTERS, quality.DIGITS_SGD, quality.CHARACTERS_SGD):
        codecs = [as_plan(plan).axes[0].codec for plan in task.warmed]
        assert {codec.warm for codec in codecs} == set(task.warm)
        assert len(codecs) == len(task.warm) * len(quality.SLOW)
