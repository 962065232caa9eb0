"""The live display of a run on a terminal: a panel that is drawn over in place.

The cursor is never hidden and rests on an empty line below the panel, so that even kill -9 leaves a
terminal that can be typed on.
"""

from __future__ import annotations

import atexit
import sys
import time
from contextlib import suppress
from typing import IO, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from allfuse.base.events import Event
from allfuse.observe.panel import panel
from allfuse.observe.progress import Progress
from allfuse.observe.report import final_table
from allfuse.observe.wording import aligned, choice_rows, message

COST = 0.01  # the largest part of the time that drawing may take
SLOWEST_S = 10.0  # between two drawings, on a terminal however slow

STYLES = {"warning": "yellow", "not_saved": "yellow", "lost": "bold red", "stop": "bold"}


class Terminal(Console):
    """A rich console whose broken pipe is an error like others and does not end the process."""

    def on_broken_pipe(self) -> None:
        raise  # the error that is being handled


class Screen:
    """Draws a panel from within `show`, at most every `refresh_s` seconds; no thread of its own.

    When drawing is slow the interval grows, so that it takes at most 1 % of the time.
    """

    def __init__(self, stream: TextIO, refresh_s: float) -> None:
        self._console = Terminal(
            file=stream, force_terminal=True, force_interactive=True, highlight=False
        )
        self._refresh_s = refresh_s
        self._live: Live | None = None
        self._next = 0.0

    def show(self, event: Event, progress: Progress) -> None:
        if event.name in ("step", "scored", "compared"):
            if time.monotonic() >= self._next:
                self._draw(progress)
        elif event.name == "start":
            self._tell_start(event)
            self._draw(progress)
        elif event.name == "end":
            self._close(transient=True)
            self._console.print(final_table(progress, width=self._console.width))
        elif (text := message(event)) is not None:
            style = STYLES.get(event.name, "dim" if event.name == "saved" else "")
            self._console.print(Text(text, style=style))

    def close(self, progress: Progress) -> None:
        """Draw a last time, leave the panel standing, and give standard output back."""
        if self._live is not None:
            try:
                self._live.update(panel(progress))
            finally:
                self._close(transient=False)

    def _draw(self, progress: Progress) -> None:
        began = time.monotonic()
        frame = Group(panel(progress), Text())
        cost = 0.0  # of the first drawing says nothing: rich sets itself up in it
        if self._live is None:
            self._live = self._open(frame)
        else:
            self._live.update(frame, refresh=True)
            cost = time.monotonic() - began
        wait = min(max(self._refresh_s, cost / COST), SLOWEST_S)
        self._next = time.monotonic() + wait

    def _open(self, frame: RenderableType) -> Live:
        # What the script prints appears above the panel, but never moves from a file to here.
        live = Live(
            frame,
            console=self._console,
            auto_refresh=False,
            redirect_stdout=_is_terminal(sys.stdout),
            redirect_stderr=_is_terminal(sys.stderr),
        )
        live.start()
        self._console.show_cursor(True)
        live.refresh()
        atexit.register(self._give_up)
        return live

    def _close(self, transient: bool) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            atexit.unregister(self._give_up)
            live.transient = transient
            if transient:  # the last drawing is not cut to the height of the terminal: none of it
                live.update(Text())
            live.stop()

    def _give_up(self) -> None:
        with suppress(Exception):
            self._close(transient=False)

    def _tell_start(self, event: Event) -> None:
        for line in aligned(choice_rows(event.data)):
            self._console.print(Text(line, style="dim"))


def _is_terminal(stream: IO[str] | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False
