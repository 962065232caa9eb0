from __future__ import annotations

import doctest
import importlib
import multiprocessing
import os
import pkgutil
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, get_worker_info

import allfuse.split.data
from allfuse.base.errors import DataError
from allfuse.base.tensors import share
from allfuse.split.data import (
    BatchPlan,
    ColumnSource,
    Loader,
    MapSource,
    Portion,
    Settings,
    as_source,
    plan_batches,
)


class Items(Dataset[Any]):
    """A map-style dataset from a function of the index."""

    def __init__(self, size: int, make: Callable[[int], Any] = int) -> None:
        self.size, self.make = size, make

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


def samples_of(portion: Portion) -> list[int]:
    """The replica's own samples, when each is its index."""
    return portion.batch.tolist() if portion.rows else []


@pytest.mark.parametrize("parts", range(1, 8))
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [(*range(1, 10), 16, 23, 50), pytest.param(range(10, 50), marks=pytest.mark.slow)],
    ids=("few", "many"),
)
def test_every_sample_is_used_exactly_once_over_all_replicas(
    parts: int, drop_last: bool, sizes: Sequence[int]
) -> None:
    for samples in sizes:
        source = ColumnSource(torch.arange(samples))
        for batch_size in (2, 5, 8, 50):
            if drop_last and samples < batch_size:
                continue
            plan = BatchPlan(samples, batch_size, seed=samples, drop_last=drop_last)
            loaders = [Loader(source, plan, parts=parts, index=i) for i in range(parts)]
            used: list[int] = []
            for step, portions in enumerate(
                zip(*(loader.epoch(1) for loader in loaders), strict=True)
            ):
                together = [sample for portion in portions for sample in samples_of(portion)]
                assert together == plan.indices(1, step).tolist()
                used += together
                for index, portion in enumerate(portions):
                    assert portion.shares == portions[0].shares
                    assert portion.rows == portion.shares[index] == len(samples_of(portion))
                    assert portion.step == step
                    assert portion.last == (step == plan.steps_per_epoch - 1)
            dropped = samples % batch_size if drop_last else 0
            assert len(used) == len(set(used)) == samples - dropped


def test_a_replica_reads_its_own_share_and_the_stand_in_only() -> None:
    read: list[int] = []
    source = MapSource(Items(13, lambda i: read.append(i) or i))
    plan = BatchPlan(13, 5, seed=2)
    for index in range(4):
        loader = Loader(source, plan, parts=4, index=index)
        for portion, batch in zip(loader.epoch(0), plan.batches(0), strict=True):
            start, stop = share(len(batch), 4, index)
            own = batch[start:stop] if portion.rows else batch[:1]
            assert read == own.tolist()
            assert portion.batch.tolist() == own.tolist()
            read.clear()


def test_a_replica_without_samples_gets_the_batchs_first_one_with_weight_zero() -> None:
    source = ColumnSource({"x": torch.arange(2)})
    plan = BatchPlan(2, 2, seed=0)
    portion = next(Loader(source, plan, parts=3, index=0).epoch(0))
    assert (portion.rows, portion.shares) == (0, (0, 1, 1))
    assert portion.batch["x"].tolist() == plan.indices(0, 0)[:1].tolist()


@pytest.mark.parametrize("first_step", range(5))
def test_going_on_gives_the_very_next_sample(first_step: int) -> None:
    loader = Loader(ColumnSource(torch.arange(18)), BatchPlan(18, 4, 7), parts=2, index=1)
    whole = [(p.step, p.last, samples_of(p)) for p in loader.epoch(2)]
    rest = [(p.step, p.last, samples_of(p)) for p in loader.epoch(2, first_step)]
    assert rest == whole[first_step:]


def test_the_same_replica_count_or_another_reads_the_same_batches() -> None:
    """An augmented sample is the same in whichever replica it lands."""
    source = MapSource(Items(20, lambda i: torch.tensor([i, random.random(), np.random.rand()])))
    plan = BatchPlan(20, 6, seed=4)

    def batches(parts: int) -> list[torch.Tensor]:
        loaders = [Loader(source, plan, parts=parts, index=i).epoch(1) for i in range(parts)]
        return [
            torch.cat([portion.batch[: portion.rows] for portion in portions])
            for portions in zip(*loaders, strict=True)
        ]

    for parts in (2, 3, 7):
        assert all(map(torch.equal, batches(1), batches(parts)))


def test_a_sampler_of_ones_own_is_cut_among_the_replicas() -> None:
    lists = [[0, 1, 2], [5], [2, 2]]
    source = as_source(DataLoader(Items(6), batch_sampler=lists))
    assert isinstance(source, MapSource)
    loaders = [Loader(source, plan_batches(source), parts=2, index=i) for i in range(2)]
    steps = list(zip(*(loader.epoch(0) for loader in loaders), strict=True))
    assert [[s for p in portions for s in samples_of(p)] for portions in steps] == lists
    assert [portions[0].last for portions in steps] == [False, False, True]
    assert loaders[0].steps_per_epoch == 3


def test_a_sampler_that_gives_nothing_is_an_error_not_an_endless_wait() -> None:
    source = as_source(DataLoader(Items(6), batch_sampler=BatchSampler([], 2, False)))
    assert isinstance(source, MapSource)
    with pytest.raises(DataError, match="no batches in epoch 0"):
        next(Loader(source, plan_batches(source), parts=1, index=0).epoch(0))


