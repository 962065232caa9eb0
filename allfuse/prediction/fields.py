"""The fields of a record: how they are cut, which are numbers, and what to say of the others."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence

import numpy as np

LARGEST = float(np.finfo(np.float32).max)
NAMED = 3  # names that an error shows before it counts the rest
SHOWN = 40


def split(record: bytes) -> list[str]:
    """The fields of one record in UTF-8, by the rules of Python's csv module, strictly.

    Raises:
        UnicodeDecodeError: it is not UTF-8. csv.Error: it is not CSV; see `explain`.
    """
    return next(csv.reader([record.decode()], strict=True), [])


def explain(error: csv.Error) -> str:
    """What Python's csv module says, in words for someone with a spreadsheet."""
    text = str(error)
    if "field larger than" in text:
        limit = f"{csv.field_size_limit():,}"
        return f"a field is longer than {limit} characters; next: look for a quote left open"
    if "new-line character" in text:
        return "a carriage return stands inside it; next: save the file with Unix or Windows lines"
    if "expected after" in text:
        return 'text follows a closing quote; next: write a quote (") inside quotes twice'
    return text


def why_no_number(field: str) -> str | None:
    """What is wrong with a field where a finite float32 belongs, None where it is one."""
    if not field.strip():
        return "is empty"
    try:
        value = float(field)
    except ValueError:
        return f"received the text {show(field)}"
    if "_" in field:  # Python alone reads 1_0 as 10
        return f"received the text {show(field)}"
    if not math.isfinite(value):
        return f"received {show(field)}"
    if abs(value) > LARGEST:
        return f"received {show(field)}, beyond the range of float32 ({LARGEST:.3g})"
    return None


def show(text: str) -> str:
    """A text in quotes, cut where it is long."""
    return repr(text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}...")


def show_columns(names: Sequence[str]) -> str:
    """Columns by name, the first few of many.

    >>> show_columns(["a", "b", "c", "d", "e"])
    "columns 'a', 'b', 'c' and 2 more"
    """
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    listed = ", ".join(show(name) for name in names[:NAMED])
    return f"column{'s' if len(names) != 1 else ''} {listed}{more}"
