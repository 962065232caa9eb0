"""Events as plain lines: for logs, pipes and notebooks, where nothing can be drawn over."""

from __future__ import annotations

import time
from typing import TextIO

from allfuse.base.events import Event
from allfuse.observe.progress import Progress
from allfuse.observe.report import final_text
from allfuse.observe.wording import (
    aligned,
    choice_rows,
    compared_line,
    evaluated_line,
    message,
    scored_line,
    start_rows,
    step_line,
)

LINE_S = 2.0  # between two lines that say how far it is
SAVED_S = 10.0  # between two lines about checkpoints that went well; the summary names the last


class Lines:
    """Writes plain lines to a stream, at most one about progress every `LINE_S` seconds.

    The first step, the last one, evaluations and messages are always written; checkpoints that went
    well at most every `SAVED_S`.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._next = 0.0
        self._next_saved = 0.0
        self._pending = ""  # the kind of progress that came after the last line about it

    def show(self, event: Event, progress: Progress) -> None:
        name = event.name
        if name in ("step", "scored", "compared"):
            self._pending = name
            if time.monotonic() >= self._next or _is_last(name, progress):
                self._tell(progress)
        elif name == "start":
            self._next, self._pending = 0.0, ""
            rows = [*start_rows(event.data), *choice_rows(event.data)]
            self._write(*aligned(rows or [("started", "")]))
        elif name == "evaluated":
            self._write(evaluated_line(event, progress))
        elif name == "end":
            self.close(progress)
            self._write("", final_text(progress, charts=_takes_charts(self._stream)))
        elif name == "saved":
            if time.monotonic() >= self._next_saved:
                self._write(message(event) or "")
                self._next_saved = time.monotonic() + SAVED_S
        elif (text := message(event)) is not None:
            if name == "stop":
                self.close(progress)
            self._write(text)

    def close(self, progress: Progress) -> None:
        """Write the line about progress that is still owed."""
        self._tell(progress)

    def _tell(self, progress: Progress) -> None:
        match self._pending:
            case "step":
                self._write(step_line(progress))
            case "scored":
                self._write(scored_line(progress.scored))
            case "compared":
                self._write(compared_line(progress.compared))
        self._pending = ""
        self._next = time.monotonic() + LINE_S

    def _write(self, *lines: str) -> None:
        text = "\n".join(lines) + "\n"
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(text.encode(encoding, "replace").decode(encoding))
        self._stream.flush()


def _is_last(name: str, progress: Progress) -> bool:
    if name == "step":
        return progress.step == progress.total_steps
    if name == "scored":
        return progress.scored.get("rows") == progress.scored.get("total_rows")
    return progress.compared.get("step") == progress.compared.get("steps")


def _takes_charts(stream: TextIO) -> bool:
    encoding = (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "")
    return encoding.startswith("utf")
