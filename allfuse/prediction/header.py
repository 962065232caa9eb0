"""The first row of a table: which columns it has, and whether they are those that are needed."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from allfuse.base.errors import DataError, nearest
from allfuse.prediction.fields import explain, show_columns, split, why_no_number

HEADER_ROW = 1


def read_header(path: Path, records: Sequence[bytes]) -> list[str]:
    """The names of the columns, from the first record of a file, if there is one.

    Raises:
        DataError: it holds no names.
    """
    if not records:
        raise DataError(f"{path} is empty; allowed: a header with the names of columns, then rows")
    where = f"{path} row {HEADER_ROW}"
    if records[0].startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is UTF-16; next: save the file as UTF-8")
    try:
        names = split(records[0])
    except UnicodeDecodeError:
        raise DataError(f"{where} is not UTF-8; next: save the file as UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{where} is not CSV: {explain(error)}") from None
    if not names:
        raise DataError(f"{where} is blank; allowed: the names of columns")
    return names


def check_columns(
    path: Path, header: Sequence[str], inputs: Sequence[str], keep: Sequence[str]
) -> None:
    """Refuse a header that lacks a column, has one twice, or has others than asked for.

    Raises:
        DataError: names the columns, and the nearest where a name may be misspelt.
    """
    where = f"{path} row {HEADER_ROW}"
    if all(why_no_number(name) is None for name in header) and not set(inputs) & set(header):
        raise DataError(
            f"{where}: received numbers where the names of columns belong; next: add a header with "
            f"{show_columns(inputs)}"
        )
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        raise DataError(
            f"{where}: {show_columns(twice[:1])} stands twice; next: rename one of them"
        )
    wanted, there = dict.fromkeys((*inputs, *keep)), set(header)
    missing = [name for name in wanted if name not in there]
    extra = [name for name in header if name not in wanted]
    if missing:
        hint = nearest(missing[0], extra)
        marks = [mark for mark in (";", "\t", "|") if len(header) == 1 and mark in header[0]]
        if marks:
            hint = f"; fields seem to be separated by {marks[0]!r}, allowed: commas"
        raise DataError(
            f"{where}: missing {show_columns(missing)}{hint}; the file has {show_columns(header)}"
        )
    if extra:
        raise DataError(
            f"{where}: received {show_columns(extra)} too; allowed: the job's inputs, "
            f"{show_columns(inputs)}; next: remove the others, or pass them on with --keep"
        )
