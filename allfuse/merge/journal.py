"""Which blocks are written, so that a merge that was killed goes on where it was.

The first line says what is made of what; each further one names a block by its tensor's number and
its own, with the crc of its bytes. A line that was cut off counts for nothing. What is said here
is compared with the files at the end, so a block that never reached the disk is made again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

NAME = "journal"


class Journal:
    """Attributes: done: the crc of each block that is written, by (tensor, block)."""

    def __init__(self, folder: Path, about: str) -> None:
        path, head = folder / NAME, about + "\n"
        self.done: dict[tuple[int, int], int] = {}
        lines: list[str] = []
        with contextlib.suppress(OSError, UnicodeDecodeError):
            lines = path.read_text().splitlines(keepends=True)
        self.goes_on = bool(lines) and lines[0] == head
        if self.goes_on:
            self.done = dict(_blocks(lines[1:]))
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        whole = "".join(f"{t} {b} {crc} .\n" for (t, b), crc in self.done.items())
        os.write(self._file, (head + whole).encode())

    def add(self, task: int, block: int, crc: int) -> None:
        """A block is written."""
        os.write(self._file, f"{task} {block} {crc} .\n".encode())
        self.done[task, block] = crc

    def close(self) -> None:
        os.close(self._file)


def _blocks(lines: list[str]) -> Iterator[tuple[tuple[int, int], int]]:
    for line in lines:
        parts = line.split()
        if len(parts) == 4 and parts[3] == "." and line.endswith("\n"):
            with contextlib.suppress(ValueError):
                yield (int(parts[0]), int(parts[1])), int(parts[2])
