"""How far some work is, in one line."""

from __future__ import annotations

import sys
from typing import Any, ClassVar, Self, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

BYTES: tuple[type[ProgressColumn], ...] = (
    DownloadColumn,
    TransferSpeedColumn,
    TimeRemainingColumn,
)
COUNTS: tuple[type[ProgressColumn], ...] = (MofNCompleteColumn, TimeRemainingColumn)


class Bar:
    """Draws a bar where a terminal is, and is silent elsewhere. A context manager.

    Attributes:
        columns: what stands behind the bar.
    """

    columns: ClassVar[tuple[type[ProgressColumn], ...]] = BYTES

    def __init__(self, file: TextIO | None = None) -> None:
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            *(column() for column in self.columns),
            console=Console(file=file or sys.stdout, highlight=False),
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, visible=False)

    def show(self, text: str, **about: Any) -> None:
        """Say beside the bar what goes on; `total` and `completed` are counted in its unit."""
        self._bar.update(self._task, description=text, visible=True, **about)

    def advance(self, count: float) -> None:
        self._bar.advance(self._task, count)

    def note(self, text: str) -> None:
        """A line above the bar."""
        self._bar.console.print(Text(text), soft_wrap=True)

    def log(self, text: str) -> None:
        """A line where there is no bar."""
        if not self._bar.console.is_terminal:
            self.note(text)

    def __enter__(self) -> Self:
        if self._bar.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar.console.is_terminal:
            self._bar.stop()
