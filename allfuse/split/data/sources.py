"""Anything that holds samples, read as a Source or a Stream."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from allfuse.base.errors import DataError
from allfuse.split.data.base import Collate, Settings, Source
from allfuse.split.data.columns import ColumnSource, is_columns
from allfuse.split.data.mapped import MapSource
from allfuse.split.data.stream import Stream


def as_source(
    data: Any, collate: Collate | None = None, settings: Settings | None = None
) -> Source | Stream:
    """Samples of any of these, tried in this order:

    - a Source or Stream, as it is;
    - a DataLoader: its dataset, collate and settings;
    - an IterableDataset: a Stream;
    - a TensorDataset, a tensor or array, a dict or tuple of them (nested): by columns, the fastest;
    - a Subset (random_split) of any of those;
    - anything with `__len__` and `__getitem__`, a list of samples for one: by index;
    - any other iterable: a Stream.

    A batch of columns is the same nest; otherwise it is what a DataLoader would give, and
    `collate(samples)` when that is given.

    Raises:
        DataError: none of these, no samples, or columns that do not fit together.

    >>> as_source((torch.zeros(5, 2), torch.arange(5))).size
    5
    """
    settings = settings or Settings()
    if isinstance(data, Source | Stream):
        return data
    if isinstance(data, DataLoader):
        inner = None if data.collate_fn is default_collate else data.collate_fn
        return as_source(data.dataset, collate or inner, _read_settings(data))
    if isinstance(data, IterableDataset):
        return Stream(data, collate, settings)
    if isinstance(data, str | bytes):
        raise DataError(
            f"text cannot be used as data: {data[:40]!r}; open the file and give its samples"
        )
    columns = _find_columns(data, settings)
    if columns is not None:
        return columns if collate is None else MapSource(_samples(data, columns), collate, settings)
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        return MapSource(data, collate, settings)
    if hasattr(data, "__iter__"):
        return Stream(data, collate, settings)
    raise DataError(
        f"a {type(data).__qualname__} cannot be used as data; give tensors, arrays, a dataset with "
        "__len__ and __getitem__, a DataLoader, or an iterable of samples"
    )


def _find_columns(data: Any, settings: Settings) -> ColumnSource | None:
    """The data by columns, or None when that is not how it lies."""
    if type(data) is TensorDataset:
        return ColumnSource(list(data.tensors), settings=settings)  # a DataLoader gives a list
    if type(data) is Subset and isinstance(data.dataset, TensorDataset | Subset):
        inner = _find_columns(data.dataset, settings)
        if inner is None:
            return None
        rows = torch.as_tensor(data.indices, dtype=torch.int64)
        rows = rows if inner.rows is None else inner.rows[rows]
        return ColumnSource(inner.columns, rows, settings)
    return ColumnSource(data, settings=settings) if is_columns(data) else None


class _Samples:
    """The rows of columns as a map-style dataset, for a collate that wants samples."""

    def __init__(self, source: ColumnSource) -> None:
        self._source = source

    def __len__(self) -> int:
        return self._source.size

    def __getitem__(self, index: int) -> Any:
        return self._source.sample(index)


def _samples(data: Any, columns: ColumnSource) -> Any:
    return data if isinstance(data, TensorDataset | Subset) else _Samples(columns)


def _read_settings(loader: DataLoader[Any]) -> Settings:
    """What a DataLoader says of itself.

    Raises:
        DataError: it makes no batches of samples, or cuts the data for several workers.
    """
    batch_sampler = loader.batch_sampler
    if batch_sampler is None:
        raise DataError(
            "the DataLoader has batching switched off (batch_size=None); give one that makes its "
            "batches of single samples"
        )
    settings = Settings(
        processes=loader.num_workers,
        pin_memory=loader.pin_memory,
        prepare_worker=loader.worker_init_fn,
    )
    if type(batch_sampler) is not BatchSampler:
        return replace(settings, batch_sampler=batch_sampler)
    settings = replace(
        settings, batch_size=batch_sampler.batch_size, drop_last=batch_sampler.drop_last
    )
    sampler: Any = batch_sampler.sampler
    if isinstance(loader.dataset, IterableDataset):
        return settings
    if isinstance(sampler, DistributedSampler):
        raise DataError(
            "the DataLoader has a DistributedSampler, which cuts the data once more; leave it out: "
            "allfuse gives each worker its share, and batch_size counts the samples of all workers"
        )
    everything = len(loader.dataset)  # type: ignore[arg-type]
    if type(sampler) is SequentialSampler and len(sampler) == everything:
        return replace(settings, shuffle=False)
    if type(sampler) is RandomSampler and not sampler.replacement and len(sampler) == everything:
        return replace(settings, shuffle=True)
    return replace(settings, sampler=sampler)
