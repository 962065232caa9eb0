"""A folder for the sockets that loader processes hand tensors over by.

multiprocessing would make one for each process in /tmp, which stays behind after kill -9. This one
is named after the worker, whose zygote removes it however the worker ends.
"""

from __future__ import annotations

import multiprocessing.process
import shutil
import tempfile
from pathlib import Path

_own: Path | None = None


def scratch_of(zygote: int, worker: int) -> Path:
    """Where the zygote of this process id looks for what a worker has left."""
    return Path(tempfile.gettempdir()) / f"allfuse-{zygote}-{worker}"


def become_owner(folder: Path) -> None:
    """In a fresh worker: remember its folder, which is not made before it is needed."""
    global _own
    _own = folder


def use_scratch() -> None:
    """Have multiprocessing use it in this process and its children. Nothing in other processes."""
    if _own is not None:
        _own.mkdir(mode=0o700, exist_ok=True)
        vars(multiprocessing.process.current_process())["_config"]["tempdir"] = str(_own)


def remove_scratch(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
