"""What a safetensors file says it holds, read and checked without torch and without its data.

8 bytes of header length (little end first), a JSON header, and the tensors' bytes end to end, as
https://huggingface.co/docs/safetensors describes. The safetensors library checks as much; it does
not tell where in a file the bytes are.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from allfuse.base.errors import MergeError

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of a number of each type that a file can hold, by its name there."""
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
MOST_HEADER_BYTES = 100_000_000
DAMAGED = "copy the file again from where it is whole"


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: `dtype` as the file names it, `begin` in bytes from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int

    @property
    def count(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.count * ITEM_BYTES[self.dtype]

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS

    @property
    def files(self) -> tuple[Path, ...]:
        """Those that its numbers follow from."""
        return (self.file,)


@dataclass(frozen=True)
class Header:
    """Of one file: its tensors by name, in the order of their bytes, and its texts."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The header of a file, checked against the file's size.

    Raises:
        MergeError: it cannot be read, is no safetensors file, is cut off, or lies about sizes.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MOST_HEADER_BYTES):
                raise _refuse(path, f"its header would have {length:,} bytes of {size:,} in all")
            said = json.loads(file.read(length).decode())
    except OSError as error:
        raise MergeError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise _refuse(path, f"its header is no JSON: {error}") from error
    if not isinstance(said, dict):
        raise _refuse(path, "its header is no JSON object")
    metadata = said.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _refuse(path, "the texts in its header are none")
    entries = [_entry(path, name, about, 8 + length) for name, about in said.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.bytes))
    end = 8 + length
    for entry in entries:
        if entry.begin != end:
            raise _refuse(path, f"{entry.name} begins at byte {entry.begin:,}, not {end:,}")
        end += entry.bytes
    if end != size:
        raise _refuse(path, f"its tensors end at byte {end:,}, the file at {size:,}")
    return Header({entry.name: entry for entry in entries}, metadata)


def _entry(path: Path, name: str, about: Any, start: int) -> Entry:
    try:
        dtype, shape, (begin, end) = about["dtype"], about["shape"], about["data_offsets"]
        sizes = [*shape, begin, end]
        whole = all(type(number) is int and number >= 0 for number in sizes)
    except (KeyError, TypeError, ValueError) as error:
        raise _refuse(path, f"its header does not say what {name!r} is") from error
    if not whole or dtype not in ITEM_BYTES:
        raise _refuse(path, f"its header says that {name!r} is {about}")
    entry = Entry(name, dtype, tuple(shape), path, start + begin)
    if entry.bytes != end - begin:
        raise _refuse(
            path,
            f"{name} of {dtype}{list(shape)} takes {entry.bytes:,} bytes, it has {end - begin:,}",
        )
    return entry


def _refuse(path: Path, why: str) -> MergeError:
    return MergeError(f"{path} is damaged or no safetensors file: {why}; next: {DAMAGED}")
