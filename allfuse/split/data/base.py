"""Where samples come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from allfuse.base.tensors import digest, map_nest
from allfuse.split.data.permutation import Indices

Collate: TypeAlias = Callable[[list[Any]], Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a DataLoader that was given as data says of itself; None where it says nothing.

    `sampler` or `batch_sampler` is there when it is one of the user's own, and then it decides the
    order. `prepare_worker` is the DataLoader's worker_init_fn.
    """

    batch_size: int | None = None
    shuffle: bool | None = None
    drop_last: bool | None = None
    processes: int = 0
    pin_memory: bool = False
    sampler: Iterable[int] | None = None
    batch_sampler: Iterable[list[int]] | None = None
    prepare_worker: Callable[[int], None] | None = None


class Source(ABC):
    """Samples that can be fetched by index: `size` of them."""

    size: int
    settings: Settings

    @property
    def promise(self) -> str:
        """What holds for the samples of a run, as a sentence."""
        if self.settings.sampler is not None or self.settings.batch_sampler is not None:
            return (
                "The DataLoader's own sampler decides which samples are used and how often; "
                "step t's batch is the same samples under every plan if the sampler draws only "
                "from Python's, NumPy's, torch's or its own torch generator."
            )
        return (
            "Every sample of an epoch is used exactly once, and step t's batch is the same samples "
            "under every plan."
        )

    @abstractmethod
    def fetch(self, indices: Indices, epoch: int = 0, seed: int = 0) -> Any:
        """The batch of these samples, in this order.

        What a sample draws at random depends on (seed, epoch, index) alone.
        """

    @abstractmethod
    def sample(self, index: int) -> Any:
        """One sample, not collated."""

    def fingerprint(self) -> str:
        """A short hash of the length and of the first, middle and last sample.

        A sample that differs when it is read twice counts with its structure only.
        """
        parts: list[Any] = [self.size]
        for index in dict.fromkeys((0, self.size // 2, self.size - 1)):
            sample = self.sample(index)
            value = digest(map_nest(_stable, sample))
            again = digest(map_nest(_stable, self.sample(index)))
            parts += [list(structure(sample).items()), value if value == again else "varies"]
        return digest(parts)


def walk(nest: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a nest with the way to it, such as `['image'][0]`."""
    if isinstance(nest, list | tuple):
        for index, value in enumerate(nest):
            yield from walk(value, f"{path}[{index}]")
    elif hasattr(nest, "keys") and hasattr(nest, "__getitem__"):
        for key in nest.keys():  # noqa: SIM118
            yield from walk(nest[key], f"{path}[{key!r}]")
    else:
        yield path, nest


def structure(sample: Any) -> dict[str, str]:
    """The type and shape of every leaf of a sample, by the way to it."""
    return {path: _describe(leaf) for path, leaf in walk(sample)}


def _describe(leaf: Any) -> str:
    if isinstance(leaf, Tensor | np.ndarray):
        return f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
    return type(leaf).__qualname__


def _stable(leaf: Any) -> Any:
    """The leaf in a form that is equal between processes."""
    if isinstance(leaf, np.ndarray | np.generic):
        return type(leaf).__qualname__ if leaf.dtype == object else leaf
    if leaf is None or isinstance(leaf, Tensor | bool | int | float | complex | str | bytes):
        return leaf
    if hasattr(leaf, "tobytes"):  # an image
        return leaf.tobytes()
    return type(leaf).__qualname__
