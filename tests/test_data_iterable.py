from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from allfuse.base.errors import DataError
from allfuse.split.data import IterableLoader, Portion, Stream, as_source


class Count(IterableDataset[int]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.size))


class Sharded(Count):
    """Cuts itself; shards differ in length by up to one."""

    def __init__(self, size: int, parts: int = 1, index: int = 0) -> None:
        super().__init__(size)
        self.parts, self.index = parts, index

    def shard(self, parts: int, index: int) -> Sharded:
        return Sharded(self.size, parts, index)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.index, self.size, self.parts))


class Agreement:
    """What each replica says is known to all once all have said it."""

    def __init__(self, parts: int) -> None:
        self.said = [0] * parts
        self.barrier = threading.Barrier(parts, timeout=30)

    def of(self, index: int) -> Callable[[int], tuple[int, ...]]:
        def agree(rows: int) -> tuple[int, ...]:
            self.said[index] = rows
            self.barrier.wait()
            found = tuple(self.said)
            self.barrier.wait()
            return found

        return agree


def run(data: Any, parts: int, batch_size: int, **arguments: Any) -> list[list[Portion]]:
    """The portions of every step of an epoch, one for each replica."""
    agreement = Agreement(parts)
    first_step = arguments.pop("first_step", 0)
    epoch = arguments.pop("epoch", 0)

    def replica(index: int) -> list[Portion]:
        source = as_source(data)
        assert isinstance(source, Stream)
        loader = IterableLoader(
            source, batch_size, parts=parts, index=index, agree=agreement.of(index), **arguments
        )
        try:
            return list(loader.epoch(epoch, first_step))
        except BaseException:
            agreement.barrier.abort()
            raise

    with ThreadPoolExecutor(parts) as pool:
        columns = list(pool.map(replica, range(parts)))
    return [list(portions) for portions in zip(*columns, strict=True)]


def used(portions: list[Portion]) -> list[int]:
    return sorted(sample for p in portions if p.rows for sample in p.batch.tolist())


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 8])
def test_every_sample_is_used_exactly_once_and_in_the_same_step(
    parts: int, batch_size: int
) -> None:
    for size in (1, 2, 3, 7, 8, 9, 24):
        steps = run(Count(size), parts, batch_size)
        whole = [list(range(size))[i : i + batch_size] for i in range(0, size, batch_size)]
        assert [used(portions) for portions in steps] == whole
        for step, portions in enumerate(steps):
            for index, portion in enumerate(portions):
                assert portion.shares == portions[0].shares
                assert portion.rows == portion.shares[index]
                assert (portion.step, portion.last) == (step, step == len(steps) - 1)
                assert len(portion.batch) == max(portion.rows, 1)  # a stand-in has one sample


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_data_set_that_cuts_itself_is_used_exactly_once(parts: int) -> None:
    for size in (3, 7, 12, 13):
        steps = run(Sharded(size), parts, 4)
        assert sorted(sum(map(used, steps), [])) == list(range(size))  # noqa: RUF017
        assert [portions[0].last for portions in steps][-1]


def test_a_replica_whose_shard_ended_stands_in_with_its_last_sample() -> None:
    class Uneven(Sharded):
        def shard(self, parts: int, index: int) -> Any:
            return Count(6 if index == 0 else 1)

    steps = run(Uneven(0), 2, 4)
    assert [portions[0].shares for portions in steps] == [(2, 1), (2, 0), (2, 0)]
    assert [portions[1].batch.tolist() for portions in steps] == [[0], [0], [0]]


def test_an_empty_shard_is_explained() -> None:
    with pytest.raises((DataError, threading.BrokenBarrierError)) as caught:
        run(Sharded(1), 2, 2)
    if isinstance(caught.value, DataError):
        assert "replica 1 of 2 got no sample" in str(caught.value)


@pytest.mark.parametrize("data", [Count(23), Sharded(23)])
@pytest.mark.parametrize("parts", [1, 2])
def test_going_on_skips_what_was_used(data: Any, parts: int) -> None:
    whole = [used(portions) for portions in run(data, parts, 4)]
    for first_step in range(1, len(whole)):
        assert [used(p) for p in run(data, parts, 4, first_step=first_step)] == whole[first_step:]


def test_drop_last_ends_before_the_batch_that_is_not_full() -> None:
    steps = run(Count(11), 2, 4, drop_last=True)
    assert [used(portions) for portions in steps] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [portions[0].last for portions in steps] == [False, True]


class Shuffled(Count):
    def __iter__(self) -> Iterator[int]:
        rest = list(range(self.size))
        while rest:
            yield rest.pop(random.randrange(len(rest)))
            torch.rand(1)


def test_a_stream_that_draws_is_the_same_on_every_replica_and_after_a_restart() -> None:
    steps = [used(portions) for portions in run(Shuffled(20), 2, 4, seed=5)]
    random.random()
    assert steps == [used(portions) for portions in run(Shuffled(20), 4, 4, seed=5)]
    assert steps[2:] == [used(p) for p in run(Shuffled(20), 2, 4, seed=5, first_step=2)]
    assert steps != [used(portions) for portions in run(Shuffled(20), 2, 4, seed=5, epoch=1)]
    assert sorted(sum(steps, [])) == list(range(20))  # noqa: RUF017


def test_a_stream_leaves_the_processs_generators_alone() -> None:
    random.seed(3), torch.manual_seed(3)
    expected = [(random.random(), torch.rand(1).item()) for _ in range(5)]
    random.seed(3), torch.manual_seed(3)
    loader = IterableLoader(Stream(Shuffled(10)), 2, parts=1, index=0, agree=lambda rows: (rows,))
    assert [(random.random(), torch.rand(1).item()) for _ in loader.epoch(0)] == expected


def test_a_data_loaders_collate_is_used() -> None:
    steps = run(DataLoader(Count(5), 2, collate_fn=sum), 1, 2)  # type: ignore[arg-type]
    assert [portions[0].batch for portions in steps] == [1, 5, 4]


def test_set_epoch_is_called() -> None:
    class Epochs(Count):
        def set_epoch(self, epoch: int) -> None:
            self.size = epoch

    assert [used(portions) for portions in run(Epochs(0), 1, 2, epoch=3)] == [[0, 1], [2]]


def test_a_stream_without_samples_is_explained() -> None:
    with pytest.raises(DataError, match="no samples in epoch 0"):
        run(Count(0), 1, 2)
    once = (number for number in range(3))
    assert len(run(once, 1, 2)) == 2
    with pytest.raises(DataError, match="iterated again"):
        run(once, 1, 2, epoch=1)
