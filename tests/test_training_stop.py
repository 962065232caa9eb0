"""When training ends: all ranks after the same step, and for the reason that is told."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_cases import Recorded, job, points, train, workers_of

from allfuse.base.errors import Interrupted
from allfuse.job import Stop, on
from allfuse.launcher.thread import launch_threads
from allfuse.store.checkpoint import Checkpoints
from allfuse.training import stopping
from allfuse.training.loop import train_job

PLANS = ("data(1)", "data(2)", "site(2, every=2)")


def ends(plan: str, **changes: Any) -> list[tuple[int, str]]:
    return [(result.steps, result.reason) for result in train(job(**changes), plan)]


@pytest.mark.parametrize("plan", PLANS)
def test_training_ends_after_so_many_steps_or_epochs(plan: str) -> None:
    assert set(ends(plan, stop=Stop(steps=5))) == {(5, "5 steps are done")}
    assert set(ends(plan, stop=Stop(epochs=3))) == {(12, "3 epochs are done")}
    assert set(ends(plan, stop=Stop(epochs=3, steps=7))) == {(7, "7 steps are done")}
    assert set(ends(plan, stop=Stop(epochs=1, steps=7))) == {(4, "1 epoch is done")}


@pytest.mark.parametrize("plan", PLANS)
def test_training_ends_when_the_target_is_reached(plan: str) -> None:
    def first_weight(outputs: Any, batch: Any) -> float:
        return 0.5

    reached = ends(
        plan,
        validation=points(4),
        metrics={"value": first_weight},
        evaluate_every=2,
        stop=Stop(epochs=9, target=0.5),
    )
    assert set(reached) == {(2, "the target 0.5 is reached")}
    lower = ends(
        plan,
        validation=points(4),
        metrics={"value": first_weight},
        monitor="-value",
        evaluate_every=2,
        stop=Stop(epochs=2, target=0.4),
    )
    assert set(lower) == {(8, "2 epochs are done")}


@pytest.mark.parametrize("plan", PLANS)
def test_training_ends_when_nothing_gets_better_any_more(plan: str) -> None:
    def constant(outputs: Any, batch: Any) -> float:
        return 1.0

    found = ends(
        plan,
        validation=points(4),
        metrics={"value": constant},
        evaluate_every=1,
        stop=Stop(epochs=9, patience=3),
    )
    assert set(found) == {(4, "no improvement for 3 evaluations")}


def test_a_figure_that_is_nan_is_never_better() -> None:
    found = ends(
        "data(1)",
        validation=points(4),
        metrics={"value": lambda outputs, batch: float("nan")},
        evaluate_every=1,
        stop=Stop(epochs=9, patience=3),
    )
    assert found == [(3, "no improvement for 3 evaluations")]


@pytest.mark.parametrize("plan", PLANS)
def test_ranks_whose_clocks_differ_end_after_the_same_step(
    plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every look at the clock is 1 s later; ranks look in turn, so theirs differ."""
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: float(next(ticks)))
    monkeypatch.setattr(stopping, "time", clock)
    found = ends(plan, stop=Stop(seconds=12, epochs=500), train=points(60))
    assert len({steps for steps, _ in found}) == 1
    assert found[0][0] < 40
    assert "12 seconds have passed" in [reason for _, reason in found]


@pytest.mark.parametrize("plan", ["data(2)", "data(3)"])
def test_one_rank_may_stop_all_from_a_hook(plan: str) -> None:
    def tired(s: Any, event: Any) -> None:
        if s.rank == 1 and event.step == 3:
            s.stop("tired")

    found = ends(plan, hooks=[on("step", tired)], stop=Stop(epochs=9))
    assert {steps for steps, _ in found} == {4}
    assert found[1][1] == "tired"


def test_what_every_rank_finds_ends_training_at_once() -> None:
    def enough(s: Any, event: Any) -> None:
        if event.step == 3:
            s.end("all agree")

    assert ends("data(2)", hooks=[on("step", enough)]) == [(3, "all agree")] * 2


def test_the_first_reason_counts() -> None:
    def enough(s: Any, event: Any) -> None:
        s.end(f"step {event.step}")

    recorded = Recorded()
    made = job(hooks=[on("step", enough)], stop=Stop(steps=1))
    (result,) = train(made, prepare=recorded.attach)
    assert result.reason == "step 1"
    (end,) = recorded.named("end")
    assert end.data["reason"] == "step 1"
    assert end.data["steps"] == 1


@pytest.mark.parametrize(("plan", "last"), [("data(2)", 3), ("site(2, every=2)", 2)])
def test_an_interrupt_ends_all_ranks_after_a_checkpoint(
    plan: str, last: int, tmp_path: Path
) -> None:
    def press(s: Any, event: Any) -> None:
        if s.rank == 1 and event.step == 2:
            s.place.world.stop_requested.set()

    out = tmp_path / "run"
    made = job(hooks=[on("step", press)], stop=Stop(epochs=9))
    results = launch_threads(lambda: train_job(made, out=out), workers_of(plan), plan=plan)
    assert all(isinstance(result, Interrupted) for result in results)
    assert f"interrupted after step {last}; the checkpoint of step {last} is" in str(results[0])
    assert Checkpoints(out / "checkpoints").steps()[0] == last


def test_the_rules_of_stopping_survive_a_resume() -> None:
    made = job(validation=points(4), stop=Stop(epochs=1, patience=2, seconds=100, target=9))
    first = stopping.Stopping(made)
    assert first.evaluated({"loss": 2.0}, 4)
    assert not first.evaluated({"loss": 3.0}, 8)
    second = stopping.Stopping(made)
    second.load_state_dict(first.state_dict())
    assert second.best == -2.0
    assert second.figures == {"loss": 3.0}
    assert second.score_at(8) == -3.0
    assert second.score_at(9) is None
    assert second.reason() == "the target 9 is reached"
    assert second.seconds < 100


def test_stopping_early_keeps_the_models_of_all_ranks_equal() -> None:
    results = train(job(stop=Stop(steps=5)), "site(3, every=4)")
    for other in results[1:]:
        for name, value in results[0].weights.items():
            assert torch.equal(value, other.weights[name])
