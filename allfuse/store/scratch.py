"""Folders of one process that are removed at its end, however it ends.

What a killed process left is removed by the next one: each holds a lock in its folder, which the
system lets go of with the process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def scratch_folder(name: str, parent: Path | None = None) -> Iterator[Path]:
    """A folder whose name begins with `name`, in `parent`, or where temporary files are. At its
    start those of that name are removed whose processes are no more.

    Raises:
        OSError: it cannot be made.
    """
    place = Path(tempfile.gettempdir()) if parent is None else parent
    sweep(name, place)
    folder = Path(tempfile.mkdtemp(prefix=name, dir=place))
    lock = _lock(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def sweep(name: str, place: Path) -> None:
    """Remove the folders of that name whose processes are no more: their locks are free."""
    for folder in place.glob(f"{name}*/"):
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
