"""A replica's samples, step by step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.utils.data import DataLoader, Dataset

from allfuse.base.errors import DataError, UserError
from allfuse.base.tensors import share
from allfuse.launcher.scratch import use_scratch
from allfuse.split.data.base import Source
from allfuse.split.data.batches import Batches, BatchPlan
from allfuse.split.data.learned import Learned
from allfuse.split.data.permutation import Indices
from allfuse.split.data.portion import Portion, pin

Cut: TypeAlias = Callable[[int, int, int], tuple[int, ...]]
"""The rows of every replica, from (rows of the batch, epoch, step of the epoch)."""

_AHEAD = 2  # portions that each loader process reads before they are asked for


class _Request(NamedTuple):
    """A portion before its samples are read."""

    indices: Indices
    rows: int
    shares: tuple[int, ...]
    epoch: int
    step: int
    last: bool

    def fill(self, batch: Any) -> Portion:
        _, rows, shares, epoch, step, last = self
        return Portion(batch=batch, rows=rows, shares=shares, epoch=epoch, step=step, last=last)


class Loader:
    """Gives one replica its share of every batch, from any (epoch, step) on.

    A replica reads its own samples only, and the batch's first sample as a stand-in where it has
    none. The samples and their order are the same with any number of loader processes.

    Args:
        source: the samples.
        plan: the batches over all replicas, equal on every one.
        parts: the number of replicas that share each batch.
        index: this replica.
        processes: that read ahead, 2 portions each; 0 reads in this process when asked.
        cut: how a batch is shared out, the same on every replica; None: evenly. It is asked when
            the portion is read, which is up to `ahead` steps before its own.
        pin_memory: puts batches where a GPU can fetch them; nothing to do without one.

    Attributes:
        learned: what of the batches a run that goes on leaves out; the rest is shared out.

    >>> from allfuse.split.data import BatchPlan, ColumnSource
    >>> source = ColumnSource(torch.arange(5))
    >>> loader = Loader(source, BatchPlan(5, 3, seed=0, shuffle=False), parts=2, index=1)
    >>> [(p.batch.tolist(), p.rows, p.shares) for p in loader.epoch(0)]
    [([1, 2], 2, (1, 2)), ([4], 1, (1, 1))]
    """

    def __init__(
        self,
        source: Source,
        plan: Batches,
        *,
        parts: int,
        index: int,
        processes: int = 0,
        cut: Cut | None = None,
        pin_memory: bool = False,
    ) -> None:
        if not 0 <= index < parts:
            raise ValueError(f"replica {index} of {parts}: the index must be in range({parts})")
        self.source, self.plan, self.parts, self.index = source, plan, parts, index
        self.ahead = _AHEAD * processes
        self.learned = Learned()
        self._cut = cut or self._evenly
        self._even: tuple[int, ...] = ()
        self._pin = pin_memory and torch.cuda.is_available()
        self._workers = _Workers(source, plan.seed, processes, self._pin) if processes else None

    @property
    def steps_per_epoch(self) -> int | None:
        return self.plan.steps_per_epoch

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Portion]:
        """The portions from `first_step` to the end of the epoch.

        With loader processes only the latest call's iterator is valid.
        """
        yield from self._read(self._requests(epoch, first_step))

    def _read(self, requests: Iterator[_Request]) -> Iterator[Portion]:
        if self._workers is not None:
            yield from self._workers.read(requests)
            return
        for request in requests:
            batch = self.source.fetch(request.indices, request.epoch, self.plan.seed)
            yield request.fill(pin(batch) if self._pin else batch)

    def leased(self, steps: Iterable[tuple[int, int]], part: int, parts: int) -> Iterator[Portion]:
        """The portions of some steps, where this loader's replicas are one of several groups.

        Args:
            steps: (epoch, step) of each.
            part, parts: which of how many groups that share each batch. `shares` are of the group.

        Raises:
            DataError: the batches come from a sampler, which cannot begin anywhere.
        """
        requests = (self._leased(epoch, step, part, parts) for epoch, step in steps)
        yield from self._read(requests)

    def _leased(self, epoch: int, step: int, part: int, parts: int) -> _Request:
        plan = self.plan
        if not isinstance(plan, BatchPlan):
            raise DataError(
                "the data brings its own sampler, and work that a scheduler hands out begins "
                "anywhere in an epoch; next: give the DataLoader's dataset, or a plan in step"
            )
        batch = plan.indices(epoch, step)
        left = self._left(batch, epoch, step)
        several = range(part * self.parts, (part + 1) * self.parts)
        bounds = [share(len(left), parts * self.parts, index) for index in several]
        start, stop = bounds[self.index]
        own = left[start:stop] if stop > start else batch[:1]
        shares = tuple(end - begin for begin, end in bounds)
        return _Request(own, stop - start, shares, epoch, step, step + 1 == plan.steps_per_epoch)

    def close(self) -> None:
        """End the loader processes. The loader gives nothing afterwards."""
        if self._workers is not None:
            self._workers.close()

    def _requests(self, epoch: int, first_step: int) -> Iterator[_Request]:
        batches = self.plan.batches(epoch, first_step)
        following = next(batches, None)
        if following is None and first_step == 0:
            raise DataError(f"there are no batches in epoch {epoch}; the sampler gave none")
        step = first_step
        while following is not None:
            batch, following = following, next(batches, None)
            left = self._left(batch, epoch, step)
            shares = self._cut(len(left), epoch, step) if len(left) else (0,) * self.parts
            start, rows = sum(shares[: self.index]), shares[self.index]
            own = left[start : start + rows] if rows else batch[:1]
            yield _Request(own, rows, shares, epoch, step, following is None)
            step += 1

    def _left(self, batch: Indices, epoch: int, step: int) -> Indices:
        if not self.learned or self.steps_per_epoch is None:
            return batch
        return self.learned.left(batch, epoch * self.steps_per_epoch + step)

    def _evenly(self, total: int, epoch: int, step: int) -> tuple[int, ...]:
        if sum(self._even) != total:
            bounds = [share(total, self.parts, index) for index in range(self.parts)]
            self._even = tuple(stop - start for start, stop in bounds)
        return self._even


class _Failure(NamedTuple):
    """A user's error on its way out of a loader process, without that process's traceback."""

    error: UserError


class _Reader(Dataset[Any]):
    """What a loader process runs: one request at a time."""

    def __init__(self, source: Source, seed: int) -> None:
        self._source, self._seed = source, seed

    def __getitem__(self, request: tuple[Indices, int]) -> Any:
        indices, epoch = request
        try:
            return self._source.fetch(indices, epoch, self._seed)
        except UserError as error:
            return _Failure(error)
        except (StopIteration, KeyboardInterrupt, SystemExit) as error:
            # These would end the loop over batches, or this process, without a word.
            name = type(error).__name__
            text = f"reading samples {indices.tolist()[:8]} of the data set raised {name}: {error}"
            return _Failure(DataError(f"{text}; next: look at its __getitem__"))


class _Workers:
    """Loader processes that stay over epochs: a DataLoader with our requests as its sampler."""

    def __init__(self, source: Source, seed: int, processes: int, pin_memory: bool) -> None:
        self._requests: Iterator[_Request] = iter(())
        self._asked: deque[_Request] = deque()
        self._stream: Any = None
        use_scratch()
        self._loader: DataLoader[Any] | None = DataLoader(
            _Reader(source, seed),
            batch_size=None,
            sampler=self,
            num_workers=processes,
            prefetch_factor=_AHEAD,
            collate_fn=_as_it_is,
            pin_memory=pin_memory,
            worker_init_fn=source.settings.prepare_worker,
            persistent_workers=True,
            generator=torch.Generator(),  # so that none is drawn from the process's own
        )

    def __iter__(self) -> Iterator[tuple[Indices, int]]:
        """What the DataLoader asks its processes for, read ahead of the portions."""
        for request in self._requests:
            self._asked.append(request)
            yield request.indices, request.epoch

    def read(self, requests: Iterator[_Request]) -> Iterator[Portion]:
        if self._loader is None:
            raise ValueError("this loader is closed")
        self._requests = requests
        self._asked.clear()
        self._stream = iter(self._loader)
        while (batch := next(self._stream, self)) is not self:
            if isinstance(batch, _Failure):
                raise batch.error
            yield self._asked.popleft().fill(batch)

    def close(self) -> None:
        if self._stream is not None:
            # Dropping the last reference does the same, but a traceback may hold one.
            self._stream._shutdown_workers()
        self._stream = self._loader = None


def _as_it_is(batch: Any) -> Any:
    return batch
