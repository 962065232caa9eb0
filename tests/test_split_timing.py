"""Where a model is cut into stages: by the time that its parts take, and the memory they need."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_cases import assert_equal, job, session, train, under

from allfuse.job import Stop
from allfuse.plan import Pipe
from allfuse.plan.schedule import SCHEDULES, count_held
from allfuse.split.pipe import choice
from allfuse.split.pipe.boundary import balance
from allfuse.split.pipe.choice import Choice, Trial, choose_stages
from allfuse.split.pipe.timing import Cost
from allfuse.split.record import record
from allfuse.store.run import RunFolder

CPU = torch.device("cpu")


class Clock:
    """Stands still but for what the layers below say that they take."""

    now_s = 0.0


class Slow(nn.Linear):
    """A layer that takes longer than its shapes say."""

    def __init__(self, width: int, seconds: float) -> None:
        super().__init__(width, width)
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor:
            Clock.now_s += self.seconds
        return super().forward(x)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: Clock.now_s)


def slow(*milliseconds: float) -> nn.Module:
    return nn.Sequential(*(Slow(6, each / 1e3) for each in milliseconds))


def run_on(rows: int) -> Callable[[nn.Module], Any]:
    return lambda model: model(torch.zeros(rows, 6))


def chosen(model: nn.Module, axis: Pipe, **changes: Any) -> Choice:
    trial = replace(Trial(8, run_on, CPU), **changes)
    return choose_stages(axis, model, record(model, run_on(2)), trial=trial)


def test_stages_take_as_long_where_shapes_say_something_else() -> None:
    found = chosen(slow(12, 4, 4, 4), Pipe(2))
    assert found.begins == [("1", 0)]
    assert found.seconds == pytest.approx([0.012, 0.012])
    assert found.how.endswith("ms for a microbatch, as timed")


def test_the_loss_is_in_the_time_of_the_last_stage() -> None:
    def lose(outputs: Tensor) -> Tensor:
        assert outputs.shape == (4, 6)
        Clock.now_s += 0.008
        return outputs.sum()

    found = chosen(slow(4, 4, 4, 4), Pipe(2, microbatches=2), lose=lambda rows: lose)
    assert found.begins == [("3", 0)]
    assert found.seconds == pytest.approx([0.012, 0.012])
    without = chosen(slow(4, 4, 4, 4), Pipe(2, microbatches=2))
    assert without.begins == [("2", 0)]


def test_a_model_that_takes_no_time_is_cut_by_its_shapes() -> None:
    found = chosen(slow(0.6, 0, 0, 0), Pipe(2))
    assert found.begins == [("2", 0)]
    assert len(found.seconds) == 2


def test_parts_that_are_alike_are_timed_once() -> None:
    ran: set[int] = set()

    class Notes(nn.Linear):
        number = 0

        def forward(self, x: Tensor) -> Tensor:
            if type(x) is Tensor:
                ran.add(self.number)
            return super().forward(x)

    model = nn.Sequential(*(Notes(6, 6) for _ in range(20)))
    for number, layer in enumerate(model):
        layer.number = number
    chosen(model, Pipe(2))
    assert ran == {0, 1, 19}


def test_timing_leaves_the_model_as_it_was() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.passes = nn.BatchNorm1d(6), 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            result: Tensor = self.norm(x)
            return result

    model = nn.Sequential(nn.Linear(6, 6), Counts(), nn.Linear(6, 6), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    same = [*model.parameters()]
    forwards = [vars(module).get("forward") for module in model.modules()]
    state = torch.get_rng_state()
    assert chosen(model, Pipe(2)).seconds == [0, 0]
    assert all(a is b for a, b in zip(same, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in same)
    assert_equal(dict(model.state_dict()), before, exact=True)
    assert forwards == [vars(module).get("forward") for module in model.modules()]
    assert model[1].passes == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_without_numbers_is_timed() -> None:
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
    for parameter in model.parameters():
        parameter.data = torch.zeros(()).expand(parameter.shape)
    found = chosen(model, Pipe(2))
    assert len(found.seconds) == 2
    assert all(parameter.untyped_storage().nbytes() == 4 for parameter in model.parameters())


def test_what_cannot_be_timed_is_cut_by_its_shapes_and_told() -> None:
    class Refuses(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if type(x) is Tensor:
                raise ValueError("random numbers are not for me")
            return super().forward(x)

    model = nn.Sequential(*(Refuses(6, 6) for _ in range(4)))
    found = chosen(model, Pipe(2))
    assert found.begins == [("2", 0)]
    assert "none could be timed: ValueError: random numbers are not for me" in found.how


def test_bytes_are_those_of_the_state_and_of_the_activations_in_flight() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 6), nn.Sigmoid())
    found = chosen(model, Pipe(2, microbatches=4))
    state, numbers = 4 * (6 * 6 + 6) * 4, 2 * 6 * 4
    assert found.begins == [("2", 0)]  # a map keeps what it takes, a sigmoid what it gives
    assert found.bytes == [state + 2 * 2 * numbers, state + 2 * numbers]


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_stage_holds_more_microbatches_than_there_are(name: str) -> None:
    schedule = SCHEDULES[name]()
    held = count_held(schedule.orders(3, 6))
    assert held.keys() == set(range(3 * schedule.each))
    assert max(held.values()) <= 6
    if name == "1f1b":
        assert held == {0: 3, 1: 2, 2: 1}
    if name == "gpipe":
        assert held == {0: 6, 1: 6, 2: 6}


def costs(seconds: Sequence[float], sizes: Sequence[int]) -> list[Cost]:
    return [Cost(s, 0.0, size, 0) for s, size in zip(seconds, sizes, strict=True)]


def test_memory_that_is_there_comes_before_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made = costs([1, 1, 1, 3], [70, 10, 10, 10])
    monkeypatch.setattr(choice, "_time", lambda *_: made)
    by_time, tight, none = (
        chosen(slow(0, 0, 0, 0), Pipe(2), room_bytes=room) for room in (None, 75, 60)
    )
    assert by_time.begins == [("3", 0)]
    assert tight.begins == none.begins == [("1", 0)]
    assert tight.bytes == [70, 30]
    assert "more than is free" in none.how
    assert "more than is free" not in tight.how


def test_shapes_decide_where_time_gains_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_time", lambda *_: costs([1, 1.01, 1.03, 1], [1] * 4))
    assert chosen(slow(0, 0, 0, 0), Pipe(2)).begins == [("2", 0)]
    monkeypatch.setattr(choice, "_time", lambda *_: costs([1, 1, 1.2, 1.2], [1] * 4))
    assert chosen(slow(0, 0, 0, 0), Pipe(2)).begins == [("2", 0)]
    monkeypatch.setattr(choice, "_time", lambda *_: costs([1, 1, 1, 3], [1] * 4))
    assert chosen(slow(0, 0, 0, 0), Pipe(2)).begins == [("3", 0)]


def test_the_dearest_run_is_as_cheap_as_any_cut_has_it() -> None:
    generator = torch.Generator().manual_seed(4)
    for parts in range(4, 9):
        times = torch.rand(parts, generator=generator).tolist()
        sums = [sum(times[:end]) for end in range(parts + 1)]
        found = balance(parts, 3, lambda _, i, j, s=sums: s[j] - s[i])

        def worst(begins: Sequence[int], s: list[float] = sums) -> float:
            ends = [0, *begins, len(s) - 1]
            return max(s[b] - s[a] for a, b in pairwise(ends))

        every = [(a, b) for b in range(2, parts) for a in range(1, b)]
        assert worst(found) == min(map(worst, every))


# In training.


def timed(**changes: Any) -> Any:
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
    model = functools.partial(slow, 9, 3, 3, 3)
    return job(model=model, train=(x, x), batch_size=8, **changes)


def test_all_ranks_cut_where_the_first_one_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_time", lambda *_: costs([9, 3, 3, 3], [1] * 4))

    def work() -> list[tuple[str, int]]:
        with session() as s:
            made = timed()
            model = s.model(made.model)
            s.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
            for batch in s.batches(made.train, 8, steps=1):
                s.step(batch, made.loss)
            return list(s.split.begins)

    assert under("data(2) * pipe(2)", work) == [[("1", 0)]] * 4


def test_a_job_s_loss_is_timed_on_its_own_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_loss(outputs: Tensor, batch: Any) -> Tensor:
        if len(outputs) == 4:  # of a microbatch, and not of an accumulated one
            Clock.now_s += 0.018
        return (outputs - batch[1]).square().mean()

    recorded: list[list[float]] = []
    time_parts = choice.time_parts

    def note(*args: Any, **options: Any) -> list[Cost]:
        found = time_parts(*args, **options)
        recorded.append([each.pass_s for each in found])
        return found

    monkeypatch.setattr(choice, "time_parts", note)
    train(timed(loss=slow_loss, stop=Stop(steps=1)), "pipe(2, microbatches=2)")
    (seconds,) = recorded
    assert seconds == pytest.approx([0.009, 0.003, 0.003, 0.021])


def test_a_run_goes_on_with_the_stages_that_were_timed_when_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plan = tmp_path / "run", "data(2) * pipe(2, microbatches=2)"
    monkeypatch.setattr(choice, "_time", lambda *_: costs([9, 3, 3, 3], [1] * 4))
    straight = train(timed(stop=Stop(steps=4)), plan)[0].weights
    train(timed(stop=Stop(steps=2), save_every=2), plan, out=out)
    assert RunFolder.open(out).record["stages"] == {"pipe(2, microbatches=2)": [["1", 0]]}
    assert "as timed; cut before 1" in RunFolder.open(out).record["choices"]["pipe"]
    monkeypatch.setattr(choice, "_time", lambda *_: costs([3, 3, 3, 9], [1] * 4))
    result = train(timed(stop=Stop(steps=4), save_every=2), plan, out=out, resume=True)[0]
    assert RunFolder.open(out).record["stages"] == {"pipe(2, microbatches=2)": [["1", 0]]}
    assert_equal(result.weights, straight, exact=True)
    train(timed(stop=Stop(steps=5), save_every=2), "pipe(2)", out=out, resume=True)
    assert RunFolder.open(out).record["stages"]["pipe(2)"] == [["3", 0]]
