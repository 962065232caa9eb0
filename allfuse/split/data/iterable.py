"""A replica's samples of a stream, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from allfuse.base.errors import DataError
from allfuse.base.keys import mix
from allfuse.base.tensors import share
from allfuse.split.data.generators import KeyedStream
from allfuse.split.data.portion import Portion, pin
from allfuse.split.data.stream import Stream


class IterableLoader:
    """Gives one replica its share of every batch of a stream.

    Where every replica reads the whole stream, a batch is its next `batch_size` samples, and
    replica i keeps each parts-th of them from the i-th on. Where the data set cuts itself, a batch
    is each replica's share of `batch_size` from its own shard. Lengths are unknown, so replicas
    agree on the rows of each step, one step ahead; the epoch ends when none has any.

    Going on from a later step reads and drops what was used before.

    Args:
        source: the stream.
        batch_size: samples of a step, all replicas together.
        parts: the number of replicas that share each batch.
        index: this replica.
        agree: gathers the rows of every replica: called with this one's, once a step and once more
            at the end of the epoch, in the same order on every replica.
        seed: of what the stream draws.
        drop_last: end the epoch before the first batch that is not full.
        pin_memory: puts batches where a GPU can fetch them; nothing to do without one.

    >>> loader = IterableLoader(Stream(range(3)), 2, parts=1, index=0, agree=lambda rows: (rows,))
    >>> [(p.batch.tolist(), p.last) for p in loader.epoch(0)]
    [([0, 1], False), ([2], True)]
    """

    steps_per_epoch: int | None = None

    def __init__(
        self,
        source: Stream,
        batch_size: int,
        *,
        parts: int,
        index: int,
        agree: Callable[[int], tuple[int, ...]],
        seed: int = 0,
        drop_last: bool = False,
        pin_memory: bool = False,
    ) -> None:
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}; it must be at least 1")
        if not 0 <= index < parts:
            raise ValueError(f"replica {index} of {parts}: the index must be in range({parts})")
        self.source, self.batch_size, self.parts, self.index = source, batch_size, parts, index
        self._agree, self._seed, self._drop_last = agree, seed, drop_last
        self._pin = pin_memory and torch.cuda.is_available()
        self._seen: list[Any] = []  # the last sample, as a stand-in

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Portion]:
        """The portions from `first_step` to the end of the epoch.

        Raises:
            DataError: the stream gives no samples, or none to this replica.
        """
        stream = self.source.read(epoch, self._seed, self.parts, self.index, self._window)
        for _ in range(first_step):
            stream.take()
        own, shares = self._next(stream)
        if not any(shares) and first_step == 0:
            raise DataError(
                f"the data set is empty: the stream gave no samples in epoch {epoch}; a generator "
                "can be read only once, so give something that can be iterated again"
            )
        step = first_step
        while any(shares):
            now, rows = own, shares
            own, shares = self._next(stream)
            yield Portion(
                batch=self._collate(now, mix(self._seed, epoch, step, self.index)),
                rows=len(now),
                shares=rows,
                epoch=epoch,
                step=step,
                last=not any(shares),
            )
            step += 1

    def close(self) -> None:
        """Nothing to give back."""

    @property
    def _whole(self) -> bool:
        """Whether this replica reads the whole stream."""
        return not self.source.shards_itself or self.parts == 1

    @property
    def _window(self) -> int:
        """Samples that this replica reads in a step."""
        if self._whole:
            return self.batch_size
        start, stop = share(self.batch_size, self.parts, self.index)
        return stop - start

    def _next(self, stream: KeyedStream[Any]) -> tuple[list[Any], tuple[int, ...]]:
        """This replica's samples of the next step, and the rows of all; zeros at the end."""
        read = stream.take()
        self._seen = read[-1:] or self._seen
        own = read[self.index :: self.parts] if self._whole else read
        shares = self._agree(len(own))
        if self._drop_last and sum(shares) < self.batch_size:
            return [], (0,) * self.parts
        return own, shares

    def _collate(self, samples: list[Any], key: int) -> Any:
        if not samples and not self._seen:
            raise DataError(
                f"replica {self.index} of {self.parts} got no sample at all: its shard of the "
                "stream is empty; use fewer replicas or more shards"
            )
        batch = self.source.collate(samples or self._seen, key)
        return pin(batch) if self._pin else batch
