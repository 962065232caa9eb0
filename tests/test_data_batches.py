from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
)

from allfuse.base.errors import DataError
from allfuse.split.data import BatchPlan, SamplerPlan, Source, as_source, plan_batches


def epoch_of(plan: BatchPlan | SamplerPlan, epoch: int = 0, first_step: int = 0) -> list[list[int]]:
    return [batch.tolist() for batch in plan.batches(epoch, first_step)]


def source_of(data: Any) -> Source:
    source = as_source(data)
    assert isinstance(source, Source)
    return source


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 50, 64])
def test_every_sample_is_used_once_and_only_the_last_batch_is_smaller(
    batch_size: int, shuffle: bool
) -> None:
    for samples in range(1, 51):
        batches = epoch_of(BatchPlan(samples, batch_size, 3, shuffle), 2)
        assert sorted(chain(*batches)) == list(range(samples))
        assert all(len(batch) == batch_size for batch in batches[:-1])
        assert len(batches) == BatchPlan(samples, batch_size, 3).steps_per_epoch


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_drop_last_leaves_out_less_than_a_batch_and_repeats_nothing(batch_size: int) -> None:
    for samples in range(batch_size, 51):
        plan = BatchPlan(samples, batch_size, 0, drop_last=True)
        batches = epoch_of(plan)
        used = list(chain(*batches))
        assert all(len(batch) == batch_size for batch in batches)
        assert len(used) == len(set(used)) == samples - samples % batch_size
        assert len(batches) == plan.steps_per_epoch


def test_any_step_can_be_asked_for_alone() -> None:
    plan = BatchPlan(50_003, 7, seed=1)  # more than is computed ahead at once
    batches = epoch_of(plan, 4)
    for step in (0, 1, 2340, 2341, 7000, len(batches) - 1):
        assert plan.indices(4, step).tolist() == batches[step]
    with pytest.raises(IndexError):
        plan.indices(4, len(batches))


@pytest.mark.parametrize("first_step", [0, 1, 2, 5, 6, 7])
def test_going_on_from_a_step_gives_the_rest_of_the_epoch(first_step: int) -> None:
    plan = BatchPlan(20, 3, seed=5)
    assert epoch_of(plan, 1, first_step) == epoch_of(plan, 1)[first_step:]


def test_the_order_depends_on_seed_and_epoch() -> None:
    orders = [epoch_of(BatchPlan(100, 10, seed), epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert epoch_of(BatchPlan(100, 10, 0), 0) == orders[0]


def test_a_million_million_samples_cost_no_memory() -> None:
    tracemalloc.start()
    batches = BatchPlan(10**12, 256, seed=0).batches(0, first_step=3 * 10**9)
    seen = np.concatenate([next(batches) for _ in range(100)])
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(np.unique(seen)) == 25_600
    assert peak_bytes < 3_000_000


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"samples": 0, "batch_size": 2}, "empty"),
        ({"samples": 5, "batch_size": 0}, "batch_size is 0"),
        ({"samples": 5, "batch_size": 6, "drop_last": True}, "drop_last leaves no batch"),
    ],
)
def test_a_plan_without_batches_is_refused(arguments: dict[str, Any], part: str) -> None:
    with pytest.raises(DataError, match=part):
        BatchPlan(seed=0, **arguments)


DATA = TensorDataset(torch.arange(10.0), torch.arange(10))


def test_a_data_loaders_settings_become_the_plan() -> None:
    source = source_of(DataLoader(DATA, batch_size=4, shuffle=True, drop_last=True))
    assert plan_batches(source, seed=6) == BatchPlan(10, 4, 6, True, True)
    source = source_of(DataLoader(DATA, batch_size=4))
    assert plan_batches(source) == BatchPlan(10, 4, 0, False, False)


def test_what_is_said_to_the_plan_goes_before_the_data_loader() -> None:
    source = source_of(DataLoader(DATA, batch_size=4, shuffle=True))
    found = plan_batches(source, batch_size=3, shuffle=False, drop_last=True)
    assert found == BatchPlan(10, 3, 0, False, True)