@pytest.mark.parametrize("index", [-1, 2])
def test_an_index_outside_the_replicas_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match=f"replica {index} of 2"):
        Loader(ColumnSource(torch.arange(4)), BatchPlan(4, 2, 0), parts=2, index=index)


def draw(index: int) -> torch.Tensor:
    """An augmented sample: its index and what each generator draws."""
    return torch.tensor([index, random.random(), np.random.randn(), torch.rand(1).item()])


def read(loader: Loader, epoch: int, first_step: int = 0) -> list[tuple[Any, ...]]:
    return [
        (p.batch.tolist(), p.rows, p.shares, p.epoch, p.step, p.last)
        for p in loader.epoch(epoch, first_step)
    ]


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """No process of ours is alive afterwards."""
    before = {child.pid for child in multiprocessing.active_children()}
    yield
    assert {child.pid for child in multiprocessing.active_children()} <= before


@pytest.mark.usefixtures("no_leaks")
def test_loader_processes_change_nothing() -> None:
    source = MapSource(Items(11, draw), collate=noisy_stack)
    plan = BatchPlan(11, 4, seed=3)
    alone = Loader(source, plan, parts=3, index=1)
    torch.manual_seed(0)
    with closing(Loader(source, plan, parts=3, index=1, processes=2)) as loader:
        for epoch in range(3):
            assert read(loader, epoch) == read(alone, epoch)
        next(loader.epoch(0))  # an epoch that is left early
        assert read(loader, 2, first_step=1) == read(alone, 2, first_step=1)
    with pytest.raises(ValueError, match="closed"):
        next(loader.epoch(0))
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), drawn)


def noisy_stack(samples: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(samples) + torch.rand(4)


@pytest.mark.usefixtures("no_leaks")
def test_loader_processes_stay_over_epochs() -> None:
    source = MapSource(Items(8, lambda i: (i, os.getpid())))
    with closing(Loader(source, BatchPlan(8, 2, 0), parts=1, index=0, processes=2)) as loader:
        first, second = (
            {pid for portion in loader.epoch(epoch) for pid in portion.batch[1].tolist()}
            for epoch in range(2)
        )
    assert first == second
    assert len(first) == 2
    assert os.getpid() not in first


@pytest.mark.usefixtures("no_leaks")
def test_a_bad_sample_in_a_loader_process_is_explained_in_one_line() -> None:
    source = MapSource(Items(4, lambda i: torch.zeros(i)))
    plan = BatchPlan(4, 2, 0, shuffle=False)
    with closing(Loader(source, plan, parts=1, index=0, processes=1)) as loader:
        with pytest.raises(DataError) as caught:
            next(loader.epoch(0))
    assert "samples 0 and 1" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_leaks")
def test_a_failing_dataset_in_a_loader_process_keeps_its_traceback() -> None:
    source = MapSource(Items(4, lambda i: 1 // i))
    plan = BatchPlan(4, 2, 0, shuffle=False)
    with closing(Loader(source, plan, parts=1, index=0, processes=1)) as loader:
        with pytest.raises(ZeroDivisionError, match="while reading sample 0 of 4"):
            next(loader.epoch(0))


@pytest.mark.usefixtures("no_leaks")
def test_a_loader_process_is_prepared_as_the_data_loader_said() -> None:
    seen: list[int] = []

    def prepare(worker: int) -> None:
        seen.append(100 + worker)

    source = MapSource(Items(2, lambda i: seen[0]), settings=Settings(prepare_worker=prepare))
    with closing(Loader(source, BatchPlan(2, 2, 0), parts=1, index=0, processes=1)) as loader:
        assert next(loader.epoch(0)).batch.tolist() == [100, 100]


def test_reading_without_processes_stays_in_this_process() -> None:
    source = MapSource(Items(2, lambda i: get_worker_info() is None))
    loader = Loader(source, BatchPlan(2, 2, 0), parts=1, index=0)
    assert next(loader.epoch(0)).batch.tolist() == [True, True]
    loader.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("processes", [0, 1])
def test_batches_are_pinned_where_there_is_a_gpu(processes: int) -> None:
    source = ColumnSource({"x": torch.arange(4)})
    plan = BatchPlan(4, 2, 0)
    with closing(
        Loader(source, plan, parts=1, index=0, processes=processes, pin_memory=True)
    ) as loader:
        assert all(portion.batch["x"].is_pinned() for portion in loader.epoch(0))


MODULES = [module.name for module in pkgutil.iter_modules(allfuse.split.data.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_docstrings_are_true(name: str) -> None:
    module = importlib.import_module(f"allfuse.split.data.{name}")
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("error", [StopIteration, KeyboardInterrupt, SystemExit])
def test_a_loader_process_cannot_end_an_epoch_early(error: type[BaseException]) -> None:
    def make(index: int) -> int:
        if index == 5:
            raise error("a reader is empty")
        return index

    source = MapSource(Items(8, make))
    loader = Loader(source, BatchPlan(8, 2, seed=0, shuffle=False), parts=1, index=0, processes=1)
    with closing(loader), pytest.raises(DataError, match=error.__name__):
        for _ in loader.epoch(0):
            pass
