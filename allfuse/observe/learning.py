"""How far a merge is that looks at data: what it does, for which model, samples and time left."""

from __future__ import annotations

import sys
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from allfuse.base.events import Event


class LearnProgress:
    """A sink that draws a bar for what goes on, and prints notes; on what is no terminal a line for
    each beginning. A context manager."""

    def __init__(self, file: TextIO | None = None) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(file=file or sys.stdout, highlight=False, soft_wrap=True),
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, visible=False)

    def __call__(self, event: Event) -> None:
        if event.name == "learning":
            number, models = event.data["model"], event.data["models"]
            of = "" if number is None else f", model {number + 1} of {models}"
            text = f"{event.data['what']}{of}"
            total = event.data["total"]
            self._bar.update(self._task, description=text, total=total, completed=0, visible=True)
            if not self._bar.console.is_terminal:
                self._bar.console.print(escape(text))
        elif event.name == "learned":
            self._bar.advance(self._task, event.data["count"])
        elif event.name == "note":
            self._bar.console.print(escape(event.data["text"]))

    def __enter__(self) -> LearnProgress:
        if self._bar.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar.console.is_terminal:
            self._bar.stop()
