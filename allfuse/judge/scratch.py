"""Where models lie that are judged and then forgotten."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from allfuse.store.scratch import scratch_folder, sweep

MEMORY = Path("/dev/shm")
NAME = "allfuse-judge-"
SPARE = 4
"""A candidate may take this part of what is free in memory, for others take some, too."""


@contextmanager
def scratch(needed_bytes: int, beside: Path) -> Iterator[Path]:
    """A folder in memory where so many bytes are little there, else in `beside`, which is made
    where it is not there. It is removed at the end; what processes that were killed have left in
    either place is removed at the start.
    """
    beside.mkdir(parents=True, exist_ok=True)
    places = {MEMORY: NAME, beside: f".{NAME}"}
    for place, name in places.items():
        sweep(name, place)
    fits = MEMORY.is_dir() and needed_bytes * SPARE <= shutil.disk_usage(MEMORY).free
    parent = MEMORY if fits and os.access(MEMORY, os.W_OK) else beside
    with scratch_folder(places[parent], parent) as folder:
        yield folder
