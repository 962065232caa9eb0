"""How samples become a batch, and why they cannot."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import default_collate

from allfuse.base.errors import DataError
from allfuse.split.data.base import walk


def collate_samples(samples: list[Any], indices: list[int]) -> Any:
    """The batch that a DataLoader would make of these samples.

    Args:
        samples: at least one.
        indices: what the samples are called in errors.

    Raises:
        DataError: they do not fit together; names two of them and what differs, or the leaf that
            no batch can hold.
    """
    try:
        return default_collate(samples)
    except (RuntimeError, TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
        reason = _explain_difference(samples, indices) or _explain_leaf(samples[0], indices[0])
        if reason is None:
            raise
        raise DataError(reason) from error


def _explain_difference(samples: list[Any], indices: list[int]) -> str | None:
    first = _shapes(samples[0])
    for sample, index in zip(samples[1:], indices[1:], strict=True):
        shapes = _shapes(sample)
        for path in [*first, *shapes]:
            here, there = first.get(path, "missing"), shapes.get(path, "missing")
            if here != there:
                where = f" at {path}" if path else ""
                return (
                    f"samples {indices[0]} and {index} have unequal shapes{where}: {here} and "
                    f"{there}; pass collate= to say how such samples become one batch (pad or cut)"
                )
    return None


def _explain_leaf(sample: Any, index: int) -> str | None:
    for path, leaf in walk(sample):
        numeric = isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind in "biufc"
        if not numeric and not isinstance(
            leaf, Tensor | bool | int | float | complex | str | bytes
        ):
            where = f" at {path}" if path else ""
            return (
                f"sample {index} holds a {type(leaf).__qualname__}{where}, of which no batch can "
                "be made; return tensors, arrays or numbers, or pass collate="
            )
    return None


def _shapes(sample: Any, path: str = "") -> dict[str, str]:
    """What must be equal in all samples of a batch, by the way to it; containers come first."""
    if isinstance(sample, Tensor | np.ndarray):
        return {path: str(tuple(sample.shape))}
    if isinstance(sample, str | bytes) or not hasattr(sample, "__len__"):
        return {path: "a single value"}
    if hasattr(sample, "keys") and hasattr(sample, "__getitem__"):
        keys = list(sample.keys())
        shapes = {path: "the keys " + ", ".join(sorted(map(str, keys)))}
        parts = {f"{path}[{key!r}]": sample[key] for key in keys}
    elif isinstance(sample, list | tuple):
        shapes = {path: f"{len(sample)} values"}
        parts = {f"{path}[{index}]": value for index, value in enumerate(sample)}
    else:
        return {path: type(sample).__qualname__}
    for name, part in parts.items():
        shapes.update(_shapes(part, name))
    return shapes
