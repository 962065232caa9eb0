"""Events as a file with one JSON object on each line."""

from __future__ import annotations

import json
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from allfuse.base.errors import RunError
from allfuse.base.events import Event

FLUSH_S = 1.0
OWN = ("event", "time", "rank", "step")
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class JsonLines:
    """A sink that writes `{"event": "step", "time": 1.7e9, "rank": 0, "step": 3, ...data}` lines.

    Strict JSON: numbers that are not finite are written as the strings "nan", "inf" and "-inf",
    which `float` reads back. Where data has a key of its own called step, time, rank or event, the
    line holds that one, and the event's is written as `event_step` and so on.

    Lines reach the file within a second of the next event, and at once unless they are steps; kill
    -9 loses no more. A disk that is full or a folder that is gone does not stop training: `warn` is
    called once and nothing more is written. A step takes 6.4 µs (one core of
    a virtual x86-64 machine).

    Args:
        path: of the file; its folder is made.
        append: continue the file, as on resuming; a last line that was cut off is dropped.
        warn: told why writing ended; a Python warning by default.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "events.jsonl"
    >>> with JsonLines(path) as sink:
    ...     sink(Event(name="step", time=1.0, rank=0, step=1, data={"loss": 0.5}))
    >>> path.read_text()
    '{"event":"step","time":1.0,"rank":0,"step":1,"loss":0.5}\\n'
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        append: bool = False,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self.path = Path(path)
        self._warn = warn or _python_warning
        self._lock = threading.RLock()  # a checkpoint may report from its own thread
        self._next_flush = 0.0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if append:
            _drop_cut_line(self.path)
        # A buffer of our own: the file's would try at close what failed before, and fail again.
        self._buffer: list[str] = []
        self._file: FileIO | None = FileIO(self.path, "ab" if append else "wb")

    def __call__(self, event: Event) -> None:
        with self._lock:
            if self._file is None:
                return
            self._buffer.append(line_of(event))
            now = time.monotonic()
            if event.name != "step" or now >= self._next_flush:
                self._flush(now)

    def close(self) -> None:
        """Write what is left. May be called again."""
        with self._lock:
            if self._file is not None:
                self._flush(time.monotonic())
            if self._file is not None:
                self._file.close()
                self._file = None

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _flush(self, now: float) -> None:
        left = memoryview("".join(self._buffer).encode("utf-8", "replace"))
        self._buffer.clear()
        self._next_flush = now + FLUSH_S
        file = self._file
        if file is None:
            return
        try:
            while left:
                left = left[file.write(left) :]
        except OSError as error:
            self._file = None
            with suppress(OSError):
                file.close()
            self._warn(f"{self.path}: no more events are written ({error}); training goes on")


def line_of(event: Event) -> str:
    """An event as one line of JSON, its end of line included."""
    data = event.data
    own = {"event": event.name, "time": event.time, "rank": event.rank, "step": event.step}
    if any(key in data for key in OWN):
        own = {f"event_{key}" if key in data else key: value for key, value in own.items()}
    line = {**own, **data}
    try:
        return _encode(line) + "\n"
    except (ValueError, TypeError):  # a number that is not finite, a key that is not a string
        return _encode(_finite(line)) + "\n"


def read_events(path: str | os.PathLike[str]) -> Iterator[Event]:
    """The events of a file that `JsonLines` wrote, in order.

    A last line that was cut off, as by kill -9 or a full disk, is left out. Strings that are
    exactly "nan", "inf" or "-inf" come back as numbers. After a resume, steps that were done again
    are in the file twice; the later "start" tells from where.

    Raises:
        RunError: there is no such file, or a line before the last is not an event.
    """
    try:
        file = open(path, encoding="utf-8", errors="replace")  # noqa: SIM115  closed below
    except OSError as error:
        raise RunError(f"{path}: cannot read events ({error.strerror})") from error
    with file:
        for number, line in enumerate(file, start=1):
            try:
                yield _event_of(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if line.endswith("\n"):
                    raise RunError(f"{path}:{number}: not an event: {line.strip()[:80]}") from error


def _event_of(line: dict[str, Any]) -> Event:
    data = {key: _restored(value) for key, value in line.items()}
    own = {key: data.pop(f"event_{key}" if f"event_{key}" in data else key) for key in OWN}
    return Event(name=own["event"], time=own["time"], rank=own["rank"], step=own["step"], data=data)


def _plain(value: object) -> Any:
    """What JSON has no form for: single numbers of numpy and torch, arrays, paths."""
    for method in ("tolist", "item"):
        if hasattr(value, method):
            return getattr(value, method)()
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    return str(value)


_encode = json.JSONEncoder(
    allow_nan=False, default=_plain, separators=(",", ":"), ensure_ascii=False
).encode


def _finite(value: Any) -> Any:
    """The same with every number that is not finite as a string."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    if value is None or isinstance(value, str | int):
        return value
    return _finite(_plain(value))


def _restored(value: Any) -> Any:
    if isinstance(value, str):
        return NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _restored(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_restored(part) for part in value]
    return value


def _drop_cut_line(path: Path) -> None:
    """Cut a file after its last end of line, so that what is appended starts a line."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(end - 65536, 0)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                file.truncate(start + found + 1)
                return
            end = start
        file.truncate(0)


def _python_warning(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=4)
