"""Which samples every replica works on in every step, told plainly for the reference to follow."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from allfuse.base.errors import DataError
from allfuse.base.keys import mix
from allfuse.base.tensors import share
from allfuse.job import Job
from allfuse.plan import Data, Plan
from allfuse.split.data import Source, Stream, as_source, plan_batches
from allfuse.split.data.loader import Cut
from allfuse.training.balance import apportion

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The samples of one step.

    shares: what each replica works on, in the order of replicas: indices, or samples of a stream.
    last: whether an epoch ends with this step.
    fetch: makes one batch of the shares that it is given, put end to end.
    """

    shares: list[Any]
    last: bool
    fetch: Callable[[list[Any]], Any]


def uneven(parts: int, least: int) -> Cut:
    """Shares that differ from replica to replica and change with every step.

    They stand for those that balance=speed measures, which nobody knows beforehand: any shares give
    the numbers that a plan promises.
    """

    def cut(total: int, epoch: int, step: int) -> tuple[int, ...]:
        return apportion(total, [1.0 + (part + step) % parts for part in range(parts)], least)

    return cut


def cut_of(plan: Plan, job: Job) -> Cut | None:
    """How both runs share out the batches of a plan; None: evenly."""
    data = plan.axis("data")
    measured = isinstance(data, Data) and data.balance == "speed" and data.n > 1
    return uneven(plan.replicas, job.accumulate) if measured else None


def read_batches(job: Job, parts: int, cut: Cut | None = None) -> Iterator[Batch]:
    """The batches of a job for `parts` replicas, epoch after epoch, without end.

    `cut` shares them out, as in a loader.

    Raises:
        DataError: an epoch without batches.
    """
    source = as_source(job.train, collate=job.collate)
    for epoch in itertools.count():
        if isinstance(source, Stream):
            batches = _read_stream(source, job, parts, epoch)
        else:
            batches = _read_source(source, job, parts, epoch, cut)
        batch = None
        for batch in batches:
            yield batch
        if batch is None:
            raise DataError(f"there are no batches in epoch {epoch}")


def _read_source(
    source: Source, job: Job, parts: int, epoch: int, cut: Cut | None
) -> Iterator[Batch]:
    """Replica i takes the i-th of `parts` runs of each batch, even ones without a `cut`."""
    plan = plan_batches(source, batch_size=job.batch_size, seed=job.seed)

    def fetch(shares: list[Any]) -> Any:
        return source.fetch(np.concatenate(shares), epoch, job.seed)

    for step, (indices, last) in enumerate(_with_last(plan.batches(epoch))):
        bounds = [share(len(indices), parts, part) for part in range(parts)]
        if cut is not None:
            ends = list(itertools.accumulate(cut(len(indices), epoch, step)))
            bounds = list(zip([0, *ends], ends, strict=False))
        yield Batch(shares=[indices[a:b] for a, b in bounds], last=last, fetch=fetch)


def _read_stream(stream: Stream, job: Job, parts: int, epoch: int) -> Iterator[Batch]:
    """Replica i takes each parts-th sample from the i-th on, or its share of its own shard."""
    size = job.batch_size or 1  # streams have a batch size of their own, checked when training

    def next_shares() -> list[list[Any]]:
        if len(readers) > 1:
            return [reader.take() for reader in readers]
        window = readers[0].take()
        return [window[part::parts] for part in range(parts)]

    if stream.shards_itself and parts > 1:
        windows = [stop - start for start, stop in (share(size, parts, i) for i in range(parts))]
        readers = [stream.read(epoch, job.seed, parts, i, windows[i]) for i in range(parts)]
    else:
        readers = [stream.read(epoch, job.seed, 1, 0, size)]
    least = size if stream.settings.drop_last else 1
    full = itertools.takewhile(
        lambda shares: sum(map(len, shares)) >= least, iter(next_shares, None)
    )
    for step, (shares, last) in enumerate(_with_last(full)):
        key = mix(job.seed, epoch, step)

        def fetch(chosen: list[Any], key: int = key) -> Any:
            return stream.collate(list(itertools.chain(*chosen)), key)

        yield Batch(shares=shares, last=last, fetch=fetch)


def _with_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Each item, and whether none comes after it."""
    iterator = iter(items)
    for item in iterator:
        for following in iterator:
            yield item, False
            item = following
        yield item, True
