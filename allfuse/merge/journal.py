"""Which blocks are written, so that a merge that was killed goes on where it was.

The first line says what is made of what; each further one names a block by its tensor's number and
its own, with the crc of its bytes. A line that was cut off counts for nothing. What is said here
is compared with the files at the end, so a block that never reached the disk is made again.

Each rank has a file of its own; who begins anew takes up those of all.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

NAME = "journal"
NAMES = re.compile(rf"{NAME}(-[0-9]+)?(\.new)?")


def is_journal(name: str) -> bool:
    """Whether a file is one by its name."""
    return NAMES.fullmatch(name) is not None


class Journal:
    """The journal of one rank. The first takes up what is in all journals of a folder, and leaves
    none but its own; others know what it knows.

    Attributes:
        done: the crc of each block that is written, by (tensor, block).
        goes_on: whether something was written before.
    """

    def __init__(self, folder: Path, about: str, rank: int = 0) -> None:
        head, path = about + "\n", folder / (NAME if rank == 0 else f"{NAME}-{rank}")
        self.done: dict[tuple[int, int], int] = {}
        self.goes_on = False
        old = sorted(file for file in folder.iterdir() if is_journal(file.name))
        for file in old if rank == 0 else [folder / NAME]:
            lines = _lines(file)
            if lines and lines[0] == head:
                self.goes_on = True
                self.done |= dict(_blocks(lines[1:]))
        known = self.done if rank == 0 else {}
        whole = "".join(f"{t} {b} {crc} .\n" for (t, b), crc in known.items())
        fresh = path.with_name(f"{path.name}.new")
        fresh.write_text(head + whole)
        os.replace(fresh, path)  # killed here, it has what it had
        for file in old if rank == 0 else []:
            if file != path:
                file.unlink(missing_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def add(self, task: int, block: int, crc: int) -> None:
        """A block is written."""
        os.write(self._file, f"{task} {block} {crc} .\n".encode())
        self.done[task, block] = crc

    def close(self) -> None:
        os.close(self._file)


def _lines(file: Path) -> list[str]:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return file.read_text().splitlines(keepends=True)
    return []


def _blocks(lines: list[str]) -> Iterator[tuple[tuple[int, int], int]]:
    for line in lines:
        parts = line.split()
        if len(parts) == 4 and parts[3] == "." and line.endswith("\n"):
            with contextlib.suppress(ValueError):
                yield (int(parts[0]), int(parts[1])), int(parts[2])
