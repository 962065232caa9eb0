"""Which samples make up the batch of each step, over all replicas."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import BatchSampler

from allfuse.base.errors import DataError
from allfuse.base.keys import mix
from allfuse.split.data.base import Source
from allfuse.split.data.generators import KeyedStream
from allfuse.split.data.permutation import Indices, Permutation

_AHEAD = 16_384  # indices computed at once: 0.4 ms and 128 KiB
_SAMPLER_AHEAD = 64  # batches taken from a user's sampler at once


class Batches(Protocol):
    """The global batches of a run, the same on every replica."""

    @property
    def seed(self) -> int: ...

    @property
    def steps_per_epoch(self) -> int | None:
        """None when it cannot be told."""

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Indices]:
        """The sample indices of each step's batch, from `first_step` to the end of the epoch."""


@dataclass(frozen=True)
class BatchPlan:
    """Every sample of an epoch once, in an order that depends on (seed, epoch) alone.

    The last batch of an epoch is smaller, or left out with `drop_last`. Computed as it is needed:
    memory does not grow with the number of samples. Cost: about 30 ns per sample.

    Raises:
        DataError: no samples, no batch size, or `drop_last` that leaves no batch.

    >>> plan = BatchPlan(samples=10, batch_size=4, seed=0)
    >>> [len(batch) for batch in plan.batches(epoch=0)]
    [4, 4, 2]
    """

    samples: int
    batch_size: int
    seed: int
    shuffle: bool = True
    drop_last: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise DataError("the data set is empty: got 0 samples; give at least one")
        if self.batch_size < 1:
            raise DataError(f"batch_size is {self.batch_size}; it must be at least 1")
        if self.steps_per_epoch == 0:
            raise DataError(
                f"drop_last leaves no batch: {self.samples} samples are fewer than one batch of "
                f"{self.batch_size}; use a smaller batch_size or drop_last=False"
            )

    @property
    def steps_per_epoch(self) -> int:
        full, rest = divmod(self.samples, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def indices(self, epoch: int, step: int) -> Indices:
        """The batch of one step. For many steps in a row `batches` is faster."""
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} of an epoch of {self.steps_per_epoch} steps")
        return next(self._blocks(epoch, step, 1))

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Indices]:
        size = self.batch_size
        for block in self._blocks(epoch, first_step, max(1, _AHEAD // size)):
            for start in range(0, len(block), size):
                yield block[start : start + size]

    def _blocks(self, epoch: int, first_step: int, ahead: int) -> Iterator[Indices]:
        """The indices of `ahead` batches at a time."""
        order = Permutation(self.samples, self.seed, epoch, self.shuffle)
        end = min(self.samples, self.steps_per_epoch * self.batch_size)
        for step in range(first_step, self.steps_per_epoch, ahead):
            stop = min(end, (step + ahead) * self.batch_size)
            yield order(np.arange(step * self.batch_size, stop))


class SamplerPlan:
    """The batches that a sampler of the user's own gives.

    Every replica reads the whole sampler, seeded by (seed, epoch), and so sees the same batches if
    the sampler draws only from Python's, NumPy's, torch's or its own torch generator (its attribute
    `generator`). `set_epoch` is called where there.

    Args:
        batch_sampler: an iterable of lists of indices.
        seed: of the run.

    >>> [batch.tolist() for batch in SamplerPlan([[2, 0], [1]], seed=0).batches(epoch=0)]
    [[2, 0], [1]]
    """

    def __init__(self, batch_sampler: Iterable[list[int]], seed: int) -> None:
        self._sampler, self.seed = batch_sampler, seed

    @property
    def steps_per_epoch(self) -> int | None:
        try:
            return len(self._sampler)  # type: ignore[arg-type]
        except TypeError:
            return None

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Indices]:
        key = mix(self.seed, epoch)
        for sampler in (getattr(self._sampler, "sampler", None), self._sampler):
            _set_epoch(sampler, epoch, key)
        stream = KeyedStream(self._sampler, key, _SAMPLER_AHEAD)
        yield from map(_as_indices, islice(stream, first_step, None))


def _set_epoch(sampler: Any, epoch: int, key: int) -> None:
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
    if isinstance(getattr(sampler, "generator", None), torch.Generator):
        sampler.generator.manual_seed(key)


def _as_indices(batch: Any) -> Indices:
    indices = np.asarray(batch)
    if indices.ndim != 1 or indices.size == 0 or indices.dtype.kind not in "iu":
        raise DataError(
            f"the sampler gave {batch!r} as a batch; it must give lists of at least one index"
        )
    return indices.astype(np.int64)


def plan_batches(
    source: Source,
    *,
    batch_size: int | None = None,
    seed: int = 0,
    shuffle: bool | None = None,
    drop_last: bool | None = None,
) -> BatchPlan | SamplerPlan:
    """The global batches of a source. None takes what the source's DataLoader says, else a default.

    The defaults are shuffle=True and drop_last=False; batch_size has none.

    Raises:
        DataError: no batch size anywhere, or an argument that the DataLoader's own sampler decides.
    """
    settings = source.settings
    if settings.sampler is not None or settings.batch_sampler is not None:
        decided: dict[str, int | None] = {"shuffle": shuffle}
        if settings.batch_sampler is not None:
            decided |= {"batch_size": batch_size, "drop_last": drop_last}
        for name, value in decided.items():
            if value is not None:
                raise DataError(
                    f"{name}={value} was given, but the DataLoader brings its own sampler, which "
                    f"decides that; leave {name} out, or give the DataLoader's dataset"
                )
    if settings.batch_sampler is not None:
        return SamplerPlan(settings.batch_sampler, seed)
    size = settings.batch_size if batch_size is None else batch_size
    if size is None:
        raise DataError(
            "batch_size is missing; give the number of samples of a step, all workers together"
        )
    drop = bool(settings.drop_last) if drop_last is None else drop_last
    if settings.sampler is not None:
        return SamplerPlan(BatchSampler(settings.sampler, size, drop), seed)
    if shuffle is None:
        shuffle = settings.shuffle is not False
    return BatchPlan(source.size, size, seed, shuffle, drop)
