"""The input columns of a job, read from a CSV file row by row, as numbers."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from allfuse.base.errors import DataError
from allfuse.prediction.fields import LARGEST, explain, show, split, why_no_number
from allfuse.prediction.header import check_columns, read_header
from allfuse.prediction.records import Records

Kept = list[list[str]]


class BadRow(DataError):
    """A row that cannot be used. `row` counts as a spreadsheet does: the header is row 1."""

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row

    def __reduce__(self) -> tuple[type[BadRow], tuple[str, int]]:
        return type(self), (str(self), self.row)


class Table:
    """Rows of a CSV file with a header, in the order of the file, never all in memory.

    `take` walks over rows cheaply, `parse` reads the fields of those that are wanted. Columns may
    stand in any order; each must be an input or be kept.

    Args:
        path: a file that ends in .csv, in UTF-8.
        inputs: names of the columns that hold numbers, in the order of the model's input.
        keep: names of columns whose text is passed on.

    Raises:
        DataError: the file or its header cannot be used.

    Example:
        with Table("rows.csv", ["width", "height"], keep=["id"]) as table:
            while records := table.take(1024):
                numbers, kept = table.parse(records, first_row=2)
    """

    def __init__(self, path: str | Path, inputs: Sequence[str], keep: Sequence[str] = ()) -> None:
        self.path = Path(path)
        require_csv(self.path, "input")
        self._records = Records(self.path)
        try:
            self.header = read_header(self.path, self._records.take(1))
            check_columns(self.path, self.header, inputs, keep)
        except BaseException:
            self.close()
            raise
        self._inputs = [self.header.index(name) for name in inputs]
        self._keep = [self.header.index(name) for name in keep]
        self._start = self._records.bytes_taken

    @property
    def part_read(self) -> float:
        """How much of the rows was taken, from 0 to 1, by bytes."""
        taken, size = self._records.bytes_taken, self._records.size
        return min(1.0, (taken - self._start) / max(size - self._start, 1))

    def take(self, count: int) -> list[bytes]:
        """The next `count` rows as they stand in the file, fewer at its end, none after it.

        Raises:
            DataError: what follows is no row.
        """
        return self._records.take(count)

    def parse(self, records: list[bytes], first_row: int) -> tuple[Tensor, Kept]:
        """The inputs of taken rows, float32 (rows, inputs), and the kept fields of each.

        Raises:
            BadRow: the first row that cannot be used: what it holds and in which column.
        """
        fast = self._parse_fast(records)
        if fast is not None:
            return fast
        rows = [self._read_row(record, row) for row, record in enumerate(records, first_row)]
        numbers = torch.tensor([numbers for numbers, _ in rows], dtype=torch.float32)
        return numbers.view(len(rows), len(self._inputs)), [kept for _, kept in rows]

    def close(self) -> None:
        self._records.close()

    def __enter__(self) -> Table:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _parse_fast(self, records: list[bytes]) -> tuple[Tensor, Kept] | None:
        """As `parse` gives, or None where a row needs a closer look.

        Accepts nothing that `_read_row` refuses, and takes a third of its time or less.
        """
        if not records or not all(map(bytes.strip, records)):
            return None  # NumPy skips blank lines
        try:
            texts = [record.decode() for record in records]
            if max(map(len, texts)) > csv.field_size_limit():
                return None
            if self._keep or any('"' in text or "\r" in text for text in texts):
                numbers, kept = self._parse_quoted(texts)
            else:
                numbers, kept = self._parse_plain(texts), [[] for _ in texts]
        except (ValueError, csv.Error):
            return None
        if len(numbers) != len(records) or not (np.abs(numbers) <= LARGEST).all():
            return None
        return torch.from_numpy(numbers.astype(np.float32)), kept

    def _parse_plain(self, texts: list[str]) -> NDArray[Any]:
        if any(text.count(",") != len(self.header) - 1 for text in texts):
            raise ValueError("a row has more or fewer fields than the header")
        return np.loadtxt(texts, delimiter=",", comments=None, usecols=self._inputs, ndmin=2)

    def _parse_quoted(self, texts: list[str]) -> tuple[NDArray[Any], Kept]:
        rows = list(csv.reader(texts, strict=True))
        if any(len(row) != len(self.header) for row in rows):
            raise ValueError("a row has more or fewer fields than the header")
        wanted = [[row[place] for place in self._inputs] for row in rows]
        for text, fields in zip(texts, wanted, strict=True):
            if "_" in text and any("_" in field for field in fields):
                raise ValueError("Python alone reads 1_0 as 10")
        kept = [[row[place] for place in self._keep] for row in rows]
        return np.array(wanted, dtype=np.float64), kept

    def _read_row(self, record: bytes, row: int) -> tuple[list[float], list[str]]:
        """The inputs and the kept fields of one row; the reference for what is allowed."""
        where = f"{self.path} row {row}"
        if not record.strip():
            raise BadRow(f"{where} is blank; allowed: blank lines at the end only", row)
        try:
            fields = split(record)
        except UnicodeDecodeError as error:
            where += self._column_after(record[: error.start])
            found = error.object[error.start : error.end].hex()
            raise BadRow(
                f"{where}: received bytes that are not UTF-8 (0x{found}); next: save the file as "
                "UTF-8",
                row,
            ) from None
        except csv.Error as error:
            raise BadRow(f"{where} is not CSV: {explain(error)}", row) from None
        if len(fields) != len(self.header):
            raise BadRow(
                f"{where} has {len(fields)} fields and the header has {len(self.header)}; next: "
                "correct it, or put quotes around fields that hold commas",
                row,
            )
        for place in self._inputs:
            problem = why_no_number(fields[place])
            if problem is not None:
                column = show(self.header[place])
                raise BadRow(f"{where}, column {column}: {problem}; allowed: a finite number", row)
        numbers = [float(fields[place]) for place in self._inputs]
        return numbers, [fields[place] for place in self._keep]

    def _column_after(self, before: bytes) -> str:
        """The column that the first bytes of a row lead to, as words; "" where none can be told."""
        try:
            place = max(len(next(csv.reader([before.decode("latin-1")]))) - 1, 0)
        except csv.Error:
            return ""
        return f", column {show(self.header[place])}" if place < len(self.header) else ""


def require_csv(path: Path, what: str) -> None:
    """Refuse a format that this version cannot use, by the name of the file."""
    if path.suffix.lower() != ".csv":
        raise DataError(f"--{what} {path}: allowed: a CSV file, with a name that ends in .csv")
