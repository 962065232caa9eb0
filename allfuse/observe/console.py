"""The console: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from types import TracebackType
from typing import Protocol, TextIO

from allfuse.base.events import Event
from allfuse.observe.lines import Lines
from allfuse.observe.progress import Progress


class View(Protocol):
    """A way to show events on a stream."""

    def show(self, event: Event, progress: Progress) -> None: ...

    def close(self, progress: Progress) -> None: ...


class Console:
    """A sink that shows a run to the people who wait for it.

    On a terminal it draws a live panel from within the call that hands it an event, so that no
    thread takes time from training; elsewhere it writes plain lines, at most one about progress
    every 2 s. "end" closes the display and prints the summary (`report`).

    Showing must not stop training: when the live panel fails, plain lines take its place; when
    these fail too (a closed pipe, a full disk) it says so on standard error and falls silent.

    A step for which nothing is drawn or written costs 1.7 µs; drawing the panel costs 2.4 ms and
    takes at most 1 % of the time (2 workers, one core of a virtual x86-64 machine).

    Args:
        stream: where to, standard output by default.
        interactive: draw a panel; None: when the stream is a terminal that can.
        refresh_s: the least time between two drawings.

    >>> from allfuse.base.events import Bus
    >>> bus = Bus()
    >>> with Console(sys.stdout, interactive=False) as console:
    ...     bus.subscribe(console)
    ...     bus.emit("note", text="data(2): the topology is native")
    data(2): the topology is native
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        interactive: bool | None = None,
        refresh_s: float = 0.5,
    ) -> None:
        self.progress = Progress()
        self._stream = sys.stdout if stream is None else stream
        self._lock = threading.RLock()  # a checkpoint may report from its own thread
        self._view: View | None = Lines(self._stream)
        if _can_draw(self._stream) if interactive is None else interactive:
            from allfuse.observe.live import Screen

            self._view = Screen(self._stream, refresh_s)

    def __call__(self, event: Event) -> None:
        with self._lock:
            try:
                self.progress.update(event)
            except Exception as error:
                self._step_down(error, event)
            else:
                self._show(event)

    def close(self) -> None:
        """End the display and leave the terminal as it was. May be called again."""
        with self._lock:
            try:
                if self._view is not None:
                    self._view.close(self.progress)
            except Exception as error:
                self._step_down(error, None)

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _show(self, event: Event) -> None:
        if self._view is None:
            return
        try:
            self._view.show(event, self.progress)
        except Exception as error:
            self._step_down(error, event)
        except BaseException:  # Ctrl-C while drawing: leave the terminal in order
            self.close()
            raise

    def _step_down(self, error: Exception, event: Event | None) -> None:
        """From the panel to lines, from lines to silence."""
        why = f"{type(error).__name__}: {error}"
        failed, self._view = self._view, None
        if failed is None:
            return
        if isinstance(failed, Lines):
            if isinstance(error, BrokenPipeError):
                _discard_rest(self._stream)
            with suppress(Exception):
                print(f"allfuse: the console is silent from here ({why})", file=sys.stderr)
            return
        with suppress(Exception):
            failed.close(self.progress)
        self._view = Lines(self._stream)
        text = f"the live display failed ({why}); plain lines from here"
        self._show(Event(name="warning", time=0.0, rank=0, step=0, data={"text": text}))
        if event is not None:
            self._show(event)


def _can_draw(stream: TextIO) -> bool:
    """Whether a stream is a terminal with a cursor that moves and with Unicode."""
    try:
        terminal = stream.isatty()
    except (AttributeError, ValueError):
        return False
    encoding = (getattr(stream, "encoding", None) or "").lower().replace("-", "")
    return terminal and encoding == "utf8" and os.environ.get("TERM") not in (None, "", "dumb")


def _discard_rest(stream: TextIO) -> None:
    """Let what is still buffered go nowhere, or flushing it at exit makes a good run fail.

    The recipe of the Python documentation of signals, "Note on SIGPIPE".
    """
    with suppress(Exception):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
