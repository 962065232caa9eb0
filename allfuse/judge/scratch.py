"""A folder for models that are judged and then forgotten, which no crash leaves behind for long."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MEMORY = Path("/dev/shm")
NAME = "allfuse-judge-"
SPARE = 4
"""A candidate may take this part of what is free in memory, for others take some, too."""


@contextmanager
def scratch(needed_bytes: int, beside: Path) -> Iterator[Path]:
    """A folder in memory where so many bytes are little there, else in `beside`. It is removed at
    the end; what processes that were killed have left in either place is removed at the start.
    `beside` is made where it is not there.
    """
    beside.mkdir(parents=True, exist_ok=True)
    for place in (MEMORY, beside):
        sweep(place)
    fits = MEMORY.is_dir() and needed_bytes * SPARE <= shutil.disk_usage(MEMORY).free
    parent = MEMORY if fits and os.access(MEMORY, os.W_OK) else beside
    folder = Path(tempfile.mkdtemp(prefix=f".{NAME}" if parent is beside else NAME, dir=parent))
    lock = _lock(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def sweep(place: Path) -> None:
    """Remove the folders of processes that are no more: their locks are free."""
    for folder in [*place.glob(f"{NAME}*/"), *place.glob(f".{NAME}*/")]:
        with contextlib.suppress(OSError):
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _lock(folder: Path) -> int:
    """Hold a folder as long as this process lives. It has its lock's name when it is held."""
    lock = os.open(folder / "lock-", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(folder / "lock-", folder / "lock")
    return lock
