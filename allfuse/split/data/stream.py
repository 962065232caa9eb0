"""Samples of an iterable, whose number is not known."""

from __future__ import annotations

from typing import Any

from allfuse.base.keys import mix
from allfuse.split.data.base import Collate, Settings
from allfuse.split.data.collate import collate_samples
from allfuse.split.data.generators import KeyedStream, isolated


class Stream:
    """Samples that come in a row, their number unknown: an IterableDataset or any other iterable.

    A dataset with a method `shard(parts, index)` cuts itself (Hugging Face's streaming datasets
    do); else every replica reads all of it and keeps its share. `set_epoch` is called where there.
    What it draws from Python's, NumPy's and torch's generators while it is read depends on
    (seed, epoch) alone.

    Args:
        data: gives its samples anew each time it is iterated. A generator gives one epoch only.
        collate: makes a batch of a list of samples; None does what a DataLoader does.
        settings: what a DataLoader around the data said.

    >>> Stream(range(5)).read(epoch=0, seed=0, parts=1, index=0, block=3).take()
    [0, 1, 2]
    """

    size: None = None

    def __init__(
        self, data: Any, collate: Collate | None = None, settings: Settings | None = None
    ) -> None:
        self.data, self._collate = data, collate
        self.settings = settings or Settings()

    @property
    def shards_itself(self) -> bool:
        return hasattr(self.data, "shard")

    @property
    def promise(self) -> str:
        """What holds for the samples of a run, as a sentence."""
        if self.shards_itself:
            return (
                "The data set cuts itself: each replica steps through its own shard, so which "
                "samples meet in a step depends on the number of replicas."
            )
        return (
            "Every sample of the stream is used exactly once, and step t's batch is the same "
            "samples under every plan, if every replica reads the same stream each time."
        )

    def fingerprint(self) -> str:
        """The type of the data, for its samples may be read only once."""
        return f"stream of {type(self.data).__module__}.{type(self.data).__qualname__}"

    def read(self, epoch: int, seed: int, parts: int, index: int, block: int) -> KeyedStream[Any]:
        """The samples that replica `index` reads, in blocks: of its shard, or of all."""
        cut = self.shards_itself and parts > 1
        data = self.data.shard(parts, index) if cut else self.data
        if hasattr(data, "set_epoch"):
            data.set_epoch(epoch)
        return KeyedStream(data, mix(seed, epoch), block)

    def collate(self, samples: list[Any], key: int) -> Any:
        """The batch of these samples; what the user's collate draws depends on the key alone."""
        if self._collate is None:
            return collate_samples(samples, list(range(len(samples))))
        with isolated(key):
            return self._collate(samples)
