"""Samples that lie in tensors or arrays: row i of every leaf is sample i."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from allfuse.base.errors import DataError
from allfuse.base.tensors import map_nest
from allfuse.split.data.base import Settings, Source, walk
from allfuse.split.data.permutation import Indices


class ColumnSource(Source):
    """A nest (dict, list, tuple) of tensors or arrays of equal length; a batch is the same nest.

    Arrays are shared, not copied (those with negative strides excepted). Fetching is one
    index_select for each leaf.

    Args:
        columns: the nest.
        rows: the rows that are samples, in order; None means all.
        settings: what a DataLoader around the data said.

    Raises:
        DataError: a leaf that is no tensor or array, leaves of unequal length, no samples.

    >>> source = ColumnSource({"x": torch.arange(8.0), "y": np.zeros((8, 2))})
    >>> source.fetch(np.array([5, 2]))["x"]
    tensor([5., 2.])
    """

    def __init__(
        self, columns: Any, rows: Tensor | None = None, settings: Settings | None = None
    ) -> None:
        lengths = {path or "data": _length(leaf, path or "data") for path, leaf in walk(columns)}
        if not lengths:
            raise DataError("the data set is empty: it holds no tensor or array; give at least one")
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{path} has {length}" for path, length in lengths.items())
            raise DataError(
                f"the columns of a data set have unequal lengths: {found}; dim 0 of each counts "
                "the samples and must be equal"
            )
        self.columns = map_nest(_as_tensor, columns)
        self.rows = rows
        self.size = next(iter(lengths.values())) if rows is None else len(rows)
        self.settings = settings or Settings()
        if self.size == 0:
            raise DataError("the data set is empty: got 0 samples; give at least one")

    def fetch(self, indices: Indices, epoch: int = 0, seed: int = 0) -> Any:
        chosen = torch.from_numpy(indices)
        if self.rows is not None:
            chosen = self.rows.index_select(0, chosen)
        return map_nest(lambda leaf: leaf.index_select(0, chosen.to(leaf.device)), self.columns)

    def sample(self, index: int) -> Any:
        row = index if self.rows is None else int(self.rows[index])
        return map_nest(lambda leaf: leaf[row], self.columns)


def is_columns(data: Any) -> bool:
    """Whether the data is read by columns: a tensor, an array, a dict or a tuple."""
    named = hasattr(data, "keys") and hasattr(data, "__getitem__")
    return named or isinstance(data, Tensor | np.ndarray | tuple)


def _length(leaf: Any, path: str) -> int:
    if not isinstance(leaf, Tensor | np.ndarray):
        raise DataError(
            f"{path} is a {type(leaf).__qualname__}, not a tensor or array; a dict or tuple is "
            "read by columns, so give tensors or arrays in it, or give a list of samples"
        )
    if leaf.ndim == 0:
        raise DataError(f"{path} is a single number; dim 0 must count the samples")
    return len(leaf)


def _as_tensor(leaf: Any) -> Tensor:
    """A tensor that shares the leaf's memory."""
    if isinstance(leaf, Tensor):
        return leaf.detach()
    if any(stride < 0 for stride in leaf.strides):
        leaf = leaf.copy()
    with warnings.catch_warnings():  # an array that cannot be written is fine: nobody writes to it
        warnings.filterwarnings("ignore", message=".*not writable")
        try:
            return torch.from_numpy(leaf)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"an array of type {leaf.dtype} cannot become a tensor; give numbers in this "
                "machine's own byte order, for example by .astype(np.float32)"
            ) from error
