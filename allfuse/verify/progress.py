"""Carries progress from rank 0 of the plan's run, another process, to who called verify."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TextIO

POLL_S = 0.1

Listener = Callable[..., None]  # called as `Bus.emit` is: with a name and data


class Relay:
    """While it is entered, hands each line that is added to a file on as a "compared" event.

    A file, because sinks (consoles) cannot be sent to another process. The listener is called in a
    thread of this process.
    """

    def __init__(self, path: Path, listener: Listener | None) -> None:
        self.path, self.listener = path, listener
        path.touch()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="allfuse-verify", daemon=True)

    def emit(self, name: str, **data: object) -> None:
        if self.listener is not None:
            self.listener(name, **data)

    def _follow(self) -> None:
        with open(self.path) as file:
            while not self._ended.wait(POLL_S):
                self._read(file)
            self._read(file)

    def _read(self, file: TextIO) -> None:
        while True:
            begin = file.tell()
            line = file.readline()
            if not line.endswith("\n"):  # nothing, or half a line
                file.seek(begin)
                return
            self.emit("compared", **json.loads(line))

    def __enter__(self) -> Relay:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