def test_a_plain_batch_sampler_is_read_like_its_arguments() -> None:
    loader = DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 5, True))
    assert plan_batches(source_of(loader)) == BatchPlan(10, 5, 0, True, True)


def test_without_any_batch_size_it_is_asked_for() -> None:
    with pytest.raises(DataError, match="batch_size is missing"):
        plan_batches(source_of(DATA))


def weighted(generator: torch.Generator | None) -> WeightedRandomSampler:
    return WeightedRandomSampler([0.0, 0.0, 1.0, 1.0, 1.0], 100, generator=generator)


class Drawing(Sampler[int]):
    """Draws each index when it is asked for, from a generator of the process."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw

    def __iter__(self) -> Iterator[int]:
        for _ in range(300):
            yield int(self.draw())


SAMPLERS = {
    "weighted": lambda: weighted(None),
    "weighted with a generator": lambda: weighted(torch.Generator()),
    "with replacement": lambda: RandomSampler(DATA, replacement=True, num_samples=300),
    "some": lambda: RandomSampler(DATA, num_samples=5),
    "python": lambda: Drawing(lambda: random.randrange(10)),
    "numpy": lambda: Drawing(lambda: np.random.randint(10)),
    "torch": lambda: Drawing(lambda: torch.randint(10, (1,))),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_of_ones_own_gives_every_replica_the_same_batches(name: str) -> None:
    def plan() -> SamplerPlan:
        loader = DataLoader(DATA, batch_size=2, sampler=SAMPLERS[name]())
        found = plan_batches(source_of(loader), seed=9)
        assert isinstance(found, SamplerPlan)
        return found

    first = epoch_of(plan(), 3)
    torch.rand(7), random.random(), np.random.rand()  # another replica is elsewhere
    other = plan()
    assert epoch_of(other, 3) == first
    assert epoch_of(other, 3, first_step=2) == first[2:]
    assert epoch_of(other, 4) != first
    assert other.steps_per_epoch == (None if isinstance(SAMPLERS[name](), Drawing) else len(first))


def test_a_samplers_draws_do_not_move_the_processs_generators() -> None:
    def states() -> tuple[Any, ...]:
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    before = states()
    for draw in (random.random, np.random.rand, lambda: torch.rand(1)):
        for _ in SamplerPlan(BatchSampler(Drawing(draw), 2, False), 0).batches(0):
            assert states() == before


def test_a_batch_sampler_of_ones_own_keeps_its_batches() -> None:
    lists = [[0, 1, 2], [5], [2, 2]]
    source = source_of(DataLoader(DATA, batch_sampler=lists))
    plan = plan_batches(source)
    assert epoch_of(plan) == lists
    assert plan.steps_per_epoch == 3
    assert "sampler decides" in source.promise


@pytest.mark.parametrize("arguments", [{"batch_size": 4}, {"shuffle": True}, {"drop_last": True}])
def test_what_a_batch_sampler_decides_cannot_be_given(arguments: dict[str, Any]) -> None:
    source = source_of(DataLoader(DATA, batch_sampler=[[0], [1]]))
    with pytest.raises(DataError, match="brings its own sampler"):
        plan_batches(source, **arguments)


def test_a_sampler_that_gives_no_indices_is_explained() -> None:
    plan = plan_batches(source_of(DataLoader(DATA, batch_sampler=[["a"]])))
    with pytest.raises(DataError, match=r"\['a'\]"):
        epoch_of(plan)


def test_set_epoch_reaches_a_sampler_of_ones_own() -> None:
    class Shifted(Sampler[int]):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[int]:
            return iter([self.epoch, self.epoch + 1])

    plan = plan_batches(source_of(DataLoader(DATA, batch_size=2, sampler=Shifted())))
    assert [epoch_of(plan, epoch) for epoch in (0, 3)] == [[[0, 1]], [[3, 4]]]
