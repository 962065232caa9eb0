"""Gradients of stages are final, and fused, before the whole pipeline has ended."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from test_training_split import CASES, assert_near
from torch import Tensor
from training_cases import session, train, under

from allfuse.fusion import Fuser
from allfuse.job import Stop
from allfuse.plan.schedule import SCHEDULES, Action
from allfuse.split.pipe.courier import greet
from allfuse.split.pipe.pipeline import Pipeline, _Pass
from allfuse.training.loop import train_job

DEADLINE_S = 20.0


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zero_bubble"])
def test_a_stage_s_gradients_are_fused_while_another_stage_still_works(
    schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first stage's last work waits until the last stage's gradients are on their way."""
    leaving, in_time = threading.Event(), []
    start = Fuser.start

    def watched(self: Fuser, block: Tensor, operation: str, **more: Any) -> Any:
        if self.link.members == (1, 3) and operation.startswith("fuse gradients"):
            leaving.set()
        return start(self, block, operation, **more)

    def held_up(name: str) -> None:
        inner = getattr(_Pass, name)

        def work(self: _Pass, action: Action, *more: Any) -> None:
            if action.stage == 0 and action.microbatch == 2:
                in_time.append(leaving.wait(DEADLINE_S))
            inner(self, action, *more)

        monkeypatch.setattr(_Pass, name, work)

    monkeypatch.setattr(Fuser, "start", watched)
    held_up("weights" if schedule == "zero_bubble" else "backward")
    made = CASES["mlp"].job(stop=Stop(steps=1))
    train(made, f"data(2) * pipe(2, schedule={schedule}, microbatches=3)")
    assert in_time == [True, True]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["tied", "uneven"])
def test_each_gradient_is_told_once_and_does_not_change_after(
    name: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Tensor | None] = {}
    compared: list[str] = []
    learn = Pipeline.learn

    def watched(self: Pipeline, *args: Any) -> None:
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        names, parameters = [*named], [*named.values()]

        def final(index: int) -> None:
            assert names[index] not in told
            gradient = parameters[index].grad
            told[names[index]] = None if gradient is None else gradient.clone()

        told.clear()
        if self.link.rank == 0:
            self.finality._told.clear()
            self.finality.watch(parameters, final)
        learn(self, *args)
        if self.link.rank == 0:
            assert told.keys() == named.keys() - self.shared.keys()
            for key, value in told.items():
                gradient = named[key].grad
                assert (value is None) == (gradient is None)
                assert value is None or torch.equal(value, gradient)
                compared.append(key)

    monkeypatch.setattr(Pipeline, "learn", watched)
    train(CASES[name].job(stop=Stop(steps=2)), f"pipe(2, schedule={schedule})")
    assert len(compared) >= 4


def test_rules_that_want_to_know_the_count_wait_for_it() -> None:
    made = CASES["tied"].job(stop=Stop(steps=3), clip=None)
    whole = train(made, "data(3, rule=median)")[0].weights
    assert_near(train(made, "data(3, rule=median) * pipe(2)")[0].weights, whole)


def test_ranks_that_share_a_stage_end_equal_where_gradients_travel_early() -> None:
    """Weights that stages of several ranks use are not final before these have told each other."""

    def work() -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {}

        def keep(s: Any, _: Any) -> None:
            (model,) = s.models.values()
            for name, p in model.named_parameters():
                if p.requires_grad:
                    weights[f"{s.place.pipe.rank}.{name}"] = p.detach().clone()

        train_job(CASES["tied"].job(stop=Stop(steps=4)), prepare=lambda s: s.on("step", keep))
        return weights

    found = under("data(2, topology=ring) * pipe(2)", work)
    for first, second in ((0, 2), (1, 3)):
        assert found[first].keys() == found[second].keys()
        for name, value in found[first].items():
            assert torch.equal(value, found[second][name]), name


@pytest.mark.parametrize("n", [2, 3])
def test_stages_greet_each_other_all_at_once(n: int) -> None:
    """Each asks every other for both ways before anybody waits, and nobody is left waiting."""

    def work() -> list[str]:
        with session() as s:
            link, done = s.place.pipe, []
            for name in ("send", "receive"):
                inner = getattr(link, name)

                def noted(*args: Any, inner: Any = inner, name: str = name) -> Any:
                    done.append(name)
                    return Waited(inner(*args), done)

                vars(link)[name] = noted
            greet(link, torch.device("cpu"))
            return done

    for done in under(f"pipe({n})", work):
        assert done == ["send", "receive"] * (n - 1) + ["wait"] * 2 * (n - 1)


class Waited:
    """Notes that somebody waits."""

    def __init__(self, work: Any, done: list[str]) -> None:
        self.work, self.done = work, done

    def wait(self) -> None:
        self.done.append("wait")
        self.work.wait()
