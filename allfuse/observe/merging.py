"""How far a merge is: bytes, speed and time left, in one line."""

from __future__ import annotations

import sys
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from allfuse.base.events import Event
from allfuse.base.units import format_bytes


class MergeProgress:
    """A sink that draws a bar of the bytes that are written; a line at the start where it is no
    terminal. A context manager."""

    def __init__(self, file: TextIO | None = None) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(file=file or sys.stdout, highlight=False, soft_wrap=True),
            transient=True,
        )
        self._task = self._bar.add_task("merging", total=None, visible=False)

    def __call__(self, event: Event) -> None:
        if event.name == "merging":
            total, resumed = event.data["total"], event.data["resumed"]
            done = event.data["bytes"]
            self._bar.update(
                self._task, description="merging", total=total, completed=done, visible=True
            )
            if not self._bar.console.is_terminal:
                again = f", going on after {resumed:,} blocks" if resumed else ""
                self._bar.console.print(f"merging: {format_bytes(total)} to write{again}")
        elif event.name == "merged":
            self._bar.advance(self._task, event.data["bytes"])
        elif event.name == "aligning":
            text = f"aligning model {event.data['model'] + 1} of {event.data['models']}"
            self._bar.update(self._task, description=text, visible=True)
            if not self._bar.console.is_terminal:
                self._bar.console.print(text)
        elif event.name == "note":
            self._bar.console.print(escape(event.data["text"]))

    def __enter__(self) -> MergeProgress:
        if self._bar.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar.console.is_terminal:
            self._bar.stop()
