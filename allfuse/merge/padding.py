"""Tables of words with fewer rows than others, made as long as the longest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from allfuse.merge.header import Entry

if TYPE_CHECKING:
    from torch import Tensor

    from allfuse.merge.blocks import Files


@dataclass(frozen=True)
class Padded(Entry):
    """A table with rows that it lacks: those of the base; and where that lacks them too, the
    weighted mean of those that have them.

    So a model says nothing where it has nothing: rules of changes see none there, and a weighted
    mean is that of the models that have the row. A row is never thinned out by models without it.

    Attributes:
        shape: of the longest table. own: as it is in the file. base: the base's, as it is.
        others: those of all models, as they are, with their weights.
    """

    own: Entry
    base: Entry | None
    others: tuple[tuple[Entry, float], ...]

    @property
    def bytes(self) -> int:
        return self.own.bytes

    @property
    def files(self) -> tuple[Path, ...]:
        tables = [self.own, *([] if self.base is None else [self.base])]
        tables += [table for table, _ in self.others]
        return tuple(dict.fromkeys(file for table in tables for file in table.files))


def pad(
    base: Entry | None, tables: Sequence[Entry], weights: Sequence[float]
) -> tuple[Entry | None, tuple[Entry, ...]]:
    """The base's table and those of models, all with the rows of the longest."""
    every = [*tables, *([] if base is None else [base])]
    rows = max(table.shape[0] for table in every)
    others = tuple(zip(tables, weights, strict=True))

    def padded(table: Entry) -> Entry:
        if table.shape[0] == rows:
            return table
        shape = (rows, *table.shape[1:])
        return Padded(table.name, table.dtype, shape, table.file, table.begin, table, base, others)

    return None if base is None else padded(base), tuple(padded(table) for table in tables)


def read_padded(files: Files, entry: Padded, begin: int, count: int) -> Tensor:
    """In float32 where rows are made."""
    import torch

    end = begin + count
    if end <= entry.own.count:
        return files.read(entry.own, begin, count)
    ends = {table.count for table, _ in entry.others}
    ends |= {entry.own.count, entry.base.count if entry.base is not None else 0}
    cuts = [begin, *sorted(cut for cut in ends if begin < cut < end), end]
    return torch.cat([_rows(files, entry, start, stop) for start, stop in pairwise(cuts)])


def _rows(files: Files, entry: Padded, begin: int, end: int) -> Tensor:
    """Numbers that each table has all of, or none."""
    import torch

    for table in (entry.own, entry.base):
        if table is not None and end <= table.count:
            return files.read(table, begin, end - begin).float()
    having = [(table, weight) for table, weight in entry.others if end <= table.count]
    total = sum(weight for _, weight in having)
    if total <= 0:  # weights that cancel, or that the models with these rows have none of
        having, total = [(table, 1.0) for table, _ in having], float(len(having))
    values = torch.zeros(end - begin)
    for table, weight in having:
        values.add_(files.read(table, begin, end - begin).float(), alpha=weight / total)
    return values
