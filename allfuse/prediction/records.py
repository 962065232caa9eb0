"""A CSV file as a stream of records: the bytes of one row each, found without reading its fields.

Every rank walks over all records and reads the fields of its own only, so the walk must be cheap.
A line without a quote is a record. Where quotes stand, a record may go on over several lines, by
the rules of Python's csv module: a quote opens a field only at its start, two in a row inside are
one quote.
"""

from __future__ import annotations

import os
from pathlib import Path

from allfuse.base.errors import DataError
from allfuse.base.units import format_bytes

BLOCK_BYTES = 1 << 20
MAX_RECORD_BYTES = 16 << 20
COMMA = ord(",")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Records:
    """The records of a CSV file, in order. Blank lines at its end are none.

    Damage is told once all records before it were taken, so that what is told does not depend on
    how many are taken at a time.

    Attributes:
        bytes_taken, size: how far the file is read, and its size when it was opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open(path, "rb")  # noqa: SIM115  closed by close()
        except FileNotFoundError:
            raise DataError(f"{path}: there is no such file; allowed: a CSV file") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        self.size = os.fstat(self._file.fileno()).st_size
        self.bytes_taken = 0
        self._found: list[bytes] = []
        self._found_before = 0
        self._blank = 0
        self._tail = b""
        self._first = True
        self._open: list[bytes] = []
        self._ended = False
        self._error: DataError | None = None

    def take(self, count: int) -> list[bytes]:
        """The next `count` records, fewer at the end of the file, none after it.

        Raises:
            DataError: what follows is no record; names the row.
        """
        while len(self._found) < count and not self._ended:
            try:
                self._read_block()
            except DataError as error:
                self._error, self._ended = error, True
        taken = self._found[:count]
        if not taken and self._error is not None:
            raise self._error
        del self._found[:count]
        self._found_before += len(taken)
        self.bytes_taken += sum(map(len, taken)) + len(taken)
        return taken

    def close(self) -> None:
        self._file.close()

    def _read_block(self) -> None:
        try:
            block = self._file.read(BLOCK_BYTES)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from None
        text = self._tail + block
        if self._first:
            text, self._first = text.removeprefix(BYTE_ORDER_MARK), False
        *lines, self._tail = text.split(b"\n")
        if not block:
            self._ended = True
            lines = [self._tail] if self._tail else []
        if self._open or b'"' in text:
            lines = self._join_open(lines)
        elif b"\r" in text:
            lines = [line.removesuffix(b"\r") for line in lines]
        self._add(lines)
        held = len(self._tail) + sum(map(len, self._open))
        if held > MAX_RECORD_BYTES:
            raise DataError(
                f"{self._at_next()} is longer than {format_bytes(MAX_RECORD_BYTES)}; "
                "next: look for a quote that is not closed, or lines that do not end"
            )
        if self._ended and self._open:
            raise DataError(
                f'{self._at_next()}: a quote (") is opened and never closed; next: close it, or '
                "write a quote inside quotes twice"
            )

    def _join_open(self, lines: list[bytes]) -> list[bytes]:
        """Records of lines that hold quotes; a record that goes on is kept for the next block."""
        records = []
        for line in lines:
            inside = leaves_open(line, inside=bool(self._open))
            if inside or self._open:
                self._open.append(line)
                if inside:
                    continue
                line = b"\n".join(self._open)
                self._open = []
            records.append(line.removesuffix(b"\r"))
        return records

    def _add(self, records: list[bytes]) -> None:
        """Append records; blank ones only once another follows."""
        end = len(records)
        while end and not records[end - 1]:
            end -= 1
        if end:
            self._found += [b""] * self._blank
            self._found += records[:end]
            self._blank = 0
        self._blank += len(records) - end

    def _at_next(self) -> str:
        return f"{self.path} row {self._found_before + len(self._found) + self._blank + 1}"


def leaves_open(line: bytes, *, inside: bool) -> bool:
    """Whether a quoted field goes on past the end of a line that begins inside one or not."""
    at = 0
    while True:
        if not inside:
            at = line.find(b'"', at)
            if at < 0:
                return False
            inside = at == 0 or line[at - 1] == COMMA
            at += 1
            continue
        at = line.find(b'"', at)
        if at < 0:
            return True
        if line.startswith(b'"', at + 1):
            at += 2
        else:
            inside = False
            at += 1
