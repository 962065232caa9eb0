"""Brings to the disk what is written, while more of it is written."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable
from pathlib import Path

EACH_BYTES = 1 << 27


class Flusher:
    """A thread that has files written to the disk each time that some 128 MB are new in them. Else
    the system would begin when all is done, and all would wait for it. A context manager."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = [os.open(file, os.O_RDWR | os.O_CLOEXEC) for file in files]
        self._turn = threading.Condition()
        self._new, self._ends = 0, False
        self._thread = threading.Thread(target=self._work, name="allfuse-flush", daemon=True)

    def wrote(self, nbytes: int) -> None:
        """So many bytes are new in the files."""
        with self._turn:
            self._new += nbytes
            if self._new >= EACH_BYTES:
                self._turn.notify()

    def _work(self) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._ends or self._new >= EACH_BYTES)
                if self._ends:
                    return
                self._new = 0
            for file in self._files:
                with contextlib.suppress(OSError):  # who syncs at the end gets this error too
                    os.fdatasync(file)

    def __enter__(self) -> Flusher:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._turn:
            self._ends = True
            self._turn.notify()
        self._thread.join()
        for file in self._files:
            os.close(file)
